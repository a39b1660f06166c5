"""Decode and encode in strips, without approximation: the whole image's result to rounding, in
about an eighth of the memory.

Unlike tiles, strips hand each layer's last rows on to the next strip, group norms have the
statistics of the whole map, and attention sees all positions: there is nothing to blend. How it is
done, and what is worked out twice, stands in `sfumato.compress.exact`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder, InParts, Posterior
from sfumato.compress.exact import posterior, reconstruct
from sfumato.decode.whole import check_decoded, check_latent
from sfumato.errors import UserError


@torch.no_grad()
def exact(
    autoencoder: Autoencoder,
    z: Float[Tensor, "B C h w"],
    rows: int | None = None,
    memory: int | None = None,
) -> Float[Tensor, "B c H W"]:
    """z (standardised) -> image in [-1, 1], clamped, float32: `whole`, to rounding.

    rows: about how many rows of any feature map are worked on at a time (default: as many as make 8
    MB, or less). memory: bytes that feature maps may take between layers (default: the largest map
    after a residual block; more is quicker, less slower). `UserError` for autoencoders that do not
    say what their parts are (`InParts`: all of sfumato's do), `NumericalError` for NaN or infinity.
    """
    parts = _require_parts(autoencoder)
    check_latent(autoencoder.space, z)
    image = reconstruct(
        parts, autoencoder.space.restore(z.to(autoencoder.dtype)), rows, memory
    ).float()
    check_decoded(image, autoencoder.dtype)
    return image.clamp_(-1, 1)


@torch.no_grad()
def exact_posterior(
    autoencoder: Autoencoder,
    image: Float[Tensor, "B C H W"],
    rows: int | None = None,
    memory: int | None = None,
) -> Posterior:
    """image in [-1, 1] -> the distribution of raw latents, in the autoencoder's dtype:
    `autoencoder.posterior`, to rounding. As `exact`.
    """
    return posterior(_require_parts(autoencoder), image.to(autoencoder.dtype), rows, memory)


def _require_parts(autoencoder: Autoencoder) -> InParts:
    if not isinstance(autoencoder, InParts):
        raise UserError(
            f"{type(autoencoder).__name__} does not say what its parts are, and cannot be run in strips: use whole or tiled"
        )
    return autoencoder
