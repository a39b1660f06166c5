"""Two-way key tables between a checkpoint's tensors and our parameters.

A family's table is a list of `WeightMap`s made from a config. `check_sources` holds a file against
it and lists all that is wrong in one message. `load_all` and `store_all` are inverses on lazy
tensors, and copy nothing but what has to be concatenated or is mixed head by head.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors
from sfumato.errors import UserError
from sfumato.io.safetensors import EIGHTS, key_faults

Shape = tuple[int, ...]


# ---- how a source holds its targets --------------------------------------------------------------
# stored: the source's shape, for `count` targets of `shape`. load: the targets' values, views where
# that is possible. store: its inverse.


@dataclass(frozen=True)
class Identity:
    """The same tensor. trailing: sides of 1 that only the source has."""

    trailing: Shape = ()

    def stored(self, shape: Shape, count: int) -> Shape:
        return (*shape, *self.trailing)

    def shapes(self, shape: Shape, count: int) -> list[Shape]:
        return [shape] * count

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        return [source.reshape(shape)]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        return values[0].reshape(self.stored(shape, 1))


@dataclass(frozen=True)
class Conv1x1(Identity):
    """A matrix stored as a two-dimensional convolution with kernels of one cell."""

    trailing: Shape = (1, 1)


@dataclass(frozen=True)
class Conv1d(Identity):
    """A matrix stored as a one-dimensional convolution with kernels of one position."""

    trailing: Shape = (1,)


@dataclass(frozen=True)
class Transpose(Identity):
    """A matrix stored transposed."""

    def stored(self, shape: Shape, count: int) -> Shape:
        return shape[::-1]

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        return [source.T]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        return values[0].T


@dataclass(frozen=True)
class Chunk(Identity):
    """Several layers of one shape, concatenated along the first dimension.

    `heads` > 1: interleaved by heads, the first of each layer, then the second of each, and so on.
    """

    heads: int = 1

    def stored(self, shape: Shape, count: int) -> Shape:
        return (shape[0] * count, *shape[1:], *self.trailing)

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        parts = source.reshape(self.heads, count, -1, *shape[1:])
        return [parts[:, k].reshape(shape) for k in range(count)]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        parts = torch.stack([v.reshape(self.heads, -1, *shape[1:]) for v in values], 1)
        return parts.reshape(self.stored(shape, len(values)))


@dataclass(frozen=True)
class Split(Identity):
    """Layers of unequal heights (`sizes`), concatenated along the first dimension; `shape` is the
    source's.
    """

    sizes: Shape = ()

    def shapes(self, shape: Shape, count: int) -> list[Shape]:
        return [(size, *shape[1:]) for size in self.sizes]

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        return list(source.split(self.sizes))

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        return torch.cat(values)


@dataclass(frozen=True)
class SwapHalves(Identity):
    """Halves of the first dimension exchanged: (shift, scale) of a modulation against (scale,
    shift).
    """

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        upper, lower = source.chunk(2)
        return [torch.cat([lower, upper])]

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        return self.load(values[0], shape, 1)[0]


@dataclass(frozen=True)
class Broadcast(Identity):
    """One tensor of the source that several of our layers hold a copy of."""

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        return [source] * count


@dataclass(frozen=True)
class Constant(Identity):
    """A tensor without a target, which the config determines. A file may lack it."""

    value: Callable[[], Tensor] = lambda: torch.empty(0)

    def load(self, source: Tensor, shape: Shape, count: int) -> list[Tensor]:
        return []

    def store(self, values: list[Tensor], shape: Shape) -> Tensor:
        return self.value()


@dataclass(frozen=True)
class WeightMap:
    """One tensor of a checkpoint and the parameters that it holds.

    Attributes:
        source: the checkpoint's name
        targets: our names
        shape: of each target; for `Split` of the source
        op: how the source holds the targets
        default: the target's value where a file lacks it; None: it must be there
        droppable: whether a target that equals `default` is not written
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
    def is_counter(self) -> bool:
        """Whether it is a whole number, which nothing reads."""
        return self.default is not None and not self.default.dtype.is_floating_point

    def fits(self, shape: Shape) -> bool:
        """Whether a tensor of this shape can be read.

        Convolutions of one cell may be stored as matrices, and some writers of GGUF leave out
        sides of 1 on the outside.
        """
        stored, trailing = self.stored, len(self.op.trailing)
        padded = (1,) * (len(stored) - len(shape)) + shape
        return stored in (shape, padded) or (trailing > 0 and shape == stored[:-trailing])

    def load(self, source: Tensor) -> list[Tensor]:
        """The targets' values, in the order of their names."""
        return self.op.load(source.reshape(self.stored), self.shape, len(self.targets))

    def store(self, values: list[Tensor]) -> Tensor:
        """The source's value; `UserError` for copies that differ where the source has one
        tensor.
        """
        copies = zip(self.targets, values, strict=True) if isinstance(self.op, Broadcast) else ()
        for name, value in copies:
            if not torch.equal(value, values[0]):
                raise UserError(
                    f"{name} differs from {self.targets[0]}: the original layout has one {self.source} for both; save a folder instead"
                )
        return self.op.store(values, self.shape)


def weight(source: str, target: str, *shape: int, op: Identity = Identity()) -> WeightMap:
    """A map with one target."""
    return WeightMap(source, (target,), shape, op)


def linear(source: str, target: str, *shape: int) -> Iterator[WeightMap]:
    """Weight and bias of a layer whose weight has this shape."""
    yield weight(f"{source}.weight", f"{target}.weight", *shape)
    yield weight(f"{source}.bias", f"{target}.bias", shape[0])


def chunked(
    source: str, targets: Sequence[str], *shape: int, bias: bool = True
) -> Iterator[WeightMap]:
    """Weights, and biases, of layers of one shape that the source concatenates into one layer."""
    for kind, sides in (("weight", shape), ("bias", shape[:1])) if bias else (("weight", shape),):
        yield WeightMap(
            f"{source}.{kind}", tuple(f"{name}.{kind}" for name in targets), sides, Chunk()
        )


def swapped(source: str, target: str, *shape: int, bias: bool = True) -> Iterator[WeightMap]:
    """Weight, and bias, of a modulation: (shift, scale) in the source, (scale, shift) in the
    target.
    """
    for kind, sides in (("weight", shape), ("bias", shape[:1])) if bias else (("weight", shape),):
        yield weight(f"{source}.{kind}", f"{target}.{kind}", *sides, op=SwapHalves())


def with_prefix(maps: Iterable[WeightMap], prefix: str) -> list[WeightMap]:
    """The maps with `prefix` before their sources."""
    return [replace(m, source=prefix + m.source) for m in maps]


# ---- checks --------------------------------------------------------------------------------------


def check_sources(
    maps: Iterable[WeightMap], tensors: LazyTensors, where: object, spare: Collection[str] = ()
) -> None:
    """Hold a file against a table.

    Args:
        maps: the table, with the file's prefixes
        tensors: all of the file's tensors
        where: the file, for messages
        spare: keys that may be there and are not read

    Raises:
        UserError: a list of every missing, extra and misshapen key, and of every tensor that does
            not hold floating-point numbers.
    """
    expected = {m.source: m for m in maps}
    optional = {
        key for key, m in expected.items() if m.default is not None or isinstance(m.op, Constant)
    }
    constants = {key for key, m in expected.items() if isinstance(m.op, Constant)}  # see `load_all`
    problems = _faults(
        {
            key: (m.stored, m.fits if key not in constants else lambda shape: True, m.is_counter)
            for key, m in expected.items()
        },
        {key: lazy for key, lazy in tensors.items() if key in expected or key not in spare},
        optional,
    )
    if problems:
        raise UserError(
            f"{where} does not fit the architecture that its other keys tell: keys {problems}; the file may be damaged, or of a kind that "
            "is not supported"
        )


def check_targets(maps: Iterable[WeightMap], tensors: LazyTensors, where: object) -> None:
    """Hold our tensors against a table: `UserError` that lists what is missing, extra or
    misshapen.
    """
    expected = {
        name: (shape, lambda given, shape=shape: given == shape, m.is_counter)
        for m in maps
        for name, shape in zip(m.targets, m.shapes, strict=True)
    }
    problems = _faults(
        expected, tensors, {name for name, (_, _, counter) in expected.items() if counter}
    )
    if problems:
        raise UserError(
            f"{where} does not fit its config: keys {problems}; use the weights that belong to the config"
        )


def _faults(
    expected: Mapping[str, tuple[Shape, Callable[[Shape], bool], bool]],
    tensors: LazyTensors,
    optional: Collection[str],
) -> str:
    """One clause of all that is wrong. expected: shape, whether a shape fits, whether it is a
    counter, by key.
    """
    both = [(key, *expected[key], tensors[key]) for key in sorted(expected.keys() & tensors.keys())]
    return key_faults(
        missing=expected.keys() - tensors.keys() - set(optional),
        extra=tensors.keys() - expected.keys(),
        shapes=[
            f"{key} {lazy.shape} instead of {shape}"
            for key, shape, fits, _, lazy in both
            if not fits(lazy.shape)
        ],
        dtypes=[
            f"{key} {str(lazy.dtype).removeprefix('torch.')}"
            for key, _, _, counter, lazy in both
            if not (lazy.dtype.is_floating_point or counter)
        ],
    )


# ---- lazy tensors --------------------------------------------------------------------------------


def load_all(
    maps: Iterable[WeightMap], tensors: LazyTensors, where: object
) -> dict[str, LazyTensor]:
    """A file's tensors under our names. The file has been held against the table before.

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
            loaded |= {
                name: _target(m, source, k, shape)
                for k, (name, shape) in enumerate(zip(m.targets, m.shapes, strict=True))
            }
    return loaded


def _target(m: WeightMap, source: LazyTensor, k: int, shape: Shape) -> LazyTensor:
    return LazyTensor(source.dtype, shape, lambda: m.load(source.load())[k])


def _check_constant(m: WeightMap, source: LazyTensor, where: object) -> None:
    value = m.store([])
    # bfloat16's rounding
    same = m.fits(source.shape) and torch.allclose(
        source.load().float().reshape(value.shape), value, atol=2e-2
    )
    if not same:
        raise UserError(
            f"{where}: {m.source} is not the table that its config makes, and ours has no place for another: it cannot be read"
        )


def store_all(maps: Iterable[WeightMap], tensors: LazyTensors) -> dict[str, LazyTensor]:
    """Our tensors under the file's names. They have been held against the table before."""
    stored: dict[str, LazyTensor] = {}
    for m in maps:
        if m.is_counter and m.targets[0] not in tensors:
            continue
        source = _source(m, [tensors[name] for name in m.targets])
        if not (m.droppable and m.default is not None and _same(source, m.default)):
            stored[m.source] = source
    return stored


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and torch.equal(a.load().float(), b.load().float())


def _source(m: WeightMap, targets: list[LazyTensor]) -> LazyTensor:
    """Targets of unequal dtypes become the widest of them."""
    dtype = targets[0].dtype if targets else torch.float32
    for target in targets[1:]:
        if target.dtype != dtype:
            dtype = torch.promote_types(
                *(torch.float32 if d in EIGHTS else d for d in (dtype, target.dtype))
            )
    return LazyTensor(
        dtype, m.stored, lambda: m.store([target.load().to(dtype) for target in targets])
    )
