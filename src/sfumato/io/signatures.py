"""The kind of a file by its first bytes, whatever its name says.

Downloads go wrong in few ways: a pointer of Git LFS instead of the file, a web page instead of the
file, an empty file, or a file of another format under the expected name.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"
ZIP = b"PK\x03\x04"
SHORT = 100
"""Bytes in which a zip of torch names its first file, by which it is told from others."""
_AGAIN = "download it again"
_OTHERWISE = {
    "weights": "give model weights",
    "tokenizer": _AGAIN,
    "text": _AGAIN,
    "image": "give an image such as PNG or JPEG",
}
"""Remedies of kinds that have none of their own, by the kind that was expected."""
_CONVERT = {"weights": "convert it to safetensors with the tool that wrote it"}
_OWN = {"weights": f"{_CONVERT['weights']}, or use the model's own weights"}
_UNPACK = dict.fromkeys(_OTHERWISE, "unpack it first")
_SIGNATURES: tuple[tuple[bytes, str, Mapping[str, str]], ...] = (
    (b"GGUF", "a GGUF file", {"weights": "give it a name that ends in .gguf"}),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"PAR1", "a Parquet table", {"image": "open it as a data set"}),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", {}),
    (b"\xff\xd8\xff", "a JPEG image", {}),
    (b"GIF8", "a GIF image", {}),
    (b"%PDF", "a PDF document", {"image": "export its page as PNG"}),
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
    return _begins_safetensors(first_bytes(path, 9))


def _begins_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 2**28


def is_pickle(path: str | Path) -> bool:
    """Return True for a pickle of torch: a zip with a pickle inside, or a bare one."""
    return _begins_pickle(first_bytes(path))


def _begins_pickle(start: bytes) -> bool:
    protocol = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return protocol or (start.startswith(ZIP) and b"data.pkl" in start)


def another_kind(path: str | Path, expected: str = "weights") -> str | None:
    """Return a clause for a file that is of another kind than its name says, and the remedy.

    Args:
        path: A file that could not be read as what its name says.
        expected: As for `kind_of`.

    Returns:
        "it is ...: do ...", or None where its first bytes tell nothing.
    """
    return kind_of(first_bytes(path), expected) if Path(path).is_file() else None


def kind_of(start: bytes, expected: str) -> str | None:
    """Return a clause for the kind of a file that was not read as expected, and the remedy.

    Args:
        start: The first bytes of the file, 512 or more, or all.
        expected: "weights", "tokenizer", "text" or "image".

    Returns:
        "it is ...: do ...", or None where the bytes tell nothing.
    """
    words = first_words(start)
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
        if expected == "image":
            return "it is a web page, not the file: download the image itself"
        return (
            "it is a web page, not the file: the download failed or needs a login; download it "
            "again, from a link with resolve/ where the Hub's page has blob/"
        )
    if (kind := _binary_kind(start)) is not None:
        name, remedies = kind
        return f"it is {name}: {remedies.get(expected, _OTHERWISE[expected])}"
    if not any(start):
        return f"it begins with zeros alone, as a download that was not finished: {_AGAIN}"
    if expected != "text" and _is_plain_text(start):
        return f"it is a text that begins {_shown(start)}, perhaps a server's message: {_AGAIN}"
    return None


def _binary_kind(start: bytes) -> tuple[str, Mapping[str, str]] | None:
    """Return the name of a kind and its remedies by what was expected; None: unknown."""
    for signature, name, remedies in _SIGNATURES:
        if start.startswith(signature):
            return name, remedies
    if _begins_pickle(start):
        remedy = (
            "give it a name that ends in .ckpt, "
            "or better, use a safetensors file, which holds numbers only"
        )
        return "a pickle of torch", {"weights": remedy}
    if start.startswith(ZIP) and len(start) > SHORT:
        return "a zip archive", _UNPACK
    if _begins_safetensors(start):
        return "a safetensors file", {"weights": "give it a name that ends in .safetensors"}
    if start[:1] == b"\x08" and start[2:3] in _ONNX and 1 <= start[1] <= 32:
        return "an ONNX model", _OWN
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _OWN
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    return None


def odd_file(files: Iterable[Path]) -> str | None:
    """Return a sentence about the first of several texts that is of another kind, or None."""
    kinds = ((path, another_kind(path, "text")) for path in files)
    return next((f"{path}: {kind}" for path, kind in kinds if kind), None)


def first_words(start: bytes) -> bytes:
    """Return the beginning of a text in small letters, without a mark of its encoding."""
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()


def _is_plain_text(start: bytes) -> bool:
    """Return True for UTF-8, nearly all of which can be shown; the last letter may be cut.

    A zero byte is that of numbers, as in the header of a safetensors file.
    """
    if 0 in start:
        return False
    text = start.decode("utf-8", "replace")
    shown = sum((c.isprintable() or c in "\t\r\n") and c != "\ufffd" for c in text)
    return shown > 0.95 * len(text)


def _shown(start: bytes) -> str:
    return repr(" ".join(start[:60].decode("utf-8", "replace").split()))
