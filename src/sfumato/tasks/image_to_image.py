"""Image to image (SDEdit, Meng et al. 2022, arXiv:2108.01073, algorithm 1): the run begins with the
picture, made as noisy as its first time says.

With little strength colours and shapes stay, with much only the composition: style transfer,
variations, repairs.
"""

from dataclasses import replace
from typing import Any

from sfumato.errors import UserError
from sfumato.sampling import Request
from sfumato.tasks._pictures import Draws, Picture, encoded, extra_channels, later, sized


def image_to_image(
    model: Any,
    picture: Picture,
    request: Request | None = None,
    *,
    strength: float = 0.8,
    posterior: str = "mean",
) -> Request:
    """picture: one for all images, or one an image; the result has its size. strength in (0, 1]:
    the share of the steps that are run.

    posterior: begin with the mean of what the autoencoder says, or with a "sample" of it
    (diffusers' way), drawn before the run's noise. `UserError` for a size, strength or network that
    does not fit.
    """
    pixels, request = sized(model, picture, request or Request())
    if extra_channels(model):
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: use the task that it was trained for"
        )
    draws = Draws(model, request)
    z = encoded(model, pixels, posterior, draws)
    return replace(request, timesteps=later(model, request, strength), begin=z, drawn=draws.used)
