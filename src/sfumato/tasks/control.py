"""A map to follow, pixel by pixel: edges, depth, a pose.

FLUX.1 Depth and Canny (Black Forest Labs 2024, "FLUX.1 Tools"). The network takes the map's latent
beside x, as many channels as the latent has. Making the map of an image is another program's work.
"""

from dataclasses import replace

from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    channels_error,
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
        model: A model that was trained to follow a map.
        image: The map, one for all images or one an image; the result has its size.
        request: Everything else.
        posterior: As for `image_to_image`.

    Raises:
        UserError: For another model.
    """
    pixels, request = resize_request(model, image, request)
    channels = model.autoencoder.space.channels
    if network_of(model).part == "unet" or extra_channels(model) != channels:
        raise channels_error(
            model,
            f"to follow a map it needs a transformer that takes {channels} more, "
            "as FLUX.1 Depth and Canny do",
        )
    plan = model.plan(replace(request, concat=outline(model, pixels)))
    draws = NoiseDraws(model, plan, posterior)
    return plan.edit(concat=draws.encode(pixels), noise_offset=draws.used)
