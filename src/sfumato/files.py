"""Files that are whole or absent: atomic writes, JSON with clear errors, content hashes.

A writer fills a temporary name in the same folder, calls fsync and renames; a full disk or a kill leaves the old file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    import torch


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends well, removes it when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"could not write {path}: {error.strerror or error}; the file that was there is unchanged: free some space or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the name `path` (replacing what was there) when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise UserError(
            f"could not write {path}: {error.strerror or error}; what was there is unchanged: free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Writes JSON atomically, two-space indented, with a final newline. NaN is refused: it is not JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; a missing or broken one is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected a JSON file there") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it may be truncated; copy or download it again") from error


def write_tensors(path: str | Path, tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically (contiguous copies on the CPU; `format: pt` is what diffusers expects)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # the library wraps "No space left on device"
            raise OSError(None, str(error)) from error
        temporary.chmod(0o644)  # the library makes files that only their owner can read


def read_tensors(path: str | Path) -> dict[str, "torch.Tensor"]:
    """Reads a safetensors file (memory-mapped); a missing, truncated or foreign file is a `UserError` that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected a safetensors file there") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): it may be truncated; copy or download it again") from error


def hash_bytes(*parts: bytes | str) -> str:
    """SHA-256 in hexadecimal of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def hash_json(value: object) -> str:
    """Hash of a JSON-serialisable value, independent of key order."""
    return hash_bytes(json.dumps(value, sort_keys=True, default=str))


def hash_tensors(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """Hash of names, shapes, dtypes and bytes of a state dict, independent of its order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
