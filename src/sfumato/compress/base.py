"""Base classes of autoencoders: an encoder to a Gaussian or a point, and a decoder.

Latents are standardised everywhere: z = (raw - mean) / std per channel with statistics measured
over the data (EDM2, Karras et al. 2024, arXiv:2312.02696, appendix B.1). No other code multiplies
by a scaling factor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.registry import module_of, names
from sfumato.types import LatentSpace


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over raw latents.

    Attributes:
        mean: (B, C, h, w).
        std: (B, C, h, w), 0 for deterministic encoders.
    """

    mean: Float[Tensor, "B C h w"]
    std: Float[Tensor, "B C h w"]

    def sample(self, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The reparameterised draw mean + std * noise.

        Kingma & Welling 2014, arXiv:1312.6114, section 2.4.
        """
        return self.mean + self.std * noise

    def kl(self) -> Float[Tensor, " B"]:
        """KL divergence to the standard normal in nats, summed over the latent.

        Kingma & Welling 2014, arXiv:1312.6114, appendix B.
        """
        variance = self.std.square()
        return 0.5 * (self.mean.square() + variance - 1 - variance.clamp_min(1e-30).log()).sum(
            (1, 2, 3)
        )


class Autoencoder(nn.Module, ABC):
    """Image (B, 1|3, H, W) in [-1, 1] <-> latent. H and W are multiples of `space.factor`.

    Attributes:
        space: The latent space.
        channels: Channels of the image.
        config: The numbers of the network.
    """

    space: LatentSpace
    channels: int
    config: Any

    @abstractmethod
    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        """The distribution of raw (not standardised) latents."""

    @abstractmethod
    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The image of a raw latent, not clamped."""

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, with diffusers' names."""
        return self.config.to_dict()

    def encode(
        self, image: Float[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Encode images as standardised latents.

        Args:
            image: Pixels in [-1, 1].
            noise: Standard normal, for a draw from the posterior; None: its mean.
        """
        posterior = self.posterior(image)
        return self.space.standardise(posterior.mean if noise is None else posterior.sample(noise))

    def decode(self, z: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """Decode standardised latents as images, not clamped."""
        return self.reconstruct(self.space.restore(z))

    def forward(
        self, image: Float[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the training path in one call, which wrappers such as DDP need.

        Returns:
            The reconstruction, the posterior's mean and its std.
        """
        posterior = self.posterior(image)
        raw = posterior.mean if noise is None else posterior.sample(noise)
        return self.reconstruct(raw), posterior.mean, posterior.std

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


@cache
def registered() -> dict[str, tuple[type[Autoencoder], Any]]:
    """Every autoencoder of this folder and its config, by "_class_name" of config.json."""
    return {
        name: entry
        for file in names("compress")
        for name, entry in getattr(module_of("compress", file), "CLASSES", {}).items()
    }


class SequentialAutoencoder(Autoencoder):
    """An autoencoder of layers in a row, which can run strip by strip.

    `posterior` is `to_posterior` of the output of the encoder's layers. `reconstruct` is the output
    of the decoder's layers for `to_cells` of a latent.
    """

    @property
    def space(self) -> LatentSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels, factor and statistics of the latent."""
        return self.config.space

    @property
    def channels(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels of the image."""
        return self.config.in_channels

    @abstractmethod
    def encoder_parts(self) -> Sequence[nn.Module]:
        """The encoder's layers, in the order in which they run. SiLU follows a group norm."""

    @abstractmethod
    def decoder_parts(self) -> Sequence[nn.Module]:
        """The decoder's layers, as `encoder_parts`."""

    def to_cells(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B d y x"]:
        """The input of the decoder's first layer for a raw latent."""
        return raw

    @abstractmethod
    def to_posterior(self, encoded: Float[Tensor, "B d y x"]) -> Posterior:
        """The distribution of raw latents for the output of the encoder's last layer."""
