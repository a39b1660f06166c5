"""Placeholder parameters for offloaded layers, and access to the real ones on demand.

A placeholder has a weight's shape and dtype and takes no memory. It lies on the meta device, or is
an expanded NaN where the parameter must show its network's device. Computing with one is an error
or gives NaN, never a wrong number. Reading a layer's weight by name returns a copy, since it may be
kept for any time. `materialized` reads a state dict one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.inference.offload.transfer import aligned_size
from sfumato.io import host_memory

MARK = "_sfumato_stream"
"""Attribute: (layer, key) of a placeholder, the `WeightStreamer` of a module."""


class OffloadedLayer:
    """One layer's weights: as stored, and the dtypes that they are computed in."""

    def __init__(
        self,
        name: str,
        stored: dict[str, Tensor],
        dtype: torch.dtype,
        mapped: bool,
        by_rows: bool,
        at: torch.device | None,
    ):
        self.name, self.stored, self.mapped = name, stored, mapped
        self.dtypes = {key: compute_dtype(tensor, dtype) for key, tensor in stored.items()}
        # An embedding table: only the pages of the rows in use are read.
        self.by_rows = mapped and by_rows
        sizes = (aligned_size(t.numel() * self.dtypes[key].itemsize) for key, t in stored.items())
        self.size = 0 if self.by_rows else sum(sizes)
        self.placeholders = {
            key: placeholder(t.shape, self.dtypes[key], at) for key, t in stored.items()
        }
        for key, parameter in self.placeholders.items():
            setattr(parameter, MARK, (self, key))
        self.stays = False  # resident from pass to pass
        self.kept: dict[str, nn.Parameter] | None = None  # copies outside the ring
        # in the ring: the weights, and the argument of `Transfer.wait`
        self.copied: tuple[dict[str, nn.Parameter], Any] | None = None
        self.checked = False  # for NaN and infinity


def placeholder(shape: torch.Size, dtype: torch.dtype, at: torch.device | None) -> nn.Parameter:
    """Return a placeholder, on the meta device or as an expanded NaN on a device."""
    if at is None:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    nan = torch.full((), torch.nan, dtype=dtype, device=at)
    return nn.Parameter(nan.expand(shape), requires_grad=False)


def compute_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a weight is computed in; integers stay integers."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def put_placeholders(
    layer: OffloadedLayer, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """State dict hook: put placeholders, which `materialized` resolves."""
    for key, parameter in layer.placeholders.items():
        if not layer.mapped:
            state[prefix + key] = parameter


@cache
def with_weight_access(kind: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """Subclass a layer class so that its weights can be read by name at any time."""

    def access(key: str) -> property:
        def get(module: nn.Module) -> nn.Parameter:
            parameter = module._parameters[key]
            assert parameter is not None
            mark = getattr(parameter, MARK, None)  # of a placeholder
            return parameter if mark is None else module.__dict__[MARK].by_name(*mark)

        return property(get)

    members = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**{key: access(key) for key in keys}, **members})


class _Materialized(Mapping[str, Tensor]):
    """State dict with one tensor in memory at a time."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors, self._files = tensors, host_memory.MappedRanges()

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        layer, name = getattr(tensor, MARK, (None, ""))
        stored = tensor if layer is None else layer.stored[name]
        value = stored.to(tensor.dtype, copy=True)
        if stored in self._files:
            host_memory.drop_pages(stored)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def materialized(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Wrap the `state_dict` of an offloaded network to read it tensor by tensor.

    Each tensor is a copy in its compute dtype, on the CPU unless it is resident on the device.
    """
    return _Materialized(tensors)
