"""Weaker copies of a network: the very same parameters, with some layers replaced.

A copy costs next to no memory and follows the original's weights when they are trained or loaded.
It is made once a network: runs that are guided by the same copy share its forward passes.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sfumato.batching import DenoiserLike
from sfumato.errors import UserError, unknown
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance_models import Baseline, Pair
from sfumato.types import Conditioning

FindLayers = Callable[[nn.Module], Iterator[tuple[str, nn.Module]]]
"""network -> (name of a layer, its replacement), for all layers that may be replaced."""

_RANGE = re.compile(r"(?<=\.)(\d+)-(\d+)(?=\.|$)")

# A cache and not a state: its entries can be made again, and go when their denoiser goes.
_CACHE: WeakKeyDictionary[
    Denoiser, dict[tuple[FindLayers, tuple[str, ...]], tuple[list[Tensor], Denoiser]]
] = WeakKeyDictionary()


@dataclass(frozen=True)
class ReplacedLayers(Baseline):
    """The denoiser with some layers replaced, under the same conditioning.

    Attributes:
        find: Finds the layers that may be replaced.
        kind: Kind of these layers, for errors.
    """

    layers: tuple[str, ...] = ()

    find: ClassVar[FindLayers]
    kind: ClassVar[str]

    def pair(
        self,
        denoiser: DenoiserLike,
        conditioning: Conditioning,
        negative: Conditioning,
        guide_model: DenoiserLike | None,
    ) -> Pair:
        """Return the changed denoiser with the conditioning."""
        return with_replaced_layers(denoiser, self.layers, self.find, self.kind), conditioning


def tensors(network: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def clone_sharing_weights(network: nn.Module) -> nn.Module:
    """Return new modules with the very same parameters and buffers."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors(network)})


def replace_layers(
    network: nn.Module, layers: Sequence[str], find: FindLayers, kind: str
) -> nn.Module:
    """Return a copy in which replacements stand at and below the named layers.

    Where replaceable layers are nested, the outermost is replaced.

    Args:
        network: The network to copy.
        layers: Names of modules, ranges "a.3-5" included; none for `default_layers`.
        find: Finds the layers that may be replaced.
        kind: Kind of these layers, for errors.

    Raises:
        UserError: For a layer with nothing to replace at or below it; lists the layers that have.
    """
    clone = clone_sharing_weights(network)
    replacements = dict(find(clone))
    blocks = [name for name, module in clone.named_modules() if hasattr(module, "streams")]
    layers = layers or default_layers(replacements, blocks)
    chosen: set[str] = set()
    for layer in (one for name in layers for one in expand_range(name)):
        inside = {name for name in replacements if _within(name, layer)}
        if not inside:
            raise unknown(kind, layer, collapse_ranges(_nameable(clone, replacements)))
        chosen |= inside
    if not chosen:
        listed = ", ".join(collapse_ranges(_nameable(clone, replacements)))
        listed = listed or "this network has none"
        raise UserError(f"no layers to change: name at least one {kind} ({listed})")
    for name in chosen:
        if not any(name != other and _within(name, other) for other in chosen):
            clone.set_submodule(name, replacements[name])
    return clone


def default_layers(replaceable: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """Return the layers to replace where none are named: the middle of the network.

    Of a transformer, the block in the middle of those with replaceable layers, single ones after
    double ones. Of a U-Net, the layers of the middle block; without any there, those of the last
    block of the way down; else the middle one of all. Attention goes before other layers.

    Args:
        replaceable: Names of the layers that may be replaced.
        blocks: Names of a transformer's blocks, which have the attribute `streams`; none for a
            U-Net.
    """
    names = list(replaceable)
    around = [block for block in blocks if any(_within(name, block) for name in names)]
    if around:
        return [around[len(around) // 2]]
    names = [name for name in names if "attention" in name or "attn" in name] or names
    for prefix in ("mid_block.", *(f"down_blocks.{i}." for i in reversed(range(10)))):
        inside = [name for name in names if name.startswith(prefix)]
        if inside:
            return inside
    return names[len(names) // 2 :][:1]


def with_replaced_layers(
    denoiser: DenoiserLike, layers: Sequence[str], find: FindLayers, kind: str
) -> Denoiser:
    """Return the denoiser with a network of `replace_layers`.

    It is the same object for the same arguments, as long as the network's tensors stay.
    """
    if not isinstance(denoiser, Denoiser):
        raise UserError(
            f"{type(denoiser).__name__} has no network to change: "
            "guidance by a changed network needs a Denoiser"
        )
    network = denoiser.network
    cached, key, current = _CACHE.setdefault(denoiser, {}), (find, tuple(layers)), tensors(network)
    if key in cached:
        before, weaker = cached[key]
        same = [*map(id, before)] == [*map(id, current)]
        if same and weaker.network.training == network.training:
            return weaker
    weaker = replace(denoiser, network=replace_layers(network, layers, find, kind))
    cached[key] = current, weaker
    return weaker


def expand_range(name: str) -> Iterator[str]:
    """Yield a.3.b, a.4.b, a.5.b for a.3-5.b; another name as it is."""
    numbers = _RANGE.search(name)
    if numbers is None or int(numbers[1]) > int(numbers[2]):
        yield name
        return
    for k in range(int(numbers[1]), int(numbers[2]) + 1):
        yield from expand_range(f"{name[: numbers.start(1)]}{k}{name[numbers.end() :]}")


def collapse_ranges(names: Iterable[str]) -> list[str]:
    """Return a.3-5.b for a.3.b, a.4.b, a.5.b: the inverse of `expand_range`."""
    paths = [tuple(name.split(".")) for name in names]
    for position in reversed(range(max(map(len, paths), default=0))):
        numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
        collapsed = []
        for parts in paths:
            if len(parts) > position and parts[position].isdigit():
                numbers.setdefault((parts[:position], parts[position + 1 :]), []).append(
                    int(parts[position])
                )
            else:
                collapsed.append(parts)
        for (before, after), values in numbers.items():
            for _, run in groupby(enumerate(sorted(values)), lambda pair: pair[1] - pair[0]):
                first, *rest = (number for _, number in run)
                collapsed.append((*before, f"{first}-{rest[-1]}" if rest else f"{first}", *after))
        paths = collapsed
    return sorted(".".join(parts) for parts in paths)


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")


def _nameable(network: nn.Module, replaceable: Iterable[str]) -> list[str]:
    """Return the names that can be given: layers that can be replaced, and blocks around them."""
    paths = (name.split(".") for name in replaceable)
    around = {".".join(parts[:n]) for parts in paths for n in range(1, len(parts) + 1)}
    return sorted(
        name for name in around if not isinstance(network.get_submodule(name), nn.ModuleList)
    )
