"""Decode and encode in strips: the whole image's result, in about an eighth of the memory.

Both are equal to rounding. Unlike tiles, strips pass each layer's last rows on to the next strip,
group norms have the statistics of the whole map, and attention is over all positions: there is
nothing to blend. `sfumato.compress.exact` is the method, with the cost of layers that run twice.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder, Posterior, SequentialAutoencoder
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
    """Decode standardised latents in strips: `whole`, to rounding.

    Args:
        autoencoder: A `SequentialAutoencoder`, as all of sfumato's are.
        z: Standardised latents.
        rows: About how many rows of any feature map are computed at a time; None: as many as make 8
            MB, or less.
        memory: Bytes that feature maps may take between layers; None: the largest map after a
            residual block. More is quicker, less slower.

    Returns:
        The images in [-1, 1], clamped, float32.

    Raises:
        UserError: For latents that do not fit, and autoencoders that cannot run in strips.
        NumericalError: For NaN or infinity.
    """
    sequential = _require_sequential(autoencoder)
    check_latent(autoencoder.space, z)
    raw = autoencoder.space.restore(z.to(autoencoder.dtype))
    image = reconstruct(sequential, raw, rows, memory).float()
    check_decoded(image, autoencoder.dtype)
    return image.clamp_(-1, 1)


@torch.no_grad()
def exact_posterior(
    autoencoder: Autoencoder,
    image: Float[Tensor, "B C H W"],
    rows: int | None = None,
    memory: int | None = None,
) -> Posterior:
    """Encode images in [-1, 1] in strips: `autoencoder.posterior`, to rounding.

    Arguments and errors as for `exact`.

    Returns:
        The distribution of raw latents, in the autoencoder's dtype.
    """
    sequential = _require_sequential(autoencoder)
    return posterior(sequential, image.to(autoencoder.dtype), rows, memory)


def _require_sequential(autoencoder: Autoencoder) -> SequentialAutoencoder:
    if not isinstance(autoencoder, SequentialAutoencoder):
        raise UserError(
            f"{type(autoencoder).__name__} is not a SequentialAutoencoder and cannot be run in "
            "strips: use whole or tiled"
        )
    return autoencoder
