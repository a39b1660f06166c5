"""Decode and encode again in float32 where an autoencoder in half precision overflows.

SDXL's autoencoder overflows in float16. The first result is discarded, with a warning in the log.
"""

import copy
import logging
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder
from sfumato.decode.exact import exact_posterior
from sfumato.errors import NumericalError

LOG = logging.getLogger("sfumato")


def decode_in_range(
    autoencoder: Autoencoder,
    z: Float[Tensor, "B C h w"],
    decode: Callable[[Autoencoder, Tensor], Tensor],
    retry: bool = True,
) -> Float[Tensor, "B c H W"]:
    """Decode a latent, in float32 where the autoencoder's own dtype overflows.

    Args:
        autoencoder: Not changed.
        z: Standardised latents.
        decode: `whole`, `exact` or `tiled`.
        retry: False without memory for a copy in float32: the error is raised.

    Returns:
        The images in [-1, 1].

    Raises:
        NumericalError: For NaN or infinity in float32 too, or in the latent.
    """
    try:
        return decode(autoencoder, z)
    except NumericalError as error:
        if autoencoder.dtype == torch.float32 or not retry or not torch.isfinite(z).all():
            raise
        LOG.warning(
            "%s; decoding again in float32 (a model loaded in bfloat16 or float32 saves the time)",
            error,
        )
        return decode(copy.deepcopy(autoencoder).float(), z)


def encode_in_range(
    autoencoder: Autoencoder,
    image: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "B c h w"] | None = None,
    retry: bool = True,
    strips: bool = False,
) -> Float[Tensor, "B c h w"]:
    """Encode an image, in float32 where the autoencoder's own dtype overflows.

    Args:
        autoencoder: Not changed.
        image: Pixels in [-1, 1], of any dtype.
        noise: Standard normal, for a draw from the posterior; None: its mean.
        retry: As for `decode_in_range`.
        strips: Encode in strips, the same to rounding in less memory.

    Returns:
        Standardised latents, float32; not finite where the image or float32 itself is not.
    """
    z = _encode(autoencoder, image.to(autoencoder.dtype), noise, strips).float()
    if autoencoder.dtype == torch.float32 or not retry or torch.isfinite(z).all():
        return z
    LOG.warning(
        "the autoencoder's %s overflowed; encoding again in float32",
        str(autoencoder.dtype).removeprefix("torch."),
    )
    return _encode(copy.deepcopy(autoencoder).float(), image.float(), noise, strips)


def _encode(autoencoder: Autoencoder, image: Tensor, noise: Tensor | None, strips: bool) -> Tensor:
    if not strips:
        return autoencoder.encode(image, noise)
    posterior = exact_posterior(autoencoder, image)
    raw = posterior.mean if noise is None else posterior.sample(noise)
    return autoencoder.space.standardise(raw)
