"""Rows of a two-way key table: a name of theirs, our name or names for the same numbers, and the
shape that we hold them in.

A table is a list of rows made from a config. `check` holds a file against it and lists all that is
wrong in one message; `to_ours` and `to_theirs` are inverses, and copy nothing but what has to be
stacked or is mixed head by head.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import UserError

SHOWN = 8
"""How many keys of each kind of fault a message lists."""


class Form(Enum):
    """How their tensor holds ours: as it is, as a 1x1 convolution of our matrix, transposed, or
    several of ours on top of each other.

    LINE and STACKED_LINE: the same as convolutions of one dimension. PILED: on top of each other,
    of unequal heights. SWAPPED: the upper half of theirs is the lower half of ours (shift and scale
    of a modulation). SHARED: each of ours is a copy of theirs.
    """

    SAME = "same"
    POINT = "point"
    LINE = "line"
    TURNED = "turned"
    STACKED = "stacked"
    STACKED_LINE = "stacked line"
    PILED = "piled"
    SWAPPED = "swapped"
    SHARED = "shared"


_BEHIND = {Form.POINT: (1, 1), Form.LINE: (1,), Form.STACKED_LINE: (1,)}
_STACKED = (Form.STACKED, Form.STACKED_LINE)


class Row(NamedTuple):
    """`shape` is that of each of ours; there is one but where they are stacked, piled or shared.

    heads: stacked by heads, the first of each of ours, then the second of each, and so on; 1 is one
    after the other. heights: of each of ours where they are piled; `shape` is then that of the
    pile.
    """

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    form: Form = Form.SAME
    heads: int = 1
    heights: tuple[int, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of theirs."""
        if self.form is Form.TURNED:
            return self.shape[::-1]
        if self.form in (Form.PILED, Form.SHARED):
            return self.shape
        return (self.shape[0] * len(self.ours), *self.shape[1:], *_BEHIND.get(self.form, ()))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each of ours."""
        return (
            [(h, *self.shape[1:]) for h in self.heights]
            if self.form is Form.PILED
            else [self.shape] * len(self.ours)
        )

    def fits(self, shape: tuple[int, ...]) -> bool:
        """1x1 convolutions that somebody stored as matrices are the same numbers."""
        behind = len(_BEHIND.get(self.form, ()))
        return shape == self.stored or (behind > 0 and shape == self.stored[:-behind])

    def take(self, theirs: Tensor) -> list[Tensor]:
        """Theirs -> ours, in the order of their names: views, but for SWAPPED."""
        if self.form in _STACKED:
            return self._cut(theirs)
        if self.form is Form.PILED:
            return list(theirs.split(self.heights))
        if self.form is Form.SHARED:
            return [theirs] * len(self.ours)
        if self.form is Form.SWAPPED:
            return [_swapped(theirs)]
        return [theirs.T if self.form is Form.TURNED else theirs.reshape(self.shape)]

    def give(self, ours: list[Tensor]) -> Tensor:
        """Its inverse. `UserError` for copies that differ where they have to be one tensor."""
        if self.form in _STACKED:
            return self._stack(ours)
        if self.form is Form.PILED:
            return torch.cat(ours)
        if self.form is Form.SHARED:
            odd = [
                name
                for name, value in zip(self.ours, ours, strict=True)
                if not torch.equal(value, ours[0])
            ]
            if odd:
                raise UserError(
                    f"{odd[0]} differs from {self.ours[0]}: the original layout has one {self.theirs} for both; save a folder instead"
                )
            return ours[0]
        if self.form is Form.SWAPPED:
            return _swapped(ours[0])
        return ours[0].T if self.form is Form.TURNED else ours[0].reshape(self.stored)

    def _cut(self, stack: Tensor) -> list[Tensor]:
        parts = stack.reshape(self.heads, len(self.ours), -1, *self.shape[1:])
        return [parts[:, k].reshape(self.shape) for k in range(len(self.ours))]

    def _stack(self, values: list[Tensor]) -> Tensor:
        parts = torch.stack([v.reshape(self.heads, -1, *self.shape[1:]) for v in values], 1)
        return parts.reshape(self.stored)


def _swapped(value: Tensor) -> Tensor:
    """The halves of the first dimension in the other order; its own inverse."""
    upper, lower = value.chunk(2)
    return torch.cat([lower, upper])


def row(theirs: str, ours: str, *shape: int, form: Form = Form.SAME) -> Row:
    """A row with one name of ours."""
    return Row(theirs, (ours,), shape, form)


def pair(theirs: str, ours: str, *shape: int) -> Iterator[Row]:
    """Weight and bias of a layer whose weight has this shape."""
    yield row(f"{theirs}.weight", f"{ours}.weight", *shape)
    yield row(f"{theirs}.bias", f"{ours}.bias", shape[0])


def stacked(theirs: str, ours: Sequence[str], *shape: int, bias: bool = True) -> Iterator[Row]:
    """Weights, and biases, of layers of one shape that they hold as one layer on top of each
    other.
    """
    yield Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), shape, Form.STACKED)
    if bias:
        yield Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), shape[:1], Form.STACKED)


def swapped(theirs: str, ours: str, *shape: int, bias: bool = True) -> Iterator[Row]:
    """Weight, and bias, of a modulation of two vectors: (shift, scale) in theirs, (scale, shift) in
    ours.
    """
    yield row(f"{theirs}.weight", f"{ours}.weight", *shape, form=Form.SWAPPED)
    if bias:
        yield row(f"{theirs}.bias", f"{ours}.bias", shape[0], form=Form.SWAPPED)


def under(rows: Iterable[Row], prefix: str) -> list[Row]:
    """The rows with `prefix` before their names."""
    return [r._replace(theirs=prefix + r.theirs) for r in rows]


def faults(rows: Iterable[Row], found: Mapping[str, Tensor], spare: Collection[str] = ()) -> str:
    """All that is wrong with a file's keys, as one clause; empty where it fits. Keys in `spare` may
    be there.
    """
    expected = {r.theirs: r for r in rows}
    both = sorted(expected.keys() & found.keys())
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {expected[k].stored}"
        for k in both
        if not expected[k].fits(tuple(found[k].shape))
    ]
    kinds = [
        f"{k} {str(found[k].dtype).removeprefix('torch.')}"
        for k in both
        if not found[k].is_floating_point()
    ]
    listed = (
        ("missing", sorted(expected.keys() - found.keys())),
        ("not expected", sorted(found.keys() - expected.keys() - set(spare))),
        ("of another shape", shapes),
        ("not of floating-point numbers", kinds),
    )
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in listed
        if names
    )


def check(
    rows: Iterable[Row], found: Mapping[str, Tensor], where: object, spare: Collection[str] = ()
) -> None:
    """`UserError` that lists every missing, extra and misshapen key, and every tensor that does not
    hold floating-point numbers.
    """
    problems = faults(rows, found, spare)
    if problems:
        raise UserError(
            f"{where} does not fit the architecture that its other keys tell: keys {problems}; the file may be damaged, or of a kind that "
            "is not supported"
        )


def to_ours(rows: Iterable[Row], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names (views). The file has been held against the rows before: see
    `check`.
    """
    tensors: dict[str, Tensor] = {}
    for r in rows:
        tensors |= zip(r.ours, r.take(found[r.theirs]), strict=True)
    return tensors


def check_ours(
    rows: Iterable[Row], tensors: Mapping[str, Tensor], where: object, spare: Collection[str] = ()
) -> None:
    """`UserError` that lists what is missing, extra or misshapen among our tensors."""
    problems = faults(
        (
            Row(name, (name,), shape)
            for r in rows
            for name, shape in zip(r.ours, r.shapes, strict=True)
        ),
        tensors,
        spare,
    )
    if problems:
        raise UserError(
            f"{where} does not fit its config: keys {problems}; use the weights that belong to the config"
        )


def to_theirs(
    rows: Iterable[Row], tensors: Mapping[str, Tensor], where: object
) -> dict[str, Tensor]:
    """Our tensors under their names; `UserError` that lists what is missing, extra or misshapen."""
    rows = list(rows)
    check_ours(rows, tensors, where)
    return {r.theirs: r.give([tensors[name] for name in r.ours]) for r in rows}
