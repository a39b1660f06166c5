"""Decode all at once, a few images at a time; NaN or infinity stops with a sentence instead of a black picture."""

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder
from sfumato.errors import NumericalError


def check_decoded(image: Tensor, dtype: torch.dtype) -> None:
    """`NumericalError` that names the stage and the dtype where a pixel is not finite."""
    if not torch.isfinite(image).all():
        raise NumericalError(
            f"{int((~torch.isfinite(image)).sum())} of {image.numel()} pixels are NaN or infinite after decode ({str(dtype).removeprefix('torch.')}): "
            "nothing was written; decode in float32"
        )


@torch.inference_mode()
def whole(autoencoder: Autoencoder, z: Float[Tensor, "B C h w"], batch: int = 64) -> Float[Tensor, "B c H W"]:
    """z (standardised) -> image in [-1, 1], clamped, float32; `batch` images at a time."""
    parts = []
    for part in z.split(batch):
        image = autoencoder.decode(part.to(autoencoder.dtype)).float()
        check_decoded(image, autoencoder.dtype)
        parts.append(image.clamp(-1, 1))
    return torch.cat(parts)
