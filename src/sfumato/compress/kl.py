"""KL autoencoder of Latent Diffusion and Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1, appendix G).

encoder: image -> (mean, log variance) of a Gaussian; decoder: raw latent -> image. Residual blocks at each resolution, halved between
resolutions (factor = 2^(levels-1)), self-attention at the lowest one. Module names and config are diffusers' AutoencoderKL.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import Autoencoder, Posterior
from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.nn import invariant
from sfumato.nn.attention import SpatialAttention
from sfumato.nn.blocks import Downsample, ResnetBlock, Upsample
from sfumato.types import LatentSpace

_EPS = 1e-6


@dataclass(frozen=True)
class KLConfig:
    """The numbers of a KL autoencoder, with diffusers' names. `latents_mean` and `latents_std` hold the measured statistics."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 256
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if not 2 <= len(self.block_out_channels) <= 6:
            raise UserError(
                f"block_out_channels {self.block_out_channels} has {len(self.block_out_channels)} levels: 2 to 6 make factors 2 to 32"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels {width} is not a multiple of norm_num_groups {self.norm_num_groups}: change one of them"
                )

    @property
    def space(self) -> LatentSpace:
        """Measured statistics where present, otherwise those that one scaling factor and shift stand for."""
        c = self.latent_channels
        mean = self.latents_mean or (self.shift_factor or 0.0,) * c
        std = self.latents_std or (1.0 / self.scaling_factor,) * c
        return LatentSpace(c, 2 ** (len(self.block_out_channels) - 1), tuple(mean), tuple(std))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KLConfig":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot honour, is refused."""
        n = len(values.get("block_out_channels", (64,)))
        fixed = {"act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        return read_config(cls, values, fixed)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' AutoencoderKL reads."""
        n = len(self.block_out_channels)
        extra = {"act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        return {"_class_name": "AutoencoderKL", **asdict(self), **extra}


class _Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, _EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, channels, groups, _EPS)] if attention else [])

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Level(nn.Module):
    """Residual blocks at one resolution, then (except at the last level) a step to the next one."""

    def __init__(self, in_channels: int, channels: int, depth: int, groups: int, step: nn.Module | None, down: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(in_channels if i == 0 else channels, channels, groups, _EPS) for i in range(depth)])
        if step is not None:
            self.add_module("downsamplers" if down else "upsamplers", nn.ModuleList([step]))
        self.step = [step] if step is not None else []  # a plain list: the module is registered under its own name above

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        for resnet in self.resnets:
            x = resnet(x)
        for step in self.step:
            x = step(x)
        return x


class Encoder(nn.Module):
    """image (B, 1|3, H, W) in [-1, 1] -> moments (B, 2c, h, w): mean and log variance."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = invariant.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], w, config.layers_per_block, groups, Downsample(w, 0) if i < len(widths) - 1 else None, down=True)
            for i, w in enumerate(widths)
        )
        self.mid_block = _Middle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = invariant.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(invariant.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Raw latent (B, c, h, w) -> image (B, 1|3, H, W), about [-1, 1], not clamped."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = invariant.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], w, config.layers_per_block + 1, groups, Upsample(w) if i < len(widths) - 1 else None, down=False)
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = invariant.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        x = self.mid_block(self.conv_in(raw))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(invariant.silu(self.conv_norm_out(x)))


class AutoencoderKL(Autoencoder):
    """The KL autoencoder: see the module's docstring. Built from a `KLConfig`; weights are random until loaded."""

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        self.channels = config.in_channels
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = invariant.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = invariant.Conv2d(c, c, 1) if config.use_post_quant_conv else None

    @property
    def space(self) -> LatentSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels, factor and statistics of the latent."""
        return self.config.space

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Stores per-channel statistics of raw latents, measured over the data, so that z is standardised."""
        self.config = replace(self.config, latents_mean=tuple(mean), latents_std=tuple(std))

    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        factor = self.space.factor
        if image.shape[1] != self.channels or image.shape[2] % factor or image.shape[3] % factor:
            raise UserError(
                f"image of shape {tuple(image.shape)}: this autoencoder takes {self.channels} channels and sides that are multiples of {factor}"
            )
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)))

    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return self.decoder(raw if self.post_quant_conv is None else self.post_quant_conv(raw))

    def to_config(self) -> dict[str, Any]:
        return self.config.to_dict()
