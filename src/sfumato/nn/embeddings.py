"""Embeddings: sinusoidal features, timestep embedding, patches and 2D positions.

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
    """Sinusoidal features of positions: (B,) -> (B, width), float32.

    Args:
        position: Timesteps in 0..1000, sizes in pixels, ...
        width: An even number.
        cos_first: diffusers' `flip_sin_to_cos`.
        shift: diffusers' `freq_shift`.
    """
    half = width // 2
    # The order of operations is that of training: position 999 makes a rounding error of the
    # frequency a thousand times larger.
    index = torch.arange(half, dtype=torch.float32, device=position.device)
    frequency = torch.exp(-math.log(10000.0) * index / (half - shift))
    angle = position.float()[:, None] * frequency
    pair = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(pair, dim=-1)


def guidance_features(scale: Float[Tensor, " B"], width: int) -> Float[Tensor, "B D"]:
    """Sinusoidal features of guidance scales for latent consistency models, float32.

    They are those of 1000 (scale - 1), sines first, with shift 1: a scale of 1 is off, which is
    w = 0 in the paper (Luo et al. 2023, arXiv:2310.04378, section 4.2; diffusers'
    `get_guidance_scale_embedding`).

    Args:
        scale: Guidance scales.
        width: At least 4; the last feature of an odd width is 0.
    """
    half = width // 2
    # In the order of operations of training, for the reason given in `sinusoidal`.
    step = torch.tensor(10000.0, device=scale.device).log() / (half - 1)
    index = torch.arange(half, dtype=torch.float32, device=scale.device)
    angle = (1000.0 * (scale.float() - 1))[:, None] * torch.exp(index * -step)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, width % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between: (B, D) -> (B, E).

    With `cond_width` the features of a condition are projected and added to the input.
    """

    def __init__(
        self, width: int, out_width: int, bias: bool = True, cond_width: int | None = None
    ):
        super().__init__()
        self.width = width
        self.linear_1 = batch_invariant.Linear(width, out_width, bias=bias)
        self.cond_proj = None
        if cond_width is not None:
            self.cond_proj = batch_invariant.Linear(cond_width, width, bias=False)
        self.linear_2 = batch_invariant.Linear(out_width, out_width, bias=bias)

    def forward(
        self, x: Float[Tensor, "B D"], cond: Float[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B E"]:
        """Embed features, and those of a condition."""
        if self.cond_proj is not None and cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(batch_invariant.silu(self.linear_1(x)))

    def embed(self, position: Float[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N E"]:
        """Embed numbers by their sinusoidal features, which are cast to `dtype`."""
        return self(sinusoidal(position, self.width).to(dtype))


class TimeEmbedding(nn.Module):
    """Time, guidance scale and pooled text as one embedding: (B,), (B, V) -> (B, E).

    The vector holds `pooled` numbers (0: none) and, with `guidance`, one more, whose thousandfold
    is embedded as time is.
    """

    def __init__(
        self, width: int, num_features: int, pooled: int, guidance: bool = False, bias: bool = True
    ):
        super().__init__()
        self.pooled = pooled
        self.timestep_embedder = TimestepEmbedding(num_features, width, bias)
        self.guidance_embedder = TimestepEmbedding(num_features, width, bias) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled, width, bias) if pooled else None

    def forward(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B E"]:
        """Embed timesteps in 0..1000 and a vector, with features in `dtype`."""
        c = self.timestep_embedder.embed(timestep, dtype)
        if vector is not None and self.guidance_embedder is not None:
            c = c + self.guidance_embedder.embed(1000 * vector[:, -1].float(), dtype)
        if vector is not None and self.text_embedder is not None:
            c = c + self.text_embedder(vector[:, : self.pooled].to(dtype))
        return c


class PatchEmbed(nn.Module):
    """Embed the patches of a latent as tokens, row by row: (B, C, h, w) -> (B, h/p * w/p, D).

    Dosovitskiy et al. 2020, arXiv:2010.11929. Sides must be multiples of the patch size (`padded`).
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = batch_invariant.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        """Embed the patches of a latent."""
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatched(y: Float[Tensor, "B N D"], rows: int, patch: int) -> Float[Tensor, "B C h w"]:
    """Arrange tokens as a map: `from_patches` with channels last within a token.

    D = patch * patch * C.
    """
    b, n, _ = y.shape
    y = y.reshape(b, rows, n // rows, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(b, y.shape[1], rows * patch, -1)


def patches(x: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B N D"]:
    """Cut a map into patches, row by row.

    token[c p^2 + i p + j] = x[c, p y + i, p z + j] for the patch at (y, z). Sides are multiples
    of p.
    """
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, -1, c * patch * patch)


def from_patches(y: Float[Tensor, "B N D"], rows: int, patch: int) -> Float[Tensor, "B C h w"]:
    """Invert `patches` for a map of `rows` rows of patches."""
    b, n, d = y.shape
    y = y.reshape(b, rows, n // rows, d // patch**2, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(b, d // patch**2, rows * patch, -1)


def sincos_2d(
    width: int, rows: int, columns: int, base: int, scale: float = 1.0
) -> Float[Tensor, "N D"]:
    """2D sinusoidal positional embedding of a map of tokens, row by row, float32 on the CPU.

    The first half of the features encodes the column, the second the row, sines first (MAE, He et
    al. 2021, arXiv:2111.06377; DiT). Positions are scaled so that any map spans `base` tokens,
    divided by `scale`. The result is cached: do not modify it.

    Returns:
        (rows * columns, width).
    """
    # A tensor of a trace must not be cached.
    make = _sincos_2d.__wrapped__ if torch.compiler.is_compiling() else _sincos_2d
    return make(width, rows, columns, base, scale)


@lru_cache(maxsize=16)
def _sincos_2d(
    width: int, rows: int, columns: int, base: int, scale: float
) -> Float[Tensor, "N D"]:
    half = width // 2

    def features(count: int) -> Tensor:  # (count, half)
        frequency = 10000.0 ** (-torch.arange(half // 2, dtype=torch.float64) / (half / 2))
        position = torch.arange(count, dtype=torch.float64) * (base / count) / scale
        angle = position[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    with torch.device("cpu"), torch.inference_mode(False):
        across = features(columns).expand(rows, -1, -1)
        down = features(rows)[:, None].expand(-1, columns, -1)
        return torch.cat([across, down], dim=-1).flatten(0, 1).float()


def padded(x: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B C k l"]:
    """Replicate the bottom and right edges until whole patches cover the map."""
    down, right = -x.shape[2] % patch, -x.shape[3] % patch
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
