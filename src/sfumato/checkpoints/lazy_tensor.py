"""Tensors that are read when they are asked for.

They are the only carrier of weights between files and models. Files larger than the memory are
read, renamed, cast and written one tensor at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.atomic import write_streamed
from sfumato.io.safetensors import EIGHTS, aside, require_finite, scale_of, scaled, storable


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's dtype and shape, and a function that reads or makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


LazyTensors = Mapping[str, LazyTensor]


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are in memory, or mapped to a file."""

    def of(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    return {key: of(tensor) for key, tensor in tensors.items()}


def load_tensors(table: LazyTensors) -> dict[str, Tensor]:
    """All of them at once."""
    return {key: lazy.load() for key, lazy in table.items()}


def checked_finite(table: LazyTensors, where: object) -> dict[str, LazyTensor]:
    """The same tensors; NaN and infinity are a `UserError` when a tensor is loaded.

    The last one is kept: what is split into several is asked for several times.
    """
    last: dict[str, Tensor] = {}

    def of(key: str, lazy: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            if key not in last:
                last.clear()
                value = lazy.load()
                require_finite({key: value}, where)
                last[key] = value
            return last[key]

        return LazyTensor(lazy.dtype, lazy.shape, load)

    return {key: of(key, lazy) for key, lazy in table.items()}


def apply_scales(table: LazyTensors) -> dict[str, LazyTensor]:
    """Weights of eight bits that have a scale, multiplied by it, in bfloat16.

    bfloat16 holds every number of eight bits, but for the scale's rounding; see
    `weights.unscaled`.
    """
    beside = aside({key: lazy.dtype for key, lazy in table.items()})

    def of(key: str, lazy: LazyTensor) -> LazyTensor:
        scale = scale_of(key, table) if lazy.dtype in EIGHTS else None
        if scale is None:
            return lazy
        return LazyTensor(
            torch.bfloat16,
            lazy.shape,
            lambda: scaled(key, lazy.load(), table[scale].load(), torch.bfloat16),
        )

    return {key: of(key, lazy) for key, lazy in table.items() if key not in beside}


# ---- storage -------------------------------------------------------------------------------------


def cast(table: LazyTensors, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Weights in `dtype` (None: their own); `NumericalError` when one is loaded that does not
    fit.
    """
    storable({}, dtype)  # which refuses whole numbers
    return {
        key: _cast(
            key, lazy, dtype if dtype is not None and lazy.dtype.is_floating_point else lazy.dtype
        )
        for key, lazy in table.items()
    }


def _cast(key: str, lazy: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(
        dtype,
        lazy.shape,
        lambda: storable({key: lazy.load()}, dtype if dtype.is_floating_point else None)[key],
    )


def cast_for_storage(table: LazyTensors, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Weights as a converted file holds them (None: in their own dtype).

    With eight bits only matrices and convolutions are stored so, and the rest in bfloat16: vectors
    and tables are few, and count.

    Raises:
        NumericalError: when a tensor is loaded that has NaN or infinity in its new dtype.
    """
    if dtype not in EIGHTS:
        return cast(table, dtype)
    small = {key: lazy for key, lazy in table.items() if not is_fp8_storable(key, lazy.shape)}
    return {
        key: cast({key: lazy}, torch.bfloat16 if key in small else dtype)[key]
        for key, lazy in table.items()
    }


def is_fp8_storable(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is stored in eight bits where those are asked for."""
    return len(shape) > 1 and key.endswith(".weight")


def quantize_scaled(
    table: LazyTensors, dtype: torch.dtype = torch.float8_e4m3fn
) -> dict[str, LazyTensor]:
    """Matrices and convolutions in eight bits with a scale each (`scale_weight`).

    The largest number of each becomes the format's largest, so that weights which are a hundred
    thousand times smaller than another layer's keep their digits.
    """
    quantized: dict[str, LazyTensor] = {}
    for key, lazy in table.items():
        if is_fp8_storable(key, lazy.shape) and lazy.dtype.is_floating_point:
            quantized |= _with_scale(key, lazy, dtype)
        else:
            quantized |= cast({key: lazy}, torch.bfloat16)
    return quantized | {"scaled_fp8": LazyTensor(dtype, (0,), lambda: torch.empty(0, dtype=dtype))}


def _with_scale(key: str, lazy: LazyTensor, dtype: torch.dtype) -> dict[str, LazyTensor]:
    largest = torch.finfo(dtype).max

    def scale() -> Tensor:
        """The smallest scale with which everything fits, rounding and all; 1 for a weight of
        zeros.
        """
        top = (
            float(storable({key: lazy.load()}, None)[key].float().abs().max())
            if lazy.shape and 0 not in lazy.shape
            else 0.0
        )
        return torch.tensor(top / largest * (1 + 1e-6) if top > 0 else 1.0)

    def weight() -> Tensor:
        return storable({key: lazy.load().float() / scale()}, dtype)[key]

    return {
        key: LazyTensor(dtype, lazy.shape, weight),
        f"{key.removesuffix('weight')}scale_weight": LazyTensor(torch.float32, (), scale),
    }


def write_file(
    path: str | Path,
    table: LazyTensors,
    metadata: Mapping[str, str] | None = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file, one tensor at a time. `done` is called after each."""
    if Path(path).suffix != ".safetensors":
        raise UserError(
            f"{path}: single files are written as .safetensors only; choose such a name"
        )
    # which keeps the order of those of one size
    names = sorted(table, key=lambda name: -table[name].dtype.itemsize)

    def loaded() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, table[name].load()
            done()

    if "__metadata__" in table:
        raise UserError(
            "a tensor called __metadata__ cannot be stored: safetensors keeps its notes under this name"
        )
    write_streamed(
        path, {name: (table[name].dtype, table[name].shape) for name in names}, loaded(), metadata
    )
