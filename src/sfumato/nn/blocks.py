"""Convolutional parts of U-Nets and autoencoders: residual block, downsample, upsample.

Pre-activation residual blocks (He et al. 2016, arXiv:1603.05027) with group norm (Wu & He 2018,
arXiv:1803.08494) and SiLU, as in DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B). Parameter
names are diffusers'.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.kernels import batch_invariant


class ResnetBlock(nn.Module):
    """Residual block with a time embedding: (B, C, H, W) -> (B, D, H, W).

    Norm, SiLU, conv, time embedding, norm, SiLU, dropout, conv, plus the input.

    Args:
        in_channels: C.
        out_channels: D.
        groups: Groups of the norms.
        eps: Epsilon of the norms.
        time_width: Width T of the time embedding (B, T), None for none.
        scale_shift: The time embedding scales and shifts the second norm (Dhariwal & Nichol 2021,
            arXiv:2105.05233, eq. 3) instead of being added before it.
        dropout: Probability.
        resample: "down" averages 2x2 pixels, "up" repeats each, of both the input and the first
            convolution's input (the same paper, section 3: "BigGAN up/downsampling").
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        time_width: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = batch_invariant.GroupNorm(groups, in_channels, eps)
        self.conv1 = batch_invariant.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = (
            batch_invariant.Linear(time_width, out_channels * (2 if scale_shift else 1))
            if time_width
            else None
        )
        self.norm2 = batch_invariant.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = batch_invariant.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            batch_invariant.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else None
        )

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        time: Float[Tensor, "B T"] | None = None,
        size: torch.Size | None = None,
    ) -> Float[Tensor, "B D h w"]:
        """Return the block's output.

        Args:
            x: Feature map.
            time: The activated time embedding.
            size: Output size of "up" for maps with an odd side; default: twice the input.
        """
        y = batch_invariant.silu(self.norm1(x))
        if self.resample is not None:
            x, y = self._resampled(x, size), self._resampled(y, size)
        y = self.conv1(y)
        if self.time_emb_proj is None:
            y = self.norm2(y)
        else:
            assert time is not None, "this block was built with a time embedding"
            shift = self.time_emb_proj(time)[:, :, None, None]
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)
                y = self.norm2(y) * (1 + scale) + shift
            else:
                y = self.norm2(y + shift)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(self.dropout(batch_invariant.silu(y)), plus=shortcut)

    def _resampled(
        self, x: Float[Tensor, "B C H W"], size: torch.Size | None
    ) -> Float[Tensor, "B C h w"]:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        size = size or torch.Size((2 * x.shape[-2], 2 * x.shape[-1]))
        return F.interpolate(x, size=tuple(size), mode="nearest")


class Downsample(nn.Module):
    """Convolution of stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)) with padding 1.

    padding 0 pads one pixel at the right and bottom only, as the autoencoders of Stable Diffusion
    do: sizes then round down.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.asymmetric = padding == 0
        self.conv = batch_invariant.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Halve the map."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a convolution: (B, C, h, w) -> (B, C, H, W).

    `size` replaces twice the size for maps with an odd side.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = batch_invariant.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "B C h w"], size: torch.Size | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Double the map, or resize it to `size`."""
        if size is None or size == (2 * x.shape[-2], 2 * x.shape[-1]):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
