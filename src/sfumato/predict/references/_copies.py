"""Weaker copies of a network: the same structure and the very same parameters, with some modules
replaced.

A copy costs no memory to speak of, follows the original's weights wherever they are trained or
loaded, and is made once a network: runs that are guided by the same copy share its forward passes.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sfumato.errors import UserError, unknown

Find = Callable[[nn.Module], Iterator[tuple[str, nn.Module]]]
"""network -> (name of a module, what may take its place), for all that may be replaced."""

# of a transformer; those of U-Nets are inside other blocks
_BLOCK = re.compile(r"\w*transformer_blocks\.\d+")
_RUN = re.compile(r"(?<=\.)(\d+)-(\d+)(?=\.|$)")

# A memory and not a state: what is in here can be made again, and goes when its denoiser goes.
_MADE: WeakKeyDictionary[Any, dict[Any, tuple[list[Tensor], Any]]] = WeakKeyDictionary()


def tensors(network: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def shared_copy(network: nn.Module) -> nn.Module:
    """New modules, the very same parameters and buffers."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors(network)})


def changed(network: nn.Module, layers: Sequence[str], find: Find, kind: str) -> nn.Module:
    """A shared copy in which `find`'s replacements stand at and below the named layers, the
    outermost where they are nested.

    No layers: see `deepest`. `UserError` that lists what can be named, for a layer at and below
    which there is nothing to replace.
    """
    copied = shared_copy(network)
    found = dict(find(copied))
    layers = layers or deepest(found)
    chosen: set[str] = set()
    for layer in (one for name in layers for one in spread(name)):
        inside = {name for name in found if _within(name, layer)}
        if not inside:
            raise unknown(kind, layer, gathered(_nameable(copied, found)))
        chosen |= inside
    if not chosen:
        raise UserError(
            f"no layers to change: name at least one {kind} ({', '.join(gathered(_nameable(copied, found))) or 'this network has none'})"
        )
    for name in chosen:
        if not any(name != other and _within(name, other) for other in chosen):
            copied.set_submodule(name, found[name])
    return copied


def deepest(found: Iterable[str]) -> list[str]:
    """Of a transformer, the block in the middle of those that have any, single ones after double
    ones. Of a U-Net, the names in the middle block; where it has none, those in the last block of
    the way down; else the middle one of all: attention, and only where there is none, other layers.
    """
    known = list(found)
    blocks = list(dict.fromkeys(block[0] for name in known if (block := _BLOCK.match(name))))
    if blocks:
        return [blocks[len(blocks) // 2]]
    known = [name for name in known if "attention" in name or "attn" in name] or known
    for prefix in ("mid_block.", *(f"down_blocks.{i}." for i in reversed(range(10)))):
        inside = [name for name in known if name.startswith(prefix)]
        if inside:
            return inside
    return known[len(known) // 2 :][:1]


def weakened(denoiser: Any, layers: Sequence[str], find: Find, kind: str) -> Any:
    """The denoiser with a network of `changed` layers: the same object for the same question, as
    long as the network's parts stay.
    """
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{type(denoiser).__name__} has no network to change: guidance by a changed network needs a Denoiser"
        )
    made, key, now = _MADE.setdefault(denoiser, {}), (find, tuple(layers)), tensors(network)
    if key in made:
        then, weaker = made[key]
        same = len(then) == len(now) and all(a is b for a, b in zip(then, now, strict=True))
        if same and weaker.network.training == network.training:
            return weaker
    weaker = replace(denoiser, network=changed(network, layers, find, kind))
    made[key] = now, weaker
    return weaker


def spread(name: str) -> Iterator[str]:
    """a.3-5.b -> a.3.b, a.4.b, a.5.b; other names as they are."""
    run = _RUN.search(name)
    if run is None or int(run[1]) > int(run[2]):
        yield name
        return
    for k in range(int(run[1]), int(run[2]) + 1):
        yield from spread(f"{name[: run.start(1)]}{k}{name[run.end() :]}")


def gathered(names: Iterable[str]) -> list[str]:
    """a.3.b, a.4.b, a.5.b -> a.3-5.b: what `spread` undoes."""
    known = [tuple(name.split(".")) for name in names]
    for place in reversed(range(max(map(len, known), default=0))):
        numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
        kept = []
        for parts in known:
            if len(parts) > place and parts[place].isdigit():
                numbers.setdefault((parts[:place], parts[place + 1 :]), []).append(
                    int(parts[place])
                )
            else:
                kept.append(parts)
        for (before, after), found in numbers.items():
            for _, run in groupby(enumerate(sorted(found)), lambda pair: pair[1] - pair[0]):
                first, *rest = (number for _, number in run)
                kept.append((*before, f"{first}-{rest[-1]}" if rest else f"{first}", *after))
        known = kept
    return sorted(".".join(parts) for parts in known)


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")


def _nameable(network: nn.Module, found: Iterable[str]) -> list[str]:
    """The names that somebody may mean: what can be replaced, and the blocks that hold it."""
    held = {
        ".".join(parts[:n])
        for parts in (name.split(".") for name in found)
        for n in range(1, len(parts) + 1)
    }
    return sorted(
        name for name in held if not isinstance(network.get_submodule(name), nn.ModuleList)
    )
