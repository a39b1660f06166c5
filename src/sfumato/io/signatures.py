"""The kind of a file by its first bytes, whatever its name says.

Downloads go wrong in few ways: a pointer of Git LFS instead of the file, a web page instead of the
file, an empty file, or a file of another format under the expected name.
"""

from collections.abc import Iterable
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"
ZIP = b"PK\x03\x04"
SHORT = 100
"""Bytes in which a zip of torch names its first file, by which it is told from others."""
_AGAIN = "download it again"
_CONVERT = "convert it to safetensors with the tool that wrote it"
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file", "give it a name that ends in .gguf"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"PAR1", "a Parquet table", "a model is expected here"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
    (b"BZh", "a bzip2 archive", "unpack it first"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "give an image where one is expected"),
    (b"\xff\xd8\xff", "a JPEG image", "give an image where one is expected"),
    (b"GIF8", "a GIF image", "give an image where one is expected"),
    (b"%PDF", "a PDF document", _AGAIN),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<error")
_ONNX = (b"\x12", b"\x1a", b":", b"B", b"r")
"""Fields of ONNX's first message that follow `ir_version`."""


def first_bytes(path: str | Path, count: int = 512) -> bytes:
    """Return the beginning of a file; nothing for one that cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(count)
    except (OSError, ValueError):
        return b""


def is_safetensors(path: str | Path) -> bool:
    """Return True for a file that begins with the length of a JSON table, and the table."""
    start = first_bytes(path, 9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 2**28


def is_pickle(path: str | Path) -> bool:
    """Return True for a pickle of torch: a zip with a pickle inside, or a bare one."""
    start = first_bytes(path)
    protocol = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return protocol or (start.startswith(ZIP) and b"data.pkl" in start)


def another_kind(path: str | Path, expected: str = "weights") -> str | None:
    """Return a clause for a file that is of another kind than its name says, and the remedy.

    Args:
        path: A file that could not be read as what its name says.
        expected: "weights", "text" or "image": what is nothing strange.

    Returns:
        "it is ...: do ...", or None where its first bytes tell nothing.
    """
    path = Path(path)
    if not path.is_file():
        return None
    start = first_bytes(path)
    words = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return f"it is an empty file: {_AGAIN}"
    if start.startswith(LFS):
        return (
            "it is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder, "
            "or download it from the Hub"
        )
    if words.startswith(b"/annex/objects/") or b".git/annex/objects/" in words:
        return "it is a pointer of git-annex, not the file itself: run `git annex get` on it"
    if words.startswith(_PAGES):
        return (
            "it is a web page, not the file: the download failed or needs a login; download it "
            "again, from a link with resolve/ where the Hub's page has blob/"
        )
    for signature, kind, remedy in _SIGNATURES:
        if start.startswith(signature) and not (expected == "image" and " image" in kind):
            return f"it is {kind}: {remedy}"
    if is_pickle(path):
        return (
            "it is a pickle of torch: give it a name that ends in .ckpt, "
            "or better, use a safetensors file, which holds numbers only"
        )
    if start.startswith(ZIP) and len(start) > SHORT:
        return "it is a zip archive: unpack it first"
    if is_safetensors(path):
        return "it begins as a safetensors file: give it a name that ends in .safetensors"
    if start[:1] == b"\x08" and start[2:3] in _ONNX and 1 <= start[1] <= 32:
        return f"it is an ONNX model: {_CONVERT}, or use the model's own weights"
    if start[4:8] == b"TFL3":
        return f"it is a TensorFlow Lite model: {_CONVERT}, or use the model's own weights"
    if start[257:262] == b"ustar":
        return "it is a tar archive: unpack it first"
    if not any(start):
        return f"it begins with zeros alone, as a download that was not finished: {_AGAIN}"
    if expected != "text" and _is_plain_text(start):
        return f"it is a text that begins {_shown(start)}, perhaps a server's message: {_AGAIN}"
    return None


def odd_file(files: Iterable[Path], expected: str = "text") -> str | None:
    """Return a sentence about the first of several files that is of another kind, or None."""
    kinds = ((path, another_kind(path, expected)) for path in files)
    return next((f"{path}: {kind}" for path, kind in kinds if kind), None)


def _is_plain_text(start: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)


def _shown(start: bytes) -> str:
    return repr(" ".join(start[:60].decode("utf-8", "replace").split()))
