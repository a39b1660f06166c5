"""What every autoencoder is: an encoder to a Gaussian (or a point), a decoder, and the latent space
between them.

Standardised latents everywhere: z = (raw - mean) / std per channel with statistics measured over
the data (EDM2, Karras et al. 2024, arXiv:2312.02696, appendix B.1); nobody outside multiplies by a
scaling factor.
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
    """A diagonal Gaussian over raw latents: mean and std, both (B, C, h, w); std 0 for
    deterministic encoders.
    """

    mean: Float[Tensor, "B C h w"]
    std: Float[Tensor, "B C h w"]

    def sample(self, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """mean + std * noise, the reparameterised draw (Kingma & Welling 2014, arXiv:1312.6114,
        section 2.4).
        """
        return self.mean + self.std * noise

    def kl(self) -> Float[Tensor, " B"]:
        """KL divergence to the standard normal in nats, summed over the latent (Kingma & Welling
        2014, appendix B).
        """
        variance = self.std.square()
        return 0.5 * (self.mean.square() + variance - 1 - variance.clamp_min(1e-30).log()).sum(
            (1, 2, 3)
        )


class Autoencoder(nn.Module, ABC):
    """image (B, 1|3, H, W) in [-1, 1] <-> latent. H and W are multiples of `space.factor`."""

    space: LatentSpace
    channels: int
    config: Any

    @abstractmethod
    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        """The distribution of raw (not standardised) latents."""

    @abstractmethod
    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """Raw latent -> image, not clamped."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, with diffusers' names."""

    def encode(
        self, image: Float[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """image -> z, standardised: the posterior's mean, or a draw where `noise` (standard normal)
        is given.
        """
        posterior = self.posterior(image)
        return self.space.standardise(posterior.mean if noise is None else posterior.sample(noise))

    def decode(self, z: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """z -> image, not clamped."""
        return self.reconstruct(self.space.restore(z))

    def forward(
        self, image: Float[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """image -> (reconstruction, posterior mean, posterior std); the training path, so that
        wrappers such as DDP see one call.
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
def registered() -> dict[str, tuple[type[Any], Any]]:
    """Every autoencoder of this folder and its config, by the "_class_name" of config.json: the
    tables CLASSES of its files.
    """
    return {
        name: entry
        for file in names("compress")
        for name, entry in getattr(module_of("compress", file), "CLASSES", {}).items()
    }


class InParts(Autoencoder):
    """An autoencoder whose halves are parts in a row, each given what the one before it made, so
    that they can be run strip by strip.

    posterior: `to_posterior` of what the encoder's parts make of the image; reconstruct: what the
    decoder's parts make of `to_cells`.
    """

    @abstractmethod
    def encoder_parts(self) -> Sequence[nn.Module]:
        """From the image on, in the order in which they run. A group norm has SiLU after it."""

    @abstractmethod
    def decoder_parts(self) -> Sequence[nn.Module]:
        """From the cells to the image, as `encoder_parts`."""

    def to_cells(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B d y x"]:
        """Raw latent -> what the decoder's first part is given."""
        return raw

    @abstractmethod
    def to_posterior(self, made: Float[Tensor, "B d y x"]) -> Posterior:
        """What the encoder's last part made -> the distribution of raw latents."""
