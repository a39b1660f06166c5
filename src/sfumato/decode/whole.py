"""Decode all at once, a few images at a time; NaN or infinity stops with a sentence instead of a
black picture.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder
from sfumato.errors import NumericalError, UserError
from sfumato.types import LatentSpace


def check_latent(space: LatentSpace, z: Tensor) -> None:
    """`UserError` for a tensor that is not a batch of latents of this space."""
    if z.ndim != 4 or z.shape[1] != space.channels or not z.is_floating_point():
        raise UserError(
            f"latent is {z.dtype} of shape {tuple(z.shape)}: expected floating-point numbers of shape (B, {space.channels}, h, w)"
        )


def check_decoded(image: Tensor, dtype: torch.dtype) -> None:
    """`NumericalError` that names the stage and the dtype where a pixel is not finite."""
    if not torch.isfinite(image).all():
        raise NumericalError(
            f"{int((~torch.isfinite(image)).sum())} of {image.numel()} pixels are NaN or infinite after decode ({str(dtype).removeprefix('torch.')}): "
            f"nothing was written; {'look for them in the latent' if dtype == torch.float32 else 'decode in float32'}"
        )


def whole(
    autoencoder: Autoencoder, z: Float[Tensor, "B C h w"], batch: int = 64
) -> Float[Tensor, "B c H W"]:
    """z (standardised) -> image in [-1, 1], clamped, float32; `batch` images at a time."""
    check_latent(autoencoder.space, z)
    if not len(z):
        factor = autoencoder.space.factor
        return torch.empty(
            0, autoencoder.channels, z.shape[2] * factor, z.shape[3] * factor, device=z.device
        )
    parts = []
    with torch.inference_mode():
        for part in z.split(batch):
            image = autoencoder.decode(part.to(autoencoder.dtype)).float()
            check_decoded(image, autoencoder.dtype)
            parts.append(image.clamp(-1, 1))
    return torch.cat(parts)  # outside: a plain tensor, which training can use
