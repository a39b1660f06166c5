"""Two-way key tables between a checkpoint's tensors and our parameters.

A family's table is a list of `WeightMap`s made from a config. `check_sources` compares a file with
it and lists all faults in one message. `load_all` and `store_all` are inverses on lazy tensors.
They copy only tensors that are concatenated or interleaved by heads.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors, Shape
from sfumato.errors import UserError
from sfumato.io.safetensors import EIGHTS, check_kinds, key_faults, kinds_of

# ---- operations: how one source tensor holds its targets -----------------------------------------


@dataclass(frozen=True)
class Identity:
    """The same tensor; the base of all operations.

    Attributes:
        trailing: dimensions of size 1 that only the source has, at the end.
    """

    trailing: Shape = ()

    def stored(self, shape: Shape, count: int) -> Shape:
        """Return the source's shape, for `count` targets of `shape`."""
        return (*shape, *self.trailing)

    def shapes(self, shape: Shape, count: int) -> list[Shape]:
        """Return the shape of each target."""
        return [shape] * count

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Return the targets' values, as views where that is possible."""
        return [source.reshape(shape)]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        """Return the source's value, the inverse of `load`."""
        return values[0].reshape(self.stored(shape, 1))


@dataclass(frozen=True)
class Conv1x1(Identity):
    """A matrix stored as a two-dimensional convolution with 1x1 kernels."""

    trailing: Shape = (1, 1)


@dataclass(frozen=True)
class Conv1d(Identity):
    """A matrix stored as a one-dimensional convolution with kernels of size 1."""

    trailing: Shape = (1,)


@dataclass(frozen=True)
class Transpose(Identity):
    """A matrix stored transposed."""

    def stored(self, shape: Shape, count: int) -> Shape:
        """Return the transposed shape."""
        return shape[::-1]

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Transpose."""
        return [source.T]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        """Transpose back."""
        return values[0].T


@dataclass(frozen=True)
class Chunk(Identity):
    """Several layers of one shape, concatenated along the first dimension.

    Attributes:
        heads: above 1, layers are interleaved by heads: the first head of each layer, then the
            second of each, and so on.
    """

    heads: int = 1

    def stored(self, shape: Shape, count: int) -> Shape:
        """Return the shape with `count` times the height."""
        return (shape[0] * count, *shape[1:], *self.trailing)

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Split."""
        parts = source.reshape(self.heads, count, -1, *shape[1:])
        return [parts[:, k].reshape(shape) for k in range(count)]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        """Concatenate."""
        parts = torch.stack([v.reshape(self.heads, -1, *shape[1:]) for v in values], 1)
        return parts.reshape(self.stored(shape, len(values)))


@dataclass(frozen=True)
class Split(Identity):
    """Layers of unequal heights, concatenated along the first dimension.

    Attributes:
        sizes: the heights. `shape` is the source's.
    """

    sizes: Shape = ()

    def shapes(self, shape: Shape, count: int) -> list[Shape]:
        """Return the shape of each layer, by its height."""
        return [(size, *shape[1:]) for size in self.sizes]

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Split."""
        return list(source.split(self.sizes))

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        """Concatenate."""
        return torch.cat(values)


@dataclass(frozen=True)
class SwapHalves(Identity):
    """Halves of the first dimension swapped: (shift, scale) against (scale, shift)."""

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Swap."""
        upper, lower = source.chunk(2)
        return [torch.cat([lower, upper])]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        """Swap back."""
        return self.load(values[0], shape, 1)[0]


@dataclass(frozen=True)
class Broadcast(Identity):
    """One tensor of the source that several of our layers have a copy of."""

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Return the tensor `count` times."""
        return [source] * count


@dataclass(frozen=True)
class Constant(Identity):
    """A tensor without a target, which the config determines. A file may lack it.

    Attributes:
        value: computes the tensor.
    """

    value: Callable[[], Tensor] = lambda: torch.empty(0)

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        """Return nothing: there is no target."""
        return []

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        """Compute the tensor."""
        return self.value()


@dataclass(frozen=True)
class WeightMap:
    """One tensor of a checkpoint and the parameters that it holds.

    Attributes:
        source: the checkpoint's name.
        targets: our names.
        shape: of each target; for `Split` of the source.
        op: how the source holds the targets.
        default: the target's value where a file lacks it; None: the file must have it.
        droppable: True where a target that equals `default` is not written.
    """

    source: str
    targets: tuple[str, ...]
    shape: Shape
    op: Identity = Identity()
    default: LazyTensor | None = None
    droppable: bool = False

    @property
    def stored(self) -> Shape:
        """The source's shape."""
        return self.op.stored(self.shape, len(self.targets))

    @property
    def shapes(self) -> list[Shape]:
        """The shape of each target."""
        return self.op.shapes(self.shape, len(self.targets))

    @property
    def dtype(self) -> torch.dtype:
        """The kind of its numbers: floating-point, or the integers of a counter.

        Nothing reads counters.
        """
        return torch.float32 if self.default is None else self.default.dtype

    @property
    def is_optional(self) -> bool:
        """True where a file may lack the source."""
        return self.default is not None or isinstance(self.op, Constant)

    def fits(self, shape: Shape) -> bool:
        """Return True where a tensor of this shape can be read.

        1x1 convolutions may be stored as matrices, and some writers of GGUF omit leading dimensions
        of size 1.
        """
        stored, trailing = self.stored, len(self.op.trailing)
        padded = (1,) * (len(stored) - len(shape)) + shape
        return stored in (shape, padded) or (trailing > 0 and shape == stored[:-trailing])

    def load(self, source: Tensor) -> list[Tensor]:
        """Return the targets' values, in the order of their names."""
        return self.op.load(source.reshape(self.stored), self.shape, len(self.targets))

    def store(self, values: list[Tensor]) -> Tensor:
        """Return the source's value.

        Raises:
            UserError: copies that differ where the source has one tensor.
        """
        copies = zip(self.targets, values, strict=True) if isinstance(self.op, Broadcast) else ()
        for name, value in copies:
            if not torch.equal(value, values[0]):
                raise UserError(
                    f"{name} differs from {self.targets[0]}: the original layout has one "
                    f"{self.source} for both; save a folder instead"
                )
        return self.op.store(values, self.shape)


def weight(source: str, target: str, *shape: int, op: Identity = Identity()) -> WeightMap:
    """Return a map with one target."""
    return WeightMap(source, (target,), shape, op)


def linear(source: str, target: str, *shape: int) -> Iterator[WeightMap]:
    """Yield the weight and bias of a layer whose weight has this shape."""
    yield weight(f"{source}.weight", f"{target}.weight", *shape)
    yield weight(f"{source}.bias", f"{target}.bias", shape[0])


def chunked(
    source: str, targets: Sequence[str], *shape: int, bias: bool = True
) -> Iterator[WeightMap]:
    """Yield weights and biases of layers of one shape that the source concatenates."""
    for kind, sides in _parameters(shape, bias):
        names = tuple(f"{name}.{kind}" for name in targets)
        yield WeightMap(f"{source}.{kind}", names, sides, Chunk())


def swapped(source: str, target: str, *shape: int, bias: bool = True) -> Iterator[WeightMap]:
    """Yield weight and bias of a modulation, (shift, scale) in the source; see `SwapHalves`."""
    for kind, sides in _parameters(shape, bias):
        yield weight(f"{source}.{kind}", f"{target}.{kind}", *sides, op=SwapHalves())


def _parameters(shape: Shape, bias: bool) -> list[tuple[str, Shape]]:
    return [("weight", shape), ("bias", shape[:1])][: 1 + bias]


def with_prefix(maps: Iterable[WeightMap], prefix: str) -> list[WeightMap]:
    """Return the maps with `prefix` before their sources."""
    return [replace(m, source=prefix + m.source) for m in maps]


# ---- checks --------------------------------------------------------------------------------------


def check_sources(
    maps: Iterable[WeightMap], tensors: LazyTensors, where: object, spare: Collection[str] = ()
) -> None:
    """Compare a file with a table.

    Args:
        maps: the table, with the file's prefixes.
        tensors: all tensors of the file.
        where: the file, for messages.
        spare: keys that are not read where a file has them.

    Raises:
        UserError: lists every missing, extra and misshapen key, and every tensor that does not hold
            floating-point numbers.
    """
    expected = {m.source: m for m in maps}
    problems = key_faults(
        {key: (m.stored, m.dtype) for key, m in expected.items()},
        kinds_of(
            {key: lazy for key, lazy in tensors.items() if key in expected or key not in spare}
        ),
        optional={key for key, m in expected.items() if m.is_optional},
        # `load_all` checks constants
        fits=lambda key, shape: isinstance(expected[key].op, Constant) or expected[key].fits(shape),
    )
    if problems:
        raise UserError(
            f"{where} does not fit the architecture of its other keys: keys {problems}; "
            "the file may be damaged, or of a kind that is not supported"
        )


def check_targets(maps: Iterable[WeightMap], tensors: LazyTensors, where: object) -> None:
    """Compare our tensors with a table.

    Raises:
        UserError: lists every missing, extra and misshapen key.
    """
    expected = {
        name: (shape, m.dtype)
        for m in maps
        for name, shape in zip(m.targets, m.shapes, strict=True)
    }
    counters = {name for name, (_, dtype) in expected.items() if not dtype.is_floating_point}
    check_kinds(expected, kinds_of(tensors), where, counters)


# ---- lazy tensors --------------------------------------------------------------------------------


def load_all(
    maps: Iterable[WeightMap], tensors: LazyTensors, where: object
) -> dict[str, LazyTensor]:
    """Return a file's tensors under our names, after `check_sources`.

    Raises:
        UserError: a constant of the file that is not the one which its config determines.
    """
    loaded: dict[str, LazyTensor] = {}
    for m in maps:
        source = tensors.get(m.source)
        if source is None and m.default is not None:
            loaded[m.targets[0]] = m.default
        elif source is not None and isinstance(m.op, Constant):
            _check_constant(m, source, where)
        elif source is not None:
            for k, (name, shape) in enumerate(zip(m.targets, m.shapes, strict=True)):
                loaded[name] = source.map(partial(_target, m, k), source.dtype, shape)
    return loaded


def _target(m: WeightMap, k: int, source: Tensor) -> Tensor:
    return m.load(source)[k]


def _check_constant(m: WeightMap, source: LazyTensor, where: object) -> None:
    value = m.store([])
    # bfloat16's rounding
    same = m.fits(source.shape) and torch.allclose(
        source.load().float().reshape(value.shape), value, atol=2e-2
    )
    if not same:
        raise UserError(
            f"{where}: {m.source} is not the table that its config determines, "
            "and there is no place for another: it cannot be read"
        )


def store_all(maps: Iterable[WeightMap], tensors: LazyTensors) -> dict[str, LazyTensor]:
    """Return our tensors under the file's names, after `check_targets`."""
    stored: dict[str, LazyTensor] = {}
    for m in maps:
        if not m.dtype.is_floating_point and m.targets[0] not in tensors:
            continue
        source = _source(m, [tensors[name] for name in m.targets])
        if not (m.droppable and m.default is not None and _same(source, m.default)):
            stored[m.source] = source
    return stored


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and torch.equal(a.load().float(), b.load().float())


def _source(m: WeightMap, targets: list[LazyTensor]) -> LazyTensor:
    """Return the source; targets of unequal dtypes are cast to the widest of them."""
    dtype = targets[0].dtype if targets else torch.float32
    for target in targets[1:]:
        if target.dtype != dtype:
            dtype = torch.promote_types(
                *(torch.float32 if d in EIGHTS else d for d in (dtype, target.dtype))
            )
    return LazyTensor(
        dtype, m.stored, lambda: m.store([target.load().to(dtype) for target in targets])
    )
