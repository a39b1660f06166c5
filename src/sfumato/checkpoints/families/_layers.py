"""Tables of keys: layers that several networks have, and functions that join tables."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import wraps
from typing import ParamSpec

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.weight_map import WeightMap, chunked, linear, weight
from sfumato.errors import UserError

P = ParamSpec("P")


def listed(rows: Callable[P, Iterator[WeightMap]]) -> Callable[P, list[WeightMap]]:
    """Decorate a generator of rows: the function returns their list."""

    @wraps(rows)
    def table(*args: P.args, **kwargs: P.kwargs) -> list[WeightMap]:
        return list(rows(*args, **kwargs))

    return table


def below(source: str, target: str, maps: Iterable[WeightMap]) -> Iterator[WeightMap]:
    """The rows of one layer: its name in the file, its name in our network, its own table."""
    for m in maps:
        targets = tuple(f"{target}.{name}" for name in m.targets)
        yield replace(m, source=f"{source}.{m.source}", targets=targets)


def matrix(source: str, target: str, *shape: int) -> WeightMap:
    """A layer without a bias."""
    return weight(f"{source}.weight", f"{target}.weight", *shape)


def embedder(
    source: str, target: str, width: int, inputs: int, layers: tuple[str, str] = ("mlp.0", "mlp.2")
) -> Iterator[WeightMap]:
    """Two layers that embed a timestep, a vector or a size; `layers`: their original names."""
    yield from linear(f"{source}.{layers[0]}", f"{target}.linear_1", width, inputs)
    yield from linear(f"{source}.{layers[1]}", f"{target}.linear_2", width, width)


def attention(source: str, target: str, width: int) -> Iterator[WeightMap]:
    """Self-attention whose q, k and v are one matrix in the original."""
    yield from chunked(f"{source}.qkv", [f"{target}.to_{a}" for a in "qkv"], width, width)
    yield from linear(f"{source}.proj", f"{target}.to_out.0", width, width)


def mlp(
    source: str, target: str, width: int, layers: tuple[str, str] = ("fc1", "fc2")
) -> Iterator[WeightMap]:
    """Two layers with four times the width between them; `layers`: their original names."""
    yield from linear(f"{source}.{layers[0]}", f"{target}.net.0.proj", 4 * width, width)
    yield from linear(f"{source}.{layers[1]}", f"{target}.net.2", width, 4 * width)


def unnamed(value: str, expected: str | None = None) -> UserError:
    """The error for a config's value that has no name in the original layout."""
    end = "" if expected is None else f": expected {expected}"
    return UserError(f"{value} has no name in the original layout{end}")


def attending_levels(config: Config, down: dict[str, bool], up: dict[str, bool]) -> list[bool]:
    """For each level, True where it attends, from the block types of a U-Net or autoencoder.

    Args:
        config: Diffusers' fields.
        down: The block types of the way down that have names, and whether they attend.
        up: The same of the way up.

    Raises:
        UserError: Block types that have no name in the original layout.
    """
    n = len(config["block_out_channels"])
    ways = config["down_block_types"], config["up_block_types"]
    foreign = [
        k for kinds, names in zip(ways, (down, up), strict=True) for k in kinds if k not in names
    ]
    if foreign:
        raise unnamed(f"block type {foreign[0]!r}", f"one of {', '.join((*down, *up))}")
    counts = [len(kinds) for kinds in ways]
    if counts != [n, n]:
        raise unnamed(f"a pair of {counts[0]} down_ and {counts[1]} up_block_types", f"{n} of each")
    attends = [down[kind] for kind in ways[0]]
    if attends != [up[kind] for kind in reversed(ways[1])]:
        raise unnamed("a list of up_block_types that is not the reverse of down_block_types")
    return attends
