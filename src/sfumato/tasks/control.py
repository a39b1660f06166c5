"""A map to follow, pixel by pixel: edges, depth, a pose (FLUX.1 Depth and Canny; Black Forest Labs
2024, "FLUX.1 Tools").

The network takes the map's latent beside x, as many channels as the latent has. Making the map of a
picture is another program's work.
"""

from dataclasses import replace
from typing import Any

from sfumato.errors import UserError
from sfumato.sampling import Request
from sfumato.tasks._pictures import Draws, Picture, encoded, extra_channels, sized


def control(
    model: Any, picture: Picture, request: Request | None = None, *, posterior: str = "mean"
) -> Request:
    """picture: the map, one for all images, or one an image; what is drawn has its size. posterior:
    see `image_to_image`.

    `UserError` for a model that was not trained to follow a map.
    """
    pixels, request = sized(model, picture, request or Request())
    network, channels = model.denoiser.network, model.autoencoder.space.channels
    if network.part == "unet" or extra_channels(model) != channels:
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: to follow a map it needs a transformer that takes "
            f"{channels} more, as FLUX.1 Depth and Canny do"
        )
    draws = Draws(model, request)
    return replace(request, concat=encoded(model, pixels, posterior, draws), drawn=draws.used)
