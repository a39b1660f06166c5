"""Numbers as vectors: sinusoidal features and the small network behind them.

feature_i(p) = sin or cos of p * 10000^(-i / (D/2 - shift)) (Vaswani et al. 2017, section 3.5; DDPM, appendix B).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.nn import invariant


def sinusoidal(position: Float[Tensor, " B"], width: int, cos_first: bool = True, shift: float = 0.0) -> Float[Tensor, "B D"]:
    """Sinusoidal features of positions (a timestep in 0..1000, a size in pixels): (B,) -> (B, width), float32, width even.

    `cos_first` is diffusers' `flip_sin_to_cos`, `shift` its `freq_shift`.
    """
    half = width // 2
    # In the order of operations that checkpoints were trained with: position 999 makes a rounding of the frequency a thousand times larger.
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=position.device) / (half - shift)
    frequency = torch.exp(exponent)
    angle = position.float()[:, None] * frequency
    pair = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(pair, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between: (B, D) -> (B, E)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.linear_1 = invariant.Linear(width, out_width)
        self.linear_2 = invariant.Linear(out_width, out_width)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.linear_2(invariant.silu(self.linear_1(x)))
