"""Decode all at once, a few images at a time.

NaN or infinity raises an error: a black image would hide it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder
from sfumato.errors import NumericalError, UserError
from sfumato.types import LatentSpace


def check_latent(space: LatentSpace, z: Tensor) -> None:
    """Raise `UserError` for a tensor that is not a batch of latents of this space."""
    if z.ndim != 4 or z.shape[1] != space.channels or not z.is_floating_point():
        raise UserError(
            f"latent is {z.dtype} of shape {tuple(z.shape)}: expected floating-point numbers of "
            f"shape (B, {space.channels}, h, w)"
        )


def check_decoded(image: Tensor, dtype: torch.dtype) -> None:
    """Raise `NumericalError`, with the stage and the dtype, where a pixel is not finite."""
    faults = int((~torch.isfinite(image)).sum())
    if faults:
        advice = "look for them in the latent" if dtype == torch.float32 else "decode in float32"
        raise NumericalError(
            f"{faults} of {image.numel()} pixels are NaN or infinite after decode "
            f"({str(dtype).removeprefix('torch.')}): nothing was written; {advice}"
        )


def whole(
    autoencoder: Autoencoder, z: Float[Tensor, "B C h w"], batch: int = 64
) -> Float[Tensor, "B c H W"]:
    """Decode standardised latents.

    Args:
        autoencoder: The autoencoder.
        z: Standardised latents.
        batch: Images at a time.

    Returns:
        The images in [-1, 1], clamped, float32.

    Raises:
        UserError: For latents that do not fit.
        NumericalError: For NaN or infinity.
    """
    check_latent(autoencoder.space, z)
    if not len(z):
        height, width = (side * autoencoder.space.factor for side in z.shape[2:])
        return torch.empty(0, autoencoder.channels, height, width, device=z.device)
    parts = []
    with torch.inference_mode():
        for part in z.split(batch):
            image = autoencoder.decode(part.to(autoencoder.dtype)).float()
            check_decoded(image, autoencoder.dtype)
            parts.append(image.clamp(-1, 1))
    return torch.cat(parts)  # outside: a plain tensor, which training can use
