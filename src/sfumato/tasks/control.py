"""A map to follow, pixel by pixel: edges, depth, a pose.

FLUX.1 Depth and Canny (Black Forest Labs 2024, "FLUX.1 Tools"). The network takes the map's latent
beside x, as many channels as the latent has. Making the map of an image is another program's work.
"""

from dataclasses import replace

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    check_posterior,
    encode_images,
    extra_channels,
    network_of,
    outline,
    resize_request,
)


def control(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    posterior: str = "mean",
) -> Plan:
    """Plan images that follow a map.

    Args:
        model: one that was trained to follow a map
        image: the map, one for all images or one an image; the result has its size
        request: everything else
        posterior: as for `image_to_image`

    Raises:
        UserError: for another model
    """
    pixels, request = resize_request(model, image, request or Request())
    channels = model.autoencoder.space.channels
    if network_of(model).part == "unet" or extra_channels(model) != channels:
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: to follow a map it needs a transformer that takes "
            f"{channels} more, as FLUX.1 Depth and Canny do"
        )
    check_posterior(posterior)
    plan = model.plan(replace(request, concat=outline(model, pixels)))
    draws = NoiseDraws(model, plan)
    z = encode_images(model, pixels, posterior, draws)
    return plan.edit(concat=z, noise_offset=draws.used)
