"""GGUF files: weights quantised in blocks, read tensor by tensor through the package `gguf`
(github.com/ggml-org/ggml, docs/gguf.md).

A block of a row becomes numbers by one scale d, or by eight small ones (d, m float16; q, s, t small
whole numbers of the block):

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

MAGIC = b"GGUF"
_SHAPE = "comfy.gguf.orig_shape."
"""Notes of ComfyUI's converter: the shape of a tensor whose rows do not divide into blocks, and
which it stored in another."""
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
"""Kinds of notes by their numbers in the file, and how many bytes one takes."""
_PLAIN = ("F16", "F32", "F64")


def is_gguf(path: str | Path) -> bool:
    """Whether a file says that it is one."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class GGUF:
    """A file: its notes, and its tensors, which are made when they are asked for; kinds: how each
    is stored, such as "Q4_K".
    """

    notes: dict[str, Any]
    tensors: dict[str, LazyTensor]
    kinds: dict[str, str]


def read_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> GGUF:
    """Opens a file; nothing but its table is read. Tensors are made in `dtype`, those that are not
    quantised too.

    `UserError` for a file that is missing, truncated or no GGUF, and for kinds of blocks that the
    package cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a GGUF file there")
    if not is_gguf(path):
        raise UserError(
            f"{path} is not a GGUF file (it does not begin with {MAGIC.decode()}): give one, or a .safetensors file"
        )
    reader = _opened(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    try:
        notes = {name: field.contents() for name, field in fields.items()}
    except Exception as error:
        raise _damaged(path, error) from error
    tensors, kinds = {}, {}
    for found in reader.tensors:
        kinds[found.name] = found.tensor_type.name
        tensors[found.name] = _lazy(path, found, notes.get(_SHAPE + found.name), dtype)
    if not tensors:
        raise UserError(
            f"{path} holds no tensors: it may be a vocabulary only; give a file with weights"
        )
    return GGUF(notes, tensors, kinds)


def _opened(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"{path} is read with the package gguf, which is not installed: pip install 'sfumato[gguf]'"
        ) from error
    try:
        _check_lists(path)
        return GGUFReader(path)
    except Exception as error:  # a damaged table leads anywhere
        raise _damaged(path, error) from error


def _check_lists(path: Path) -> None:
    """ValueError for a list among the notes that is longer than the file: the package would count
    its way through it.
    """
    with path.open("rb") as file:
        left = path.stat().st_size

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
            if file.tell() + count > left:
                raise ValueError(f"a note of {count} bytes in a file of {left}")
            file.seek(count, 1)

        file.read(4)
        # of a machine with the other order of bytes, which the package knows
        if not number("<I") & 0xFFFF:
            return
        _, notes = number("<Q"), number("<Q")
        for _ in range(notes):
            skip(_TEXT)
            skip(number("<I"))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{path} is not a whole GGUF file of a known kind ({type(error).__name__}: {reason}): it may be truncated, or newer than the "
        "installed package gguf; copy or download it again"
    )


def _lazy(path: Path, found: Any, noted: Any, dtype: torch.dtype) -> LazyTensor:
    """One tensor; GGUF counts dimensions from the innermost."""
    kind, shape = found.tensor_type.name, tuple(int(n) for n in reversed(found.shape.tolist()))
    if noted is not None:
        given = tuple(int(n) for n in noted)
        if torch.Size(given).numel() != torch.Size(shape).numel():
            raise UserError(
                f"{path}: {found.name} has {shape} and its note {_SHAPE}* says {given}: it may be damaged; copy it again"
            )
        shape = given
    if kind in ("I8", "I16", "I32", "I64"):
        raise UserError(
            f"{path}: {found.name} holds whole numbers ({kind}): expected weights, quantised or not"
        )
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(
            np.zeros((1, GGML_QUANT_SIZES[found.tensor_type][1]), np.uint8), found.tensor_type
        )
    except NotImplementedError as error:
        raise UserError(
            f"{path}: {found.name} is stored as {kind}, which the installed package gguf cannot read: expected Q8_0, Q4_K or such"
        ) from error

    def load() -> Tensor:
        values = found.data if kind in _PLAIN else dequantize(found.data, found.tensor_type)
        # a copy: the file is mapped to be read only
        return torch.from_numpy(np.array(values)).reshape(shape).to(dtype)

    return LazyTensor(dtype, shape, load)
