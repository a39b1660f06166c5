"""Tensors that are made when they are asked for: files larger than the memory are read, renamed,
cast and written one tensor at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.folder import storable
from sfumato.checkpoints.names.rows import Row
from sfumato.errors import UserError
from sfumato.io.atomic import write_streamed
from sfumato.io.safetensors import EIGHTS, aside, require_finite, scale_of, scaled


@dataclass(frozen=True)
class Lazy:
    """A tensor's dtype and shape, and how to make it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def outline(self) -> Tensor:
        """A tensor of this dtype and shape without numbers, for what looks at those only."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Table = Mapping[str, Lazy]


def present(tensors: Mapping[str, Tensor]) -> dict[str, Lazy]:
    """Tensors that are there, or mapped to a file."""

    def of(tensor: Tensor) -> Lazy:
        return Lazy(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    return {key: of(tensor) for key, tensor in tensors.items()}


def outlines(table: Table) -> dict[str, Tensor]:
    """For `rows.check`, which looks at shapes and dtypes."""
    return {key: lazy.outline for key, lazy in table.items()}


def sound(table: Table, where: object) -> dict[str, Lazy]:
    """The same; NaN and infinity in a tensor are a `UserError` when it is made. The last one is
    kept: what is cut into several is asked for several times.
    """
    last: dict[str, Tensor] = {}

    def of(key: str, lazy: Lazy) -> Lazy:
        def make() -> Tensor:
            if key not in last:
                last.clear()
                value = lazy.make()
                require_finite({key: value}, where)
                last[key] = value
            return last[key]

        return Lazy(lazy.dtype, lazy.shape, make)

    return {key: of(key, lazy) for key, lazy in table.items()}


def without_scales(table: Table) -> dict[str, Lazy]:
    """`weights.unscaled`: weights of eight bits that a scale belongs to become bfloat16, which
    holds every one of their numbers but for the scale's rounding.
    """
    beside = aside({key: lazy.dtype for key, lazy in table.items()})

    def of(key: str, lazy: Lazy) -> Lazy:
        scale = scale_of(key, table) if lazy.dtype in EIGHTS else None
        if scale is None:
            return lazy
        return Lazy(
            torch.bfloat16,
            lazy.shape,
            lambda: scaled(key, lazy.make(), table[scale].make(), torch.bfloat16),
        )

    return {key: of(key, lazy) for key, lazy in table.items() if key not in beside}


def lazily_ours(rows: Iterable[Row], theirs: Table) -> dict[str, Lazy]:
    """`rows.to_ours`. The file has been held against the rows before."""
    found: dict[str, Lazy] = {}
    for r in rows:
        for k, (name, shape) in enumerate(zip(r.ours, r.shapes, strict=True)):
            found[name] = _piece(r, theirs[r.theirs], k, shape)
    return found


def _piece(r: Row, source: Lazy, k: int, shape: tuple[int, ...]) -> Lazy:
    return Lazy(source.dtype, shape, lambda: r.take(source.make())[k])


def lazily_theirs(rows: Iterable[Row], ours: Table) -> dict[str, Lazy]:
    """`rows.to_theirs`. The tensors have been held against the rows before."""
    return {r.theirs: _whole(r, [ours[name] for name in r.ours]) for r in rows}


def _whole(r: Row, parts: list[Lazy]) -> Lazy:
    """Pieces of unequal dtypes become the widest of them."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        if part.dtype != dtype:
            dtype = torch.promote_types(
                *(torch.float32 if d in EIGHTS else d for d in (dtype, part.dtype))
            )
    return Lazy(dtype, r.stored, lambda: r.give([part.make().to(dtype) for part in parts]))


def stored(table: Table, dtype: torch.dtype | None) -> dict[str, Lazy]:
    """Weights as they will lie in a file (None: as they are); what does not fit is a
    `NumericalError` when it is made.

    In eight bits only matrices and convolutions are stored, and in bfloat16 what is beside them:
    vectors and tables are few, and count.
    """

    def of(key: str, lazy: Lazy) -> Lazy:
        wanted = lazy.dtype if dtype is None or not lazy.dtype.is_floating_point else dtype
        if wanted in EIGHTS and dtype is not None and not eighth(key, lazy.shape):
            wanted = torch.bfloat16
        return Lazy(
            wanted,
            lazy.shape,
            lambda: storable({key: lazy.make()}, wanted if wanted.is_floating_point else None)[key],
        )

    return {key: of(key, lazy) for key, lazy in table.items()}


def eighth(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is stored in eight bits where that is asked for."""
    return len(shape) > 1 and key.endswith(".weight")


def with_scales(table: Table, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Lazy]:
    """Matrices and convolutions in eight bits with a scale each (`scale_weight`), so that the
    largest number of each is the format's largest: what is a hundred thousand times smaller than
    others in another layer keeps its digits.
    """
    found: dict[str, Lazy] = {}
    for key, lazy in table.items():
        if eighth(key, lazy.shape) and lazy.dtype.is_floating_point:
            found |= _with_scale(key, lazy, dtype)
        else:
            found |= stored({key: lazy}, torch.bfloat16)
    return found | {"scaled_fp8": Lazy(dtype, (0,), lambda: torch.empty(0, dtype=dtype))}


def _with_scale(key: str, lazy: Lazy, dtype: torch.dtype) -> dict[str, Lazy]:
    largest = torch.finfo(dtype).max

    def scale() -> Tensor:
        """The smallest scale with which everything fits, rounding and all; 1 for a weight of
        zeros.
        """
        top = (
            float(storable({key: lazy.make()}, None)[key].float().abs().max())
            if lazy.shape and 0 not in lazy.shape
            else 0.0
        )
        return torch.tensor(top / largest * (1 + 1e-6) if top > 0 else 1.0)

    def weight() -> Tensor:
        return storable({key: lazy.make().float() / scale()}, dtype)[key]

    return {
        key: Lazy(dtype, lazy.shape, weight),
        f"{key.removesuffix('weight')}scale_weight": Lazy(torch.float32, (), scale),
    }


def write(
    path: str | Path,
    table: Table,
    notes: Mapping[str, str] | None = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Writes a safetensors file, one tensor at a time. done: called after each."""
    # which keeps the order of those of one size
    names = sorted(table, key=lambda name: -table[name].dtype.itemsize)

    def made() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, table[name].make()
            done()

    odd = [name for name in names if name == "__metadata__"]
    if odd:
        raise UserError(
            "a tensor called __metadata__ cannot be stored: safetensors keeps its notes under this name"
        )
    write_streamed(
        path, {name: (table[name].dtype, table[name].shape) for name in names}, made(), notes
    )
