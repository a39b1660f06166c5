"""Files that are whole or absent: atomic writes, JSON with clear errors, content hashes.

A writer fills a temporary file in the same folder, calls fsync and renames it; a full disk or a
kill leaves the old file. Temporary names are .NAME.PID.tmp; `recover` removes those of processes
that have ended.
"""

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError
from sfumato.io.signatures import another_kind, is_safetensors

if TYPE_CHECKING:
    import torch


_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")


class NotWritten(UserError):
    """A file could not be written (full disk, permissions); the old one is unchanged."""

    def __init__(self, path: Path, error: OSError):
        reason = error.strerror or error
        super().__init__(
            f"could not write {path}: {reason}; what was there is unchanged: "
            "free some space or choose another place"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(process: int) -> bool:
    """Return True where another process has this number.

    Files with this process's number were left by an earlier one.
    """
    # Windows: signal 0 is Ctrl-C; files that are left there stay
    if process == os.getpid() or os.name == "nt":
        return os.name == "nt"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def recover(folder: str | Path, name: str | None = None) -> None:
    """Clear a folder after killed writers; files of running processes are not touched.

    Half-written files and folders are removed. A folder that a writer had moved aside (see
    `atomic_folder`) is renamed back if its name is free.

    Args:
        folder: the folder.
        name: of the file or folder that was written; None: all.
    """
    for left in sorted(Path(folder).glob(".*")):
        match = _TEMPORARY.fullmatch(left.name)
        if match is None or name not in (None, match[1]) or _alive(int(match[2])):
            continue
        if match[3] == "old" and not (left.parent / match[1]).exists():
            with suppress(OSError):
                os.replace(left, left.parent / match[1])
        else:
            _remove(left)


def _exchange(a: Path, b: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot (not Linux)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def _make_parent(path: Path) -> None:
    """Make the folder of a file; `NotWritten` where a file has its name, for instance."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotWritten(path, NotADirectoryError(f"{path.parent} is not a folder")) from error
    except OSError as error:
        raise NotWritten(path, error) from error


@contextmanager
def atomic_file(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` after the block and removed on errors.

    Args:
        path: the file.
        replace: False leaves an older file of that name as it is, also one that another process
            writes at the same moment.

    Raises:
        NotWritten: the file cannot be written.
        FileExistsError: there is a file of that name, and `replace` is False.
    """
    path = Path(path)
    _make_parent(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        if not replace:
            _claim(temporary, path)
        os.replace(temporary, path)
        _sync(path.parent)
    except FileExistsError as error:
        if replace:
            raise NotWritten(path, error) from error
        raise
    except OSError as error:
        raise NotWritten(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _claim(file: Path, name: Path) -> None:
    """Give a file a second name that is free; of several processes one succeeds.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file holds the name
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` after the block; removed on errors.

    A kill at any moment leaves the old folder or the new one under the name. Where the system
    cannot swap two names in one step (not Linux), a kill between two renames leaves the old one
    moved aside: `recover`, or the next writer, renames it back.

    Raises:
        NotWritten: the folder cannot be written.
    """
    path = Path(path)
    _make_parent(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        recover(path.parent, path.name)
        temporary.mkdir()
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            _sync(file)
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            # after an exchange, `temporary` is what was there before
            os.replace(path, old)
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, NotWritten) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise NotWritten(
            path, cause if isinstance(cause, OSError) else OSError(str(cause))
        ) from error
    finally:
        if old.exists() and not path.exists():
            with suppress(OSError):
                os.replace(old, path)
        _remove(temporary)
        if path.exists():
            _remove(old)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically, indented by two spaces, with a final newline.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file in UTF-8; a missing or broken one is a `UserError` that names it.

    A mark of the encoding at its beginning, as some editors write it, is allowed.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected a JSON file there") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, too many digits or brackets
        kind = another_kind(path, "text")
        reason = f": {kind}" if kind else f" ({error}): it may be truncated; copy it again"
        raise UserError(f"{path} is not valid JSON{reason}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): expected a JSON file that you may read"
        ) from error


def read_table(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; anything else in the file is a `UserError` that names it."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds a {type(values).__name__}: expected a JSON object with named fields"
        )
    return values


def write_tensors(
    path: str | Path, tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, from contiguous tensors on the CPU.

    A tensor of several names is written under each, as copies: the library refuses shared memory.
    The metadata have `format: pt`, which diffusers expects.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        ready[name] = tensor.clone() if tensor.data_ptr() in places and tensor.numel() else tensor
        places.add(tensor.data_ptr())
    with atomic_file(path) as temporary:
        try:
            save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # the library wraps "No space left on device"
            raise OSError(None, str(error)) from error
        temporary.chmod(0o644)  # the library's files are readable by their owner only


def write_streamed(
    path: str | Path,
    table: Mapping[str, tuple["torch.dtype", tuple[int, ...]]],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, with one tensor at a time in memory.

    The format: 8 bytes with the length of a JSON table, the table, and the numbers one after the
    other.

    Args:
        path: the file.
        table: dtype and shape of each tensor, in the order of `tensors`. Dtypes of more bytes come
            first, so that all tensors are aligned.
        tensors: names and tensors.
        metadata: texts by name.

    Raises:
        ValueError: tensors that are not those of the table, or a table in another order.
    """
    import torch

    head: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end, before = 0, None
    for name, (dtype, shape) in table.items():
        if before is not None and dtype.itemsize > before:
            raise ValueError(f"{name}: numbers of {dtype.itemsize} bytes after those of {before}")
        begin, before = end, dtype.itemsize
        end += math.prod(shape) * dtype.itemsize
        code = DTYPE_CODES[str(dtype).removeprefix("torch.")]
        head[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        expected = iter(table.items())
        for name, tensor in tensors:
            entry, due = (name, (tensor.dtype, tuple(tensor.shape))), next(expected, None)
            if entry != due:
                raise ValueError(f"{entry} came where {due} was announced")
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(values.numpy().data)
        if left := next(expected, None):
            raise ValueError(f"{left[0]} was announced and did not come")


DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPE_CODES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL"}
DTYPE_CODES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
"""torch's names of dtypes -> those of safetensors."""


def read_tensors(path: str | Path) -> dict[str, "torch.Tensor"]:
    """Read the tensors of a safetensors file, memory-mapped; errors as in `open_tensors`."""
    return open_tensors(path)[0]


def open_tensors(path: str | Path) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """Read the tensors, memory-mapped, and the metadata of a safetensors file.

    Raises:
        UserError: a missing, truncated or foreign file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected a safetensors file there") from error
    except (SafetensorError, ValueError, OSError) as error:
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder: expected a safetensors file there") from error
        kind = None if is_safetensors(path) else another_kind(path)
        reason = f": {kind}" if kind else f" ({error}): it may be truncated; copy it again"
        raise UserError(f"{path} is not a whole safetensors file{reason}") from error


def hash_bytes(*parts: bytes | str) -> str:
    """Return the SHA-256 in hexadecimal of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def hash_json(value: object) -> str:
    """Hash a JSON-serialisable value, independent of key order."""
    return hash_bytes(json.dumps(value, sort_keys=True, default=str))


def hash_tensors(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """Hash the names, shapes, dtypes and bytes of a state dict, independent of its order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
