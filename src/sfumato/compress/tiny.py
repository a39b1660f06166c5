"""Tiny autoencoders, distilled from a big one of the same latents: TAESD and others.

Bohan 2023, github.com/madebyollin/taesd.

Residual blocks of three convolutions and ReLU, one width throughout, no norms; the latent is a
point, not a Gaussian. Inside, images are in [0, 1] and the decoder softly limits its latent, 3
tanh(raw / 3). The raw latent is the big autoencoder's *standardised* one (scaling factor, shift, or
FLUX.2's batch norm already applied), so the latent space is mean 0 and std 1 in every channel.

The one for FLUX.2 (taef2) adds a branch before each block at the lowest resolution,

    x = x + W2 relu(GroupNorm_4(W1 x)),   W1: C -> 4C,  W2: 4C -> C,

whose group norm is over the whole image. Config and names are diffusers' AutoencoderTiny, which
lacks that branch: folders with it are of class "SfumatoAutoencoderTiny".
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import Posterior, SequentialAutoencoder
from sfumato.compress.conv_autoencoder import check_image
from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.types import LatentSpace

_FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
_OWN_CLASS = "SfumatoAutoencoderTiny"
_GROUPS = 4  # of the branch's norm


@dataclass(frozen=True)
class TinyConfig:
    """The numbers of a tiny autoencoder, with diffusers' names and defaults.

    `latent_magnitude`, `latent_shift` (for latents kept as 8-bit images) and `force_upcast` are
    notes that other tools read.

    Attributes:
        num_encoder_blocks: Residual blocks at each resolution, the image's first.
        num_decoder_blocks: Residual blocks at each resolution, the latent's first.
        use_midblock_gn: With taef2's branch, which diffusers' class lacks.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    use_midblock_gn: bool = False

    def __post_init__(self) -> None:
        widths = ("encoder_block_out_channels", "decoder_block_out_channels")
        names = ("num_encoder_blocks", "num_decoder_blocks", *widths)
        levels = {len(getattr(self, name)) for name in names}
        if len(levels) != 1 or not 2 <= max(levels) <= 6:
            fields = ", ".join(f"{name} {getattr(self, name)}" for name in names)
            raise UserError(
                f"{fields} of a tiny autoencoder: expected as many numbers in each, 2 to 6"
            )
        for name in widths:
            if len(set(getattr(self, name))) != 1:
                raise UserError(
                    f"{name} {getattr(self, name)} is not supported: expected one width at all "
                    "levels, such as (64, 64, 64, 64)"
                )

    @property
    def space(self) -> LatentSpace:
        """Mean and std of the shift and the scaling factor: 0 and 1 by default."""
        c, factor = self.latent_channels, 2 ** (len(self.num_encoder_blocks) - 1)
        return LatentSpace(c, factor, (self.shift_factor,) * c, (1.0 / self.scaling_factor,) * c)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TinyConfig":
        """Read a diffusers config; `UserError` for unknown fields and unsupported values."""
        # diffusers writes the decoder's widths a second time, by the name of other autoencoders
        widths = values.get("decoder_block_out_channels", cls.decoder_block_out_channels)
        return read_config(cls, values, _FIXED | {"block_out_channels": widths})

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' AutoencoderTiny reads; with the branch, of sfumato's class."""
        values = asdict(self) | _FIXED
        if values.pop("use_midblock_gn"):
            return {"_class_name": _OWN_CLASS, **values, "use_midblock_gn": True}
        return {"_class_name": "AutoencoderTiny", **values}


class Block(nn.Module):
    """Residual block relu(convs(x) + x): (B, C, h, w) -> (B, C, h, w).

    The branch is added to x before, where there is one.
    """

    def __init__(self, width: int, branch: bool):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.pool: nn.Sequential | None = None
        if branch:
            wide = 4 * width
            first = batch_invariant.Conv2d(width, wide, 1, bias=False)
            last = batch_invariant.Conv2d(wide, width, 1, bias=False)
            self.pool = nn.Sequential(first, nn.GroupNorm(_GROUPS, wide), nn.ReLU(), last)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Apply the branch and the block."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Scale(nn.Module):
    """Map factor * x + shift, from an image's range to the network's, or back."""

    def __init__(self, factor: float, shift: float):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Scale and shift."""
        return x * self.factor + self.shift


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> batch_invariant.Conv2d:
    return batch_invariant.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class _Encoder(nn.Module):
    """Image (B, C, H, W) in [-1, 1] -> raw latent (B, c, h, w)."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width, counts = config.encoder_block_out_channels[0], config.num_encoder_blocks
        layers: list[nn.Module] = []
        for i, count in enumerate(counts):
            step = _conv(width, width, 2, False) if i else _conv(config.in_channels, width)
            branch = config.use_midblock_gn and i == len(counts) - 1
            layers += [step, *(Block(width, branch) for _ in range(count))]
        self.layers = nn.Sequential(*layers, _conv(width, config.latent_channels))
        self.scale = Scale(0.5, 0.5)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        return self.layers(self.scale(image))


class _Decoder(nn.Module):
    """Latent (B, c, h, w), limited to [-3, 3] -> image (B, C, H, W), about [-1, 1]."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width, counts = config.decoder_block_out_channels[0], config.num_decoder_blocks
        layers: list[nn.Module] = [_conv(config.latent_channels, width), nn.ReLU()]
        for i, count in enumerate(counts):
            layers += [Block(width, config.use_midblock_gn and i == 0) for _ in range(count)]
            if i < len(counts) - 1:
                step = nn.Upsample(scale_factor=2, mode="nearest")
                layers += [step, _conv(width, width, bias=False)]
        self.layers = nn.Sequential(*layers, _conv(width, config.out_channels))
        self.scale = Scale(2, -1)

    def forward(self, limited: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return self.scale(self.layers(limited))


class AutoencoderTiny(SequentialAutoencoder):
    """A tiny autoencoder: see the module's docstring.

    Built from a `TinyConfig`; weights are random until loaded.
    """

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        """The raw latent, a point; `UserError` for an image that does not fit."""
        check_image(image, self.channels, self.space.factor)
        return self.to_posterior(self.encoder(image))

    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The image of a raw latent, not clamped."""
        return self.decoder(self.to_cells(raw))

    def encoder_parts(self) -> list[nn.Module]:
        """The encoder's layers."""
        return [self.encoder.scale, *self.encoder.layers]

    def decoder_parts(self) -> list[nn.Module]:
        """The decoder's layers."""
        return [*self.decoder.layers, self.decoder.scale]

    def to_cells(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c h w"]:
        """The latent, softly limited to [-3, 3]."""
        return 3 * torch.tanh(raw / 3)

    def to_posterior(self, encoded: Float[Tensor, "B c h w"]) -> Posterior:
        """A point: std is 0."""
        return Posterior(encoded, torch.zeros_like(encoded))


CLASSES = {
    "AutoencoderTiny": (AutoencoderTiny, TinyConfig),
    _OWN_CLASS: (AutoencoderTiny, TinyConfig),
}
