"""Lazy tensors: dtype, shape, and a function that reads or computes the values.

They carry weights between files and models. Files larger than the memory are read, renamed, cast
and written one tensor at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.atomic import write_streamed
from sfumato.io.safetensors import EIGHTS, require_finite, scale_keys, scale_of, scaled, storable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's dtype and shape, and a function that reads or computes it."""

    dtype: torch.dtype
    shape: Shape
    load: Callable[[], Tensor]

    def map(
        self, function: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: Shape | None = None
    ) -> "LazyTensor":
        """Return the tensor that `function` makes of this one when it is loaded.

        Args:
            function: this tensor -> the new one.
            dtype: of the new tensor.
            shape: of the new tensor; None: this one's.
        """
        shape = self.shape if shape is None else shape
        return LazyTensor(dtype, shape, lambda: function(self.load()))


LazyTensors = Mapping[str, LazyTensor]


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Wrap tensors that are in memory or mapped from a file."""

    def wrap(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    return {key: wrap(tensor) for key, tensor in tensors.items()}


def load_tensors(table: LazyTensors) -> dict[str, Tensor]:
    """Load all tensors at once."""
    return {key: lazy.load() for key, lazy in table.items()}


def checked_finite(table: LazyTensors, where: object) -> dict[str, LazyTensor]:
    """Return the same tensors; NaN and infinity are a `UserError` when a tensor is loaded.

    The last tensor is cached: one that is split into several parameters is loaded for each.
    """
    last: dict[str, Tensor] = {}

    def check(key: str, lazy: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            if key not in last:
                last.clear()
                value = lazy.load()
                require_finite({key: value}, where)
                last[key] = value
            return last[key]

        return LazyTensor(lazy.dtype, lazy.shape, load)

    return {key: check(key, lazy) for key, lazy in table.items()}


def apply_scales(table: LazyTensors, dtype: torch.dtype = torch.bfloat16) -> dict[str, LazyTensor]:
    """Multiply weights of eight bits by their scales.

    bfloat16 holds every number of eight bits, but for the scale's rounding.

    Args:
        table: the tensors of a file; scales and what belongs to them are left out of the result.
        dtype: of the products. Weights without a scale keep their own.

    Raises:
        UserError: weights that ComfyUI's marks say are of another format.
    """
    beside = scale_keys({key: lazy.dtype for key, lazy in table.items()})
    for key in beside:
        if key.endswith(".comfy_quant"):
            _check_mark(key, table[key].load())

    def multiply(key: str, lazy: LazyTensor) -> LazyTensor:
        scale = scale_of(key, table) if lazy.dtype in EIGHTS else None
        if scale is None:
            return lazy
        return lazy.map(lambda weight: scaled(key, weight, table[scale].load(), dtype), dtype)

    return {key: multiply(key, lazy) for key, lazy in table.items() if key not in beside}


def _check_mark(key: str, mark: Tensor) -> None:
    """Check ComfyUI's mark of a quantised layer: JSON in bytes, with the format.

    Raises:
        UserError: a format without eight bits and one scale.
    """
    try:
        kind = json.loads(bytes(mark.to(torch.uint8).tolist()))["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{key} is no mark of a quantised layer ({type(error).__name__}): "
            "the file may be damaged; copy it again"
        ) from error
    if kind not in ("float8_e4m3fn", "float8_e5m2"):
        raise UserError(
            f"{key}: weights of format {kind!r} are not supported: expected float8_e4m3fn or "
            "float8_e5m2 with scale_weight or weight_scale; use a file in bf16, fp16 or fp8"
        )


def unscaled(
    tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`apply_scales` to tensors in memory."""
    return load_tensors(apply_scales(from_tensors(tensors), dtype))


# ---- storage -------------------------------------------------------------------------------------


def cast(table: LazyTensors, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Cast weights to `dtype` (None: their own); integers stay integers.

    Raises:
        UserError: a dtype of integers.
        NumericalError: when a weight is loaded that is not finite in its new dtype.
    """
    storable({}, dtype)  # checks dtype
    return {key: _cast(key, lazy, dtype) for key, lazy in table.items()}


def _cast(key: str, lazy: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    if dtype is None or not lazy.dtype.is_floating_point:
        dtype = lazy.dtype
    stored = dtype if dtype.is_floating_point else None
    return lazy.map(lambda value: storable({key: value}, stored)[key], dtype)


def cast_for_storage(
    table: LazyTensors, dtype: torch.dtype | None, wide: tuple[str, ...] = ()
) -> dict[str, LazyTensor]:
    """Cast weights as a converted file holds them.

    With eight bits only matrices and convolutions are stored so. Vectors and tables are few, and
    precision matters there: they are stored in bfloat16.

    Args:
        table: the weights.
        dtype: None: their own.
        wide: beginnings of keys that are stored in bfloat16 instead of eight bits.

    Raises:
        NumericalError: when a tensor is loaded that has NaN or infinity in its new dtype.
    """
    if dtype not in EIGHTS:
        return cast(table, dtype)
    return {
        key: _cast(
            key,
            lazy,
            dtype if _fits_fp8(key, lazy) and not key.startswith(wide) else torch.bfloat16,
        )
        for key, lazy in table.items()
    }


def _fits_fp8(key: str, lazy: LazyTensor) -> bool:
    """Return True for weights that may be stored in eight bits."""
    return len(lazy.shape) > 1 and key.endswith(".weight")


def quantize_scaled(
    table: LazyTensors, dtype: torch.dtype = torch.float8_e4m3fn
) -> dict[str, LazyTensor]:
    """Quantise matrices and convolutions to eight bits with a scale each (`scale_weight`).

    The largest number of each becomes the format's largest, so that weights which are a hundred
    thousand times smaller than another layer's keep their digits.
    """
    quantized: dict[str, LazyTensor] = {}
    for key, lazy in table.items():
        if _fits_fp8(key, lazy) and lazy.dtype.is_floating_point:
            quantized |= _with_scale(key, lazy, dtype)
        else:
            quantized |= cast({key: lazy}, torch.bfloat16)
    return quantized | {"scaled_fp8": LazyTensor(dtype, (0,), lambda: torch.empty(0, dtype=dtype))}


def _with_scale(key: str, lazy: LazyTensor, dtype: torch.dtype) -> dict[str, LazyTensor]:
    largest = torch.finfo(dtype).max

    def scale(weight: Tensor) -> Tensor:
        """Return the least scale with which all numbers fit when rounded; 1 for zeros."""
        numbers = storable({key: weight}, None)[key].float().abs()
        top = float(numbers.max()) if numbers.numel() else 0.0
        return torch.tensor(top / largest * (1 + 1e-6) if top > 0 else 1.0)

    def quantize(weight: Tensor) -> Tensor:
        return storable({key: weight.float() / scale(weight)}, dtype)[key]

    scale_key = f"{key.removesuffix('weight')}scale_weight"
    return {
        key: lazy.map(quantize, dtype),
        scale_key: lazy.map(scale, torch.float32, ()),
    }


def write_file(
    path: str | Path,
    table: LazyTensors,
    metadata: Mapping[str, str] | None = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file, one tensor at a time.

    Args:
        path: the file; its name ends in .safetensors.
        table: the tensors.
        metadata: texts by name.
        done: called after each tensor.

    Raises:
        UserError: another ending, or a tensor with the name of safetensors' metadata.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(
            f"{path}: single files are written as .safetensors only; choose such a name"
        )
    if "__metadata__" in table:
        raise UserError(
            "a tensor called __metadata__ cannot be stored: "
            "safetensors keeps its metadata under this name"
        )
    # Large dtypes first, for alignment; the order within a dtype is kept.
    names = sorted(table, key=lambda name: -table[name].dtype.itemsize)

    def loaded() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, table[name].load()
            done()

    kinds = {name: (table[name].dtype, table[name].shape) for name in names}
    write_streamed(path, kinds, loaded(), metadata)
