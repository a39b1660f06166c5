"""Rotary position embedding: queries and keys turn with their place, so that their product tells
how far apart they are.

(a, b) -> (a cos - b sin, a sin + b cos), with the angle p * theta^(-2i/d) for the i-th pair of d
numbers at place p (Su et al. 2021, arXiv:2104.09864, eq. 15). For pictures the pairs of a head are
shared out among the axes, each with angles of its own (FLUX: frame, row, column). Pairs are
neighbours: (0, 1), (2, 3), ...
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def angles(
    places: Float[Tensor, "N A"], widths: Sequence[int], theta: float = 10000.0
) -> Float[Tensor, "N d 2"]:
    """cos and sin for places on each of A axes, float32: axis a turns widths[a] numbers of a head
    (even); d = sum(widths) / 2 pairs.
    """
    found = []
    for axis, width in enumerate(widths):
        # float64, as places of thousands times frequencies of one lose digits otherwise
        frequency = theta ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=places.device) / width
        )
        found.append(places[:, axis].double()[:, None] * frequency)
    angle = torch.cat(found, dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def grid(height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "N 2"]:
    """Places (row, column) of the cells of a map, row by row: (height * width, 2)."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2).float()


def rotate(x: Float[Tensor, "B N H D"], turn: Float[Tensor, "N d 2"]) -> Float[Tensor, "B N H D"]:
    """Turns each head's pairs by the angles of its place. In float32, whatever the dtype of x,
    which the result has again.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        pairs, turn = x.float().unflatten(-1, (-1, 2)), turn[:, None]
        a, b, c, s = pairs[..., 0], pairs[..., 1], turn[..., 0], turn[..., 1]
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2).to(x.dtype)
    place = torch.view_as_complex(turn)[:, None]
    return _Turn.apply(x, place) if x.requires_grad else _turned(x, place)  # pyright: ignore[reportReturnType]


def _turned(x: Tensor, place: Tensor) -> Tensor:
    """As complex numbers, in one pass over memory."""
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs).mul(place)).flatten(-2).to(x.dtype)


class _Turn(torch.autograd.Function):
    """The gradient turns back: nothing but the angles has to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(place)
        return _turned(x, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (place,) = ctx.saved_tensors
        return _turned(gradient, place.conj()), None
