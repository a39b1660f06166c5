"""Previews without a decoder: image ~ W z + b at the latent's own resolution.

W and b are fitted by least squares to pairs of latents and images, once an autoencoder and from
images of any kind. A linear map from latent channels to colour is enough to judge a running sample,
and costs nothing (the same idea is known as latent2rgb).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.decode.whole import check_decoded


@dataclass(frozen=True)
class Preview:
    """A linear map from latents to small images.

    Attributes:
        weight: (colours, C), float32.
        bias: (colours,), float32.
    """

    weight: Float[Tensor, "c C"]
    bias: Float[Tensor, " c"]

    @classmethod
    def fit(cls, z: Float[Tensor, "B C h w"], image: Float[Tensor, "B c H W"]) -> "Preview":
        """Fit the map by least squares to images reduced to the latents' resolution.

        The ridge is 1e-3, for few pairs.

        Args:
            z: Standardised latents.
            image: Their images in [-1, 1].
        """
        small = F.interpolate(image.double(), z.shape[2:], mode="area")
        features = z.double().permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        targets = small.permute(0, 2, 3, 1).flatten(0, 2)
        ridge = 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(features.T @ features + ridge, features.T @ targets).float()
        return cls(solved[:-1].T.contiguous(), solved[-1])

    def __call__(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B c h w"]:
        """Preview latents as small images in [-1, 1].

        Raises:
            NumericalError: For NaN or infinity, which the clamp would hide.
        """
        image = torch.einsum("oc,bchw->bohw", self.weight.to(z), z) + self.bias.to(z)[:, None, None]
        check_decoded(image, z.dtype)
        return image.clamp(-1, 1)
