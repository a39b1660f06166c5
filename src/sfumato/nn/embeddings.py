"""Numbers as vectors: sinusoidal features and the small network behind them.

feature_i(p) = sin or cos of p * 10000^(-i / (D/2 - shift)) (Vaswani et al. 2017, section 3.5; DDPM,
appendix B).
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.kernels import batch_invariant


def sinusoidal(
    position: Float[Tensor, " B"], width: int, cos_first: bool = True, shift: float = 0.0
) -> Float[Tensor, "B D"]:
    """Sinusoidal features of positions (a timestep in 0..1000, a size in pixels): (B,) -> (B,
    width), float32, width even.

    `cos_first` is diffusers' `flip_sin_to_cos`, `shift` its `freq_shift`.
    """
    half = width // 2
    # In the order of operations that checkpoints were trained with: position 999 makes a rounding
    # of the frequency a thousand times larger.
    exponent = (
        -math.log(10000.0)
        * torch.arange(half, dtype=torch.float32, device=position.device)
        / (half - shift)
    )
    frequency = torch.exp(exponent)
    angle = position.float()[:, None] * frequency
    pair = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(pair, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between: (B, D) -> (B, E)."""

    def __init__(self, width: int, out_width: int, bias: bool = True):
        super().__init__()
        self.linear_1 = batch_invariant.Linear(width, out_width, bias=bias)
        self.linear_2 = batch_invariant.Linear(out_width, out_width, bias=bias)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.linear_2(batch_invariant.silu(self.linear_1(x)))


class PatchEmbed(nn.Module):
    """Patches of a latent as tokens, and where they lie: (B, C, h, w) -> (B, h/p * w/p, D), row by
    row (Dosovitskiy et al. 2020, arXiv:2010.11929).

    Sides that are no multiple of the patch's are the caller's to fill up: see `padded`.
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = batch_invariant.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatched(y: Float[Tensor, "B N D"], rows: int, patch: int) -> Float[Tensor, "B C h w"]:
    """Tokens in rows of patches -> a map: D = patch * patch * C numbers a token, channels last."""
    b, n, _ = y.shape
    y = y.reshape(b, rows, n // rows, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(b, y.shape[1], rows * patch, -1)


def patches(x: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B N D"]:
    """A map as tokens, row by row of patches: token[c p^2 + i p + j] = x[c, p y + i, p z + j] for
    the patch at (y, z). Sides are multiples of p.
    """
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, -1, c * patch * patch)


def from_patches(y: Float[Tensor, "B N D"], rows: int, patch: int) -> Float[Tensor, "B C h w"]:
    """`patches`, undone; `rows` of patches."""
    b, n, d = y.shape
    y = y.reshape(b, rows, n // rows, d // patch**2, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(b, d // patch**2, rows * patch, -1)


def sincos_2d(
    width: int, rows: int, columns: int, base: int, scale: float = 1.0
) -> Float[Tensor, "N D"]:
    """Sinusoidal features of the places of a map of tokens, row by row, float32 on the CPU: (rows *
    columns, width); not to be changed.

    The first half of a token's numbers is of its column, the second of its row; in each, sines come
    first (MAE, He et al. 2021, arXiv:2111.06377; DiT). Places are stretched so that any map covers
    what `base` tokens cover, divided by `scale`.
    """
    # what a compiler looks at is no tensor to remember
    make = _sincos_2d.__wrapped__ if torch.compiler.is_compiling() else _sincos_2d
    return make(width, rows, columns, base, scale)


@lru_cache(maxsize=16)
def _sincos_2d(
    width: int, rows: int, columns: int, base: int, scale: float
) -> Float[Tensor, "N D"]:
    half = width // 2

    def waves(count: int) -> Tensor:  # (count, half)
        frequency = 10000.0 ** (-torch.arange(half // 2, dtype=torch.float64) / (half / 2))
        angle = (torch.arange(count, dtype=torch.float64) * (base / count) / scale)[
            :, None
        ] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    with torch.device("cpu"), torch.inference_mode(False):
        across, down = (
            waves(columns).expand(rows, -1, -1),
            waves(rows)[:, None].expand(-1, columns, -1),
        )
        return torch.cat([across, down], dim=-1).flatten(0, 1).float()


def padded(x: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B C k l"]:
    """The map with its edge going on, at the bottom and the right, until whole patches cover it."""
    down, right = -x.shape[2] % patch, -x.shape[3] % patch
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
