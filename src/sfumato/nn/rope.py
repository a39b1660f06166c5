"""Rotary positional embedding (RoPE): queries and keys are rotated by their position.

(a, b) -> (a cos - b sin, a sin + b cos), with the angle p * theta^(-2i/d) for the i-th pair of d
features at position p (Su et al. 2021, arXiv:2104.09864, eq. 15). For images the pairs of a head
are divided among the axes, each with its own angles (FLUX: frame, row, column). Pairs are
neighbours: (0, 1), (2, 3), ...
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def angles(
    positions: Float[Tensor, "N A"], widths: Sequence[int], theta: float = 10000.0
) -> Float[Tensor, "N d 2"]:
    """Rotations (cos, sin) by the angles of positions, float32.

    Args:
        positions: One position per token and axis.
        widths: Features of a head that each axis rotates, even numbers; d = sum(widths) / 2.
        theta: Base of the frequencies.
    """
    angles_of_axes = []
    for axis, width in enumerate(widths):
        # float64: positions of thousands times frequencies of about one would lose digits.
        index = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
        angles_of_axes.append(positions[:, axis].double()[:, None] * theta ** (-index / width))
    angle = torch.cat(angles_of_axes, dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def grid(height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "N 2"]:
    """Positions (row, column) of the cells of a map, row by row: (height * width, 2)."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2).float()


def rotate(
    x: Float[Tensor, "B N H D"], rotations: Float[Tensor, "N d 2"]
) -> Float[Tensor, "B N H D"]:
    """Rotate each head's pairs by `rotations`, the angles of its position (`angles`).

    Computed in float32; the result has the dtype of x.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.compiler.is_compiling() or tracing:
        pairs, rotations = x.float().unflatten(-1, (-1, 2)), rotations[:, None]
        a, b, c, s = pairs[..., 0], pairs[..., 1], rotations[..., 0], rotations[..., 1]
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2).to(x.dtype)
    phase = torch.view_as_complex(rotations)[:, None]
    y: Any = _Rotation.apply(x, phase) if x.requires_grad else _rotate_complex(x, phase)
    return y


def _rotate_complex(x: Tensor, phase: Tensor) -> Tensor:
    """Rotate pairs as complex numbers, in one pass over memory."""
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs).mul(phase)).flatten(-2).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Rotation whose gradient rotates back, so that only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        x, phase = args
        ctx.save_for_backward(phase)
        return _rotate_complex(x, phase)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (phase,) = ctx.saved_tensors
        return _rotate_complex(grad_outputs[0], phase.conj()), None
