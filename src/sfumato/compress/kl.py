"""KL autoencoder of Latent Diffusion and Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1, appendix G).

encoder: image -> (mean, log variance) of a Gaussian; decoder: raw latent -> image. The halves are those of `compress.halves`. Config and
names are diffusers' AutoencoderKL: Stable Diffusion 1 to 3 and XL, FLUX.1 and LDM's kl-f4 to kl-f32 are numbers of this class.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Posterior
from sfumato.compress.halves import Decoder, Encoder, Halved, Levels, block_types, down_attention, up_attention
from sfumato.config import read_config
from sfumato.nn import invariant
from sfumato.types import LatentSpace

_UNSAID = 0.18215  # what a config carries as its scaling factor where nobody chose one


@dataclass(frozen=True)
class KLConfig:
    """The numbers of a KL autoencoder, with diffusers' names. `latents_mean` and `latents_std` hold the measured statistics.

    `down_block_types` and `up_block_types`: None for levels without attention, otherwise diffusers' names. `sample_size` and
    `force_upcast` are notes that other tools read.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 256
    scaling_factor: float = _UNSAID
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _ = self.encoder_levels, self.decoder_levels  # they refuse what does not fit

    @property
    def encoder_levels(self) -> Levels:
        """The numbers of the encoder."""
        return self._levels(down_attention(self.down_block_types, len(self.block_out_channels)))

    @property
    def decoder_levels(self) -> Levels:
        """The numbers of the decoder."""
        return self._levels(up_attention(self.up_block_types, len(self.block_out_channels)))

    def _levels(self, attention: tuple[bool, ...]) -> Levels:
        return Levels(self.block_out_channels, self.layers_per_block, self.norm_num_groups, attention, self.mid_block_add_attention)

    @property
    def space(self) -> LatentSpace:
        """Measured statistics where present, otherwise those that one scaling factor and shift stand for."""
        c = self.latent_channels
        mean = self.latents_mean or (self.shift_factor or 0.0,) * c
        std = self.latents_std or (1.0 / self.scaling_factor,) * c
        return LatentSpace(c, 2 ** (len(self.block_out_channels) - 1), tuple(mean), tuple(std))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KLConfig":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot honour, is refused.

        A scaling factor beside measured statistics divides the stds, as in diffusers' SDXL pipeline (Playground v2.5 has 0.5), except for
        the default, which is there where nobody chose one.
        """
        config = read_config(cls, plain_types_left_out(values), {"act_fn": "silu"})
        if config.latents_std is None or config.scaling_factor in (_UNSAID, 1.0):
            return config
        std = tuple(s / config.scaling_factor for s in config.latents_std)
        return replace(config, latents_std=std, scaling_factor=1.0)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' AutoencoderKL reads."""
        levels = len(self.block_out_channels)
        values = {**asdict(self), **{k: getattr(self, k) or v for k, v in block_types(levels).items()}, "act_fn": "silu"}
        if self.latents_std is not None and self.scaling_factor != _UNSAID:
            values["scaling_factor"] = 1.0  # the statistics have come first: who reads both must find the same latents
        return {"_class_name": "AutoencoderKL", **values}


def plain_types_left_out(values: dict[str, Any]) -> dict[str, Any]:
    """A config without the block types that say no more than that no level has attention, so that equal networks have equal configs."""
    plain = block_types(len(values.get("block_out_channels", (64,))))
    return {k: v for k, v in values.items() if k not in plain or list(v or plain[k]) != plain[k]}


class AutoencoderKL(Halved):
    """The KL autoencoder: see the module's docstring. Built from a `KLConfig`; weights are random until loaded."""

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        self.channels = config.in_channels
        c = config.latent_channels
        self.encoder = Encoder(config.in_channels, 2 * c, config.encoder_levels)
        self.decoder = Decoder(c, config.out_channels, config.decoder_levels)
        self.quant_conv = invariant.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = invariant.Conv2d(c, c, 1) if config.use_post_quant_conv else None

    @property
    def space(self) -> LatentSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels, factor and statistics of the latent."""
        return self.config.space

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Stores per-channel statistics of raw latents, measured over the data, so that z is standardised."""
        self.config = replace(self.config, latents_mean=tuple(mean), latents_std=tuple(std), scaling_factor=1.0)

    def to_posterior(self, made: Float[Tensor, "B D h w"]) -> Posterior:
        """Means and log variances, one after the other along the channels."""
        return gaussian(made)

    def to_config(self) -> dict[str, Any]:
        return self.config.to_dict()


def gaussian(moments: Float[Tensor, "B D h w"]) -> Posterior:
    """Mean and log variance, one after the other along the channels, as a posterior; log variances are limited to [-30, 20]."""
    mean, log_variance = moments.chunk(2, dim=1)
    return Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)))
