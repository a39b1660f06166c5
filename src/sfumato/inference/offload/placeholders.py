"""Layers whose weights are elsewhere: what stands for them, and how they are had nevertheless.

A placeholder has a weight's shape and dtype and takes no memory: on the meta device, or, where a
device is to be seen, a NaN that counts as all numbers. To compute with one is an error, and no
wrong number. Who asks the layer for its weight by name is given a copy, since nobody knows how long
it will be held; who reads a state dict through `read_through` is given one tensor after the other.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.inference.offload.transfer import padded
from sfumato.io import host_memory

MARK = "_sfumato_stream"
"""What a placeholder has its layer and name in, and a module what streams its weights."""


class Layer:
    """One layer's weights: as they are stored, and as they are computed with."""

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
        self.dtypes = {key: computed(tensor, dtype) for key, tensor in stored.items()}
        # a table of which a few rows are read, and their pages only
        self.by_rows = mapped and by_rows
        self.size = (
            0
            if self.by_rows
            else sum(padded(t.numel() * self.dtypes[key].itemsize) for key, t in stored.items())
        )
        self.away = {key: placeholder(t.shape, self.dtypes[key], at) for key, t in stored.items()}
        for key, parameter in self.away.items():
            setattr(parameter, MARK, (self, key))
        self.stays = False  # from pass to pass
        self.kept: dict[str, nn.Parameter] | None = None  # a copied one that stays
        # in the ring: the weights, and what to wait for
        self.copied: tuple[dict[str, nn.Parameter], Any] | None = None
        self.looked = False  # whether NaN and infinity were looked for


def placeholder(shape: torch.Size, dtype: torch.dtype, at: torch.device | None) -> nn.Parameter:
    """What stands for a weight that is not there; with a device, one that lies there."""
    if at is None:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    return nn.Parameter(
        torch.full((), torch.nan, dtype=dtype, device=at).expand(shape), requires_grad=False
    )


def computed(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a weight is computed with; what counts stays a whole number."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def listed(
    layer: Layer, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """In a state dict stand placeholders that know their source: see `read_through`."""
    for key, parameter in layer.away.items():
        if not layer.mapped:
            state[prefix + key] = parameter


@cache
def with_access(kind: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """The same kind of layer, whose weights can be had by name at any time."""

    def access(key: str) -> property:
        def get(module: nn.Module) -> nn.Parameter:
            found = module._parameters[key]
            assert found is not None
            mark = getattr(found, MARK, None)  # of a placeholder
            return found if mark is None else module.__dict__[MARK].by_name(*mark)

        return property(get)

    return type(
        kind.__name__,
        (kind,),
        {
            **{key: access(key) for key in keys},
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
        },
    )


class _Through(Mapping[str, Tensor]):
    """A state dict of which only one tensor is in memory at a time."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors, self._files = tensors, host_memory.Mapped()

    def __getitem__(self, key: str) -> Tensor:
        found = self._tensors[key]
        layer, name = getattr(found, MARK, (None, ""))
        stored = found if layer is None else layer.stored[name]
        value = stored.to(found.dtype, copy=True)
        if stored in self._files:
            host_memory.drop(stored)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_through(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A streamed network's `state_dict` to be read tensor by tensor: each is a copy, in the dtype
    that is computed in, on the CPU for those that are not on the device.
    """
    return _Through(tensors)
