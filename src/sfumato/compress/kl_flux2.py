"""KL autoencoder of FLUX.2 (Black Forest Labs 2025, github.com/black-forest-labs/flux2): 32
channels at an eighth of the image's sides, packed.

What the network there diffuses is the packed latent: each 2x2 of cells is one cell of 4*32 = 128
channels, at a sixteenth of the sides,

    packed[4c + 2i + j, y, x] = cell[c, 2y + i, 2x + j]          z = (packed - running_mean) /
    sqrt(running_var + eps)

with the statistics of a batch norm that is never run (Ioffe & Szegedy 2015, arXiv:1502.03167,
algorithm 2). So that is the latent of this autoencoder, and its `LatentSpace` is 128 numbers, one
for each channel and place in the 2x2: unpacked, they would not be one a channel. Names and config
are diffusers' AutoencoderKLFlux2.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import Posterior
from sfumato.compress.conv_autoencoder import Decoder, Encoder, Halved, Levels, block_types
from sfumato.compress.kl import gaussian
from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.types import LatentSpace


@dataclass(frozen=True)
class KLFlux2Config:
    """The numbers of FLUX.2's autoencoder, with diffusers' names and defaults.
    `decoder_block_out_channels` None: as the encoder's.

    `sample_size` and `batch_norm_momentum` are notes: nothing here updates the batch norm.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 1024
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float | None = 0.1
    patch_size: tuple[int, ...] = (2, 2)

    def __post_init__(self) -> None:
        _ = self.encoder_levels, self.decoder_levels
        if (
            len(self.patch_size) != 2
            or self.patch_size[0] != self.patch_size[1]
            or self.patch_size[0] < 1
        ):
            raise UserError(
                f"config field patch_size={self.patch_size!r} is not supported: expected two equal numbers such as (2, 2)"
            )
        if len(self.decoder_levels.widths) != len(self.encoder_levels.widths):
            raise UserError(
                f"decoder_block_out_channels {self.decoder_block_out_channels} needs as many levels as block_out_channels "
                f"{self.block_out_channels}: the image would come back in another size"
            )

    @property
    def encoder_levels(self) -> Levels:
        """The numbers of the encoder."""
        return self._levels(self.block_out_channels)

    @property
    def decoder_levels(self) -> Levels:
        """The numbers of the decoder."""
        return self._levels(self.decoder_block_out_channels or self.block_out_channels)

    def _levels(self, widths: tuple[int, ...]) -> Levels:
        return Levels(
            widths,
            self.layers_per_block,
            self.norm_num_groups,
            (False,) * len(widths),
            self.mid_block_add_attention,
        )

    @property
    def packed_channels(self) -> int:
        """Channels of the packed latent."""
        return self.latent_channels * self.patch_size[0] ** 2

    @property
    def factor(self) -> int:
        """Pixels along a side for one cell of the packed latent."""
        return 2 ** (len(self.block_out_channels) - 1) * self.patch_size[0]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KLFlux2Config":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot
        honour, is refused.
        """
        fixed = {
            "act_fn": "silu",
            **block_types(len(values.get("block_out_channels", cls.block_out_channels))),
        }
        # A note for other tools, which some folders have and others, of the same network, have not.
        return read_config(cls, {k: v for k, v in values.items() if k != "force_upcast"}, fixed)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' AutoencoderKLFlux2 reads."""
        return {
            "_class_name": "AutoencoderKLFlux2",
            **asdict(self),
            **block_types(len(self.block_out_channels)),
            "act_fn": "silu",
        }


class AutoencoderKLFlux2(Halved):
    """FLUX.2's autoencoder: see the module's docstring. Its latents are packed: (B, 128, H/16,
    W/16) with the default numbers.
    """

    config: KLFlux2Config

    def __init__(self, config: KLFlux2Config):
        super().__init__()
        self.config = config
        self.channels = config.in_channels
        self.patch = config.patch_size[0]
        c = config.latent_channels
        self.encoder = Encoder(config.in_channels, 2 * c, config.encoder_levels)
        self.decoder = Decoder(c, config.out_channels, config.decoder_levels)
        self.quant_conv = batch_invariant.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = (
            batch_invariant.Conv2d(c, c, 1) if config.use_post_quant_conv else None
        )
        # Holds the statistics under the names of the checkpoints; nobody calls it.
        self.bn = nn.BatchNorm2d(
            config.packed_channels, config.batch_norm_eps, config.batch_norm_momentum, affine=False
        )

    @property
    def space(self) -> LatentSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels and factor of the packed latent, and the batch norm's statistics; before there
        are weights, mean 0 and std 1.
        """
        channels, mean, variance = (
            self.config.packed_channels,
            self.bn.running_mean,
            self.bn.running_var,
        )
        assert mean is not None and variance is not None
        if mean.is_meta:
            return LatentSpace(channels, self.config.factor, (0.0,) * channels, (1.0,) * channels)
        shifted = variance.double() + self.config.batch_norm_eps
        if not bool((shifted > 0).all()):
            lowest = float(variance.min())
            raise UserError(
                f"bn.running_var has {lowest:g}: expected variances above 0; the weights are damaged, copy them again"
            )
        return LatentSpace(
            channels,
            self.config.factor,
            tuple(mean.double().tolist()),
            tuple(shifted.sqrt().tolist()),
        )

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Stores per-channel statistics of packed latents; each std must be above
        sqrt(batch_norm_eps), which the batch norm adds.
        """
        least = math.sqrt(self.config.batch_norm_eps)
        if len(mean) != self.config.packed_channels or len(std) != len(mean) or min(std) < least:
            raise UserError(
                f"{len(mean)} means and {len(std)} stds, the smallest {min(std, default=0):g}: expected {self.config.packed_channels} of each, "
                f"and stds of at least {least:g}"
            )
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        with torch.no_grad():
            self.bn.running_mean.copy_(torch.tensor(mean))
            self.bn.running_var.copy_(
                torch.tensor(std, dtype=torch.float64).square() - self.config.batch_norm_eps
            )

    def to_cells(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B d y x"]:
        """Unpacks: four times fewer channels, twice the sides."""
        return F.pixel_shuffle(raw, self.patch)

    def to_posterior(self, made: Float[Tensor, "B d y x"]) -> Posterior:
        """Means and log variances of the cells, packed."""
        cells = gaussian(made)
        return Posterior(
            F.pixel_unshuffle(cells.mean, self.patch), F.pixel_unshuffle(cells.std, self.patch)
        )

    def to_config(self) -> dict[str, Any]:
        return self.config.to_dict()


CLASSES = {"AutoencoderKLFlux2": (AutoencoderKLFlux2, KLFlux2Config)}
