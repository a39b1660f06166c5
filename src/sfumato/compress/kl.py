"""KL autoencoder of Latent Diffusion and Stable Diffusion.

Rombach et al. 2022, arXiv:2112.10752, section 3.1, appendix G.

encoder: image -> (mean, log variance) of a Gaussian; decoder: raw latent -> image. Both are those
of `compress.conv_autoencoder`. Config and names are diffusers' AutoencoderKL: Stable Diffusion 1 to
3 and XL, FLUX.1 and LDM's kl-f4 to kl-f32 are numbers of this class.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Posterior
from sfumato.compress.conv_autoencoder import (
    ConvAutoencoder,
    ConvAutoencoderConfig,
    Decoder,
    Encoder,
    without_plain_types,
)
from sfumato.config import read_config
from sfumato.kernels import batch_invariant
from sfumato.types import LatentSpace
from sfumato.validate import number_in

_DEFAULT_SCALE = 0.18215  # diffusers' default of scaling_factor


@dataclass(frozen=True)
class KLConfig(ConvAutoencoderConfig):
    """The numbers of a KL autoencoder, with diffusers' names.

    `latents_mean` and `latents_std` hold the measured statistics.
    """

    scaling_factor: float = _DEFAULT_SCALE
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number_in("scaling_factor", self.scaling_factor, above=0)

    @property
    def space(self) -> LatentSpace:
        """Measured statistics where present, otherwise those of the scaling factor and shift."""
        c = self.latent_channels
        mean = self.latents_mean or (self.shift_factor or 0.0,) * c
        std = self.latents_std or (1.0 / self.scaling_factor,) * c
        return LatentSpace(c, self.factor, tuple(mean), tuple(std))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KLConfig":
        """Read a diffusers config; `UserError` for unknown fields and unsupported values.

        A scaling factor beside measured statistics divides the stds, as in diffusers' SDXL pipeline
        (Playground v2.5 has 0.5), except for the default, which every config has.
        """
        config = read_config(cls, without_plain_types(values), {"act_fn": "silu"})
        if config.latents_std is None or config.scaling_factor in (_DEFAULT_SCALE, 1.0):
            return config
        std = tuple(s / config.scaling_factor for s in config.latents_std)
        return replace(config, latents_std=std, scaling_factor=1.0)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' AutoencoderKL reads."""
        values = {**self.fields(), "act_fn": "silu"}
        if self.latents_std is not None and self.scaling_factor != _DEFAULT_SCALE:
            # the statistics have precedence: readers of both must get the same latents
            values["scaling_factor"] = 1.0
        return {"_class_name": "AutoencoderKL", **values}


class GaussianAutoencoder(ConvAutoencoder):
    """An autoencoder whose encoder gives means and log variances, as channels in a row."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config.in_channels, 2 * c, config.encoder_levels)
        self.decoder = Decoder(c, config.out_channels, config.decoder_levels)
        self.quant_conv = batch_invariant.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = (
            batch_invariant.Conv2d(c, c, 1) if config.use_post_quant_conv else None
        )

    def to_posterior(self, encoded: Float[Tensor, "B D h w"]) -> Posterior:
        """The Gaussian of means and log variances, which are limited to [-30, 20]."""
        mean, log_variance = encoded.chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)))


class AutoencoderKL(GaussianAutoencoder):
    """The KL autoencoder: see the module's docstring.

    Built from a `KLConfig`; weights are random until loaded.
    """

    config: KLConfig

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Store per-channel statistics of raw latents, measured over the data.

        They standardise z.
        """
        self.config = replace(
            self.config, latents_mean=tuple(mean), latents_std=tuple(std), scaling_factor=1.0
        )


CLASSES = {"AutoencoderKL": (AutoencoderKL, KLConfig)}
