"""Tiny autoencoders, distilled from a big one of the same latents: TAESD and its kin (Bohan 2023,
github.com/madebyollin/taesd).

Residual blocks of three convolutions and ReLU, one width throughout, no norms; the latent is a
point, not a Gaussian. Inside, images are in [0, 1] and the decoder softly limits its latent, 3
tanh(raw / 3). The raw latent is the big autoencoder's *standardised* one (scaling factor, shift, or
FLUX.2's batch norm already applied), so the latent space is mean 0 and std 1 in every channel.

The one for FLUX.2 (taef2) adds a branch before each block at the lowest resolution,

    x = x + W2 relu(GroupNorm_4(W1 x)),   W1: C -> 4C,  W2: 4C -> C,

whose group norm sees the whole picture. Config and names are diffusers' AutoencoderTiny, which does
not know that branch: folders with it are of class "SfumatoAutoencoderTiny".
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import InParts, Posterior
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
    """The numbers of a tiny autoencoder, with diffusers' names and defaults; `use_midblock_gn`:
    with taef2's branch, which they lack.

    num_encoder_blocks, num_decoder_blocks: residual blocks at each resolution, in the order in
    which the data pass. `latent_magnitude`, `latent_shift` (for latents kept as 8-bit pictures) and
    `force_upcast` are notes that other tools read.
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
        levels = {len(self.encoder_block_out_channels), len(self.decoder_block_out_channels)}
        levels |= {len(self.num_encoder_blocks), len(self.num_decoder_blocks)}
        if len(levels) != 1 or not 2 <= max(levels) <= 6:
            raise UserError(
                f"num_encoder_blocks {self.num_encoder_blocks}, num_decoder_blocks {self.num_decoder_blocks}, encoder_block_out_channels "
                f"{self.encoder_block_out_channels} and decoder_block_out_channels {self.decoder_block_out_channels} of a tiny autoencoder: "
                f"expected as many numbers in each, 2 to 6"
            )
        for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
            if len(set(getattr(self, name))) != 1:
                raise UserError(
                    f"{name} {getattr(self, name)} is not supported: expected one width at all levels, such as (64, 64, 64, 64)"
                )

    @property
    def space(self) -> LatentSpace:
        """Mean 0 and std 1, unless a scaling factor and a shift say otherwise."""
        c = self.latent_channels
        return LatentSpace(
            c,
            2 ** (len(self.num_encoder_blocks) - 1),
            (self.shift_factor,) * c,
            (1.0 / self.scaling_factor,) * c,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TinyConfig":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot
        honour, is refused.
        """
        # diffusers notes the decoder's widths a second time, under the name that other autoencoders
        # have for theirs.
        again = {
            "block_out_channels": values.get(
                "decoder_block_out_channels", cls.decoder_block_out_channels
            )
        }
        return read_config(cls, values, _FIXED | again)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' AutoencoderTiny reads; of a class that it does not know where
        the branch is in use.
        """
        values = asdict(self) | _FIXED
        if values.pop("use_midblock_gn"):
            return {"_class_name": _OWN_CLASS, **values, "use_midblock_gn": True}
        return {"_class_name": "AutoencoderTiny", **values}


class Block(nn.Module):
    """relu(convs(x) + x), with the branch added to x before where there is one: (B, C, h, w) -> (B,
    C, h, w).
    """

    def __init__(self, width: int, branch: bool):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.pool: nn.Sequential | None = None
        if branch:
            wide = 4 * width
            first, last = (
                batch_invariant.Conv2d(width, wide, 1, bias=False),
                batch_invariant.Conv2d(wide, width, 1, bias=False),
            )
            self.pool = nn.Sequential(first, nn.GroupNorm(_GROUPS, wide), nn.ReLU(), last)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Scale(nn.Module):
    """factor * x + shift, number by number: from an image's range to the network's, or back."""

    def __init__(self, factor: float, shift: float):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        return x * self.factor + self.shift


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> batch_invariant.Conv2d:
    return batch_invariant.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class _Encoder(nn.Module):
    """image (B, C, H, W) in [-1, 1] -> raw latent (B, c, h, w)."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width, counts = config.encoder_block_out_channels[0], config.num_encoder_blocks
        layers: list[nn.Module] = []
        for i, count in enumerate(counts):
            layers.append(
                _conv(width, width, stride=2, bias=False) if i else _conv(config.in_channels, width)
            )
            layers += [
                Block(width, config.use_midblock_gn and i == len(counts) - 1) for _ in range(count)
            ]
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
                layers += [
                    nn.Upsample(scale_factor=2, mode="nearest"),
                    _conv(width, width, bias=False),
                ]
        self.layers = nn.Sequential(*layers, _conv(width, config.out_channels))
        self.scale = Scale(2, -1)

    def forward(self, limited: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return self.scale(self.layers(limited))


class AutoencoderTiny(InParts):
    """A tiny autoencoder: see the module's docstring. Built from a `TinyConfig`; weights are random
    until loaded.
    """

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.channels = config.in_channels
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    @property
    def space(self) -> LatentSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels, factor and statistics of the latent."""
        return self.config.space

    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        check_image(image, self.channels, self.space.factor)
        return self.to_posterior(self.encoder(image))

    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return self.decoder(self.to_cells(raw))

    def encoder_parts(self) -> list[nn.Module]:
        return [self.encoder.scale, *self.encoder.layers]

    def decoder_parts(self) -> list[nn.Module]:
        return [*self.decoder.layers, self.decoder.scale]

    def to_cells(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c h w"]:
        """Softly limited to [-3, 3]."""
        return 3 * torch.tanh(raw / 3)

    def to_posterior(self, made: Float[Tensor, "B c h w"]) -> Posterior:
        """A point: std is 0."""
        return Posterior(made, torch.zeros_like(made))

    def to_config(self) -> dict[str, Any]:
        return self.config.to_dict()


CLASSES = {
    "AutoencoderTiny": (AutoencoderTiny, TinyConfig),
    _OWN_CLASS: (AutoencoderTiny, TinyConfig),
}
