"""Sanity of a feature network: its distance of noise and of flat colours from real images.

    noise          every pixel uniform in [0, 1]
    flat colours   every image one colour, the mean of a real image

Both are worthless as samples. Features whose Frechet distance does not tell them from real images
tell no model apart either: grey 28x28 features once gave grey blobs 1.8 beside a floor of 2.5.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluate.features import FeatureNetwork, extract
from sfumato.evaluate.frechet import GaussianStatistics, frechet_distance, gaussian
from sfumato.evaluate.inputs import Images

COUNT = 300
"""Most images of each kind: enough to tell them apart, and quickly measured."""
SEPARATION = 1.25
"""Least multiple of the floor that noise and flat colours must have.

The floor is high for few images: with 1280 features of photographs, flat colours are at 1.5 times
the floor of 12 images and at 2.2 times that of 60."""


@dataclass(frozen=True)
class Sanity:
    """Frechet distances of worthless images, beside the floor of as many real ones.

    Attributes:
        noise: Of uniform noise.
        flat: Of flat colours.
        floor: Of real images that the reference does not contain.
        count: Number of images of each.
    """

    noise: float
    flat: float
    floor: float
    count: int

    @property
    def separates(self) -> bool:
        """True if both are at least `SEPARATION` times as far as real images."""
        return min(self.noise, self.flat) >= SEPARATION * self.floor

    def require(self, name: str) -> None:
        """Raise `UserError` if worthless images are about as near as real ones.

        Args:
            name: Of the features.
        """
        if not self.separates:
            raise UserError(
                f"features {name!r} with {self.count} images do not tell worthless images from "
                f"real ones: their Frechet distance is {self.noise:.4g} for noise, {self.flat:.4g} "
                f"for flat colours and {self.floor:.4g} for real images; give more held-out "
                "images, or other features"
            )


def sanity(
    features: FeatureNetwork,
    real: Images,
    reference: GaussianStatistics,
    floor: float,
    seed: int = 0,
) -> Sanity:
    """Measure noise and flat colours against the reference.

    Args:
        features: The feature network.
        real: The real images (n, C, H, W) in [0, 1] whose distance is the floor.
        reference: Statistics of the training images.
        floor: Frechet distance of `real` from the reference.
        seed: Of the noise.
    """

    def distance(images: Float[Tensor, "n C H W"]) -> float:
        return frechet_distance(gaussian(extract(features, images), reference.features), reference)

    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(seed))
    flat = real.mean(dim=(2, 3), keepdim=True).expand_as(real).contiguous()
    return Sanity(distance(noise), distance(flat), floor, len(real))
