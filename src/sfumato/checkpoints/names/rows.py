"""Rows of a two-way key table: a name of theirs, our name or names for the same numbers, and the shape that we hold them in.

A table is a list of rows made from a config. `check` holds a file against it and lists all that is wrong in one message; `to_ours` and
`to_theirs` are inverses, and copy nothing but what has to be stacked.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import UserError

SHOWN = 8
"""How many keys of each kind of fault a message lists."""


class Form(Enum):
    """How their tensor holds ours: as it is, as a 1x1 convolution of our matrix, transposed, or several of ours on top of each other."""

    SAME = "same"
    POINT = "point"
    TURNED = "turned"
    STACKED = "stacked"


class Row(NamedTuple):
    """`shape` is that of each of ours; there is one but for `Form.STACKED`."""

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    form: Form = Form.SAME

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of theirs."""
        if self.form is Form.POINT:
            return (*self.shape, 1, 1)
        if self.form is Form.TURNED:
            return self.shape[::-1]
        return (self.shape[0] * len(self.ours), *self.shape[1:])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """1x1 convolutions that somebody stored as matrices are the same numbers."""
        return shape == self.stored or (self.form is Form.POINT and shape == self.shape)


def row(theirs: str, ours: str, *shape: int, form: Form = Form.SAME) -> Row:
    """A row with one name of ours."""
    return Row(theirs, (ours,), shape, form)


def pair(theirs: str, ours: str, *shape: int) -> Iterator[Row]:
    """Weight and bias of a layer whose weight has this shape."""
    yield row(f"{theirs}.weight", f"{ours}.weight", *shape)
    yield row(f"{theirs}.bias", f"{ours}.bias", shape[0])


def under(rows: Iterable[Row], prefix: str) -> list[Row]:
    """The rows with `prefix` before their names."""
    return [r._replace(theirs=prefix + r.theirs) for r in rows]


def faults(rows: Iterable[Row], found: Mapping[str, Tensor], spare: Collection[str] = ()) -> str:
    """All that is wrong with a file's keys, as one clause; empty where it fits. Keys in `spare` may be there."""
    expected = {r.theirs: r for r in rows}
    both = sorted(expected.keys() & found.keys())
    shapes = [f"{k} {tuple(found[k].shape)} instead of {expected[k].stored}" for k in both if not expected[k].fits(tuple(found[k].shape))]
    kinds = [f"{k} {str(found[k].dtype).removeprefix('torch.')}" for k in both if not found[k].is_floating_point()]
    listed = (
        ("missing", sorted(expected.keys() - found.keys())),
        ("not expected", sorted(found.keys() - expected.keys() - set(spare))),
        ("of another shape", shapes),
        ("not of floating-point numbers", kinds),
    )
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})" for what, names in listed if names
    )


def check(rows: Iterable[Row], found: Mapping[str, Tensor], where: object, spare: Collection[str] = ()) -> None:
    """`UserError` that lists every missing, extra and misshapen key, and every tensor that does not hold floating-point numbers."""
    problems = faults(rows, found, spare)
    if problems:
        raise UserError(
            f"{where} does not fit the architecture that its other keys tell: keys {problems}; the file may be damaged, or of a kind that "
            "is not supported"
        )


def to_ours(rows: Iterable[Row], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names (views). The file has been held against the rows before: see `check`."""
    tensors: dict[str, Tensor] = {}
    for r in rows:
        value = found[r.theirs]
        if r.form is Form.STACKED:
            tensors |= zip(r.ours, value.chunk(len(r.ours)), strict=True)
        else:
            tensors[r.ours[0]] = value.reshape(r.shape) if r.form is Form.POINT else value.T if r.form is Form.TURNED else value
    return tensors


def to_theirs(rows: Iterable[Row], tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Our tensors under their names; `UserError` that lists what is missing, extra or misshapen."""
    rows = list(rows)
    ours = [Row(name, (name,), r.shape) for r in rows for name in r.ours]
    problems = faults(ours, tensors)
    if problems:
        raise UserError(f"{where} does not fit its config: keys {problems}; use the weights that belong to the config")
    result: dict[str, Tensor] = {}
    for r in rows:
        values = [tensors[name] for name in r.ours]
        if r.form is Form.STACKED:
            result[r.theirs] = torch.cat(values)
        else:
            result[r.theirs] = values[0].T if r.form is Form.TURNED else values[0].reshape(r.stored)
    return result
