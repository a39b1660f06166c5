"""GGUF files: weights quantised in blocks, read tensor by tensor with the package `gguf`.

A block of a row is dequantised with one scale d, or with eight (d, m float16; q, s, t small
integers of the block; github.com/ggml-org/ggml, docs/gguf.md):

    Q8_0   32 numbers in 34 bytes     w = d q
    Q4_0   32 numbers in 18 bytes     w = d (q - 8)
    Q4_K   256 numbers in 144 bytes   w = d s q - m t,   s and t one for each 32

Files of diffusion models hold the original names of one network, with or without
`model.diffusion_model.` (stable-diffusion.cpp, ComfyUI).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.lazy_tensor import LazyTensor
from sfumato.errors import UserError
from sfumato.io.signatures import another_kind, first_bytes

MAGIC = b"GGUF"
_SHAPE = "comfy.gguf.orig_shape."
"""Metadata of ComfyUI's converter: the shape of a tensor that is stored in another one.

Its rows do not divide into blocks."""
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a metadata value -> its size in bytes."""
_TEXT, _LIST = 8, 9
_PLAIN = ("F16", "F32", "F64")


def is_gguf(path: str | Path) -> bool:
    """Return True for a file that begins with GGUF's magic number."""
    return first_bytes(path, len(MAGIC)) == MAGIC


@dataclass(frozen=True)
class GGUF:
    """A GGUF file.

    Attributes:
        notes: the metadata.
        tensors: dequantised when they are loaded.
        kinds: storage type by tensor, such as "Q4_K".
    """

    notes: dict[str, Any]
    tensors: dict[str, LazyTensor]
    kinds: dict[str, str]


def read_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> GGUF:
    """Open a file; only its table is read.

    Args:
        path: the file.
        dtype: of all loaded tensors, also of those that are not quantised.

    Raises:
        UserError: a file that is missing, truncated or no GGUF, and types of blocks that the
            package cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a GGUF file there")
    if not is_gguf(path):
        kind = another_kind(path) or "give one, or a .safetensors file"
        raise UserError(
            f"{path} is not a GGUF file (it does not begin with {MAGIC.decode()}): {kind}"
        )
    reader = _opened(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    try:
        notes = {name: field.contents() for name, field in fields.items()}
    except Exception as error:
        raise _damaged(path, error) from error
    if not reader.tensors:
        raise UserError(
            f"{path} holds no tensors: it may be a vocabulary only; give a file with weights"
        )
    kinds = {entry.name: entry.tensor_type.name for entry in reader.tensors}
    tensors = {
        entry.name: _lazy(path, entry, notes.get(_SHAPE + entry.name), dtype)
        for entry in reader.tensors
    }
    return GGUF(notes, tensors, kinds)


def _opened(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"{path} is read with the package gguf, which is not installed: "
            "pip install 'sfumato[gguf]'"
        ) from error
    try:
        _check_lists(path)
        return GGUFReader(path)
    except Exception as error:  # a damaged table leads anywhere
        raise _damaged(path, error) from error


def _check_lists(path: Path) -> None:
    """Raise ValueError for metadata lists longer than the file, which the package would read."""
    with path.open("rb") as file:
        size = path.stat().st_size

        def number(kind: str) -> int:
            data = file.read(struct.calcsize(kind))
            return struct.unpack(kind, data)[0]

        def skip(kind: int) -> None:
            if kind == _TEXT:
                jump(number("<Q"))
            elif kind == _LIST:
                inner, count = number("<I"), number("<Q")
                if inner in _SIZES:
                    jump(count * _SIZES[inner])
                else:
                    for _ in range(count):
                        skip(inner)
            else:
                jump(_SIZES[kind])

        def jump(count: int) -> None:
            if file.tell() + count > size:
                raise ValueError(f"a note of {count} bytes in a file of {size}")
            file.seek(count, 1)

        file.read(4)
        # the version of a big-endian file, which the package reads
        if not number("<I") & 0xFFFF:
            return
        _, notes = number("<Q"), number("<Q")
        for _ in range(notes):
            skip(_TEXT)
            skip(number("<I"))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{path} is not a whole GGUF file of a known kind ({type(error).__name__}: {reason}): "
        "it may be truncated, or newer than the installed package gguf; copy or download it again"
    )


def _lazy(path: Path, entry: Any, original_shape: Any, dtype: torch.dtype) -> LazyTensor:
    """Return one tensor. GGUF lists dimensions from the innermost on."""
    name, kind = entry.name, entry.tensor_type
    shape = tuple(int(n) for n in reversed(entry.shape.tolist()))
    if original_shape is not None:
        stored, shape = shape, tuple(int(n) for n in original_shape)
        if torch.Size(shape).numel() != torch.Size(stored).numel():
            raise UserError(
                f"{path}: {name} has {stored} and its note {_SHAPE}* says {shape}: "
                "it may be damaged; copy it again"
            )
    if kind.name in ("I8", "I16", "I32", "I64"):
        raise UserError(
            f"{path}: {name} holds whole numbers ({kind.name}): expected weights, quantised or not"
        )
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: {name} is stored as {kind.name}, which the installed package gguf cannot "
            "read: expected Q8_0, Q4_K or such"
        ) from error

    def load() -> Tensor:
        values = entry.data if kind.name in _PLAIN else dequantize(entry.data, kind)
        # a copy: the file is mapped read-only
        return torch.from_numpy(np.array(values)).reshape(shape).to(dtype)

    return LazyTensor(dtype, shape, load)
