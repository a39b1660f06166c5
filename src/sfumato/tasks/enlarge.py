"""Larger images from a model trained on smaller ones: composition first, then details.

The first image is enlarged by a cubic filter and a run begins with it, made a little noisy
(`image_to_image`): the composition stays, and the details that the filter lacks are drawn. At the
large size from the start such models repeat themselves.
"""

import math
from dataclasses import replace

import torch.nn.functional as F

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request
from sfumato.tasks._images import ImageInput
from sfumato.tasks.image_to_image import image_to_image


def enlarge(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    scale: float = 2.0,
    strength: float = 0.4,
) -> Plan:
    """Plan a larger version of an image, with new details.

    Args:
        model: any that takes the latent alone
        image: one for all images or one an image
        request: everything else
        scale: the result has `scale` times the image's sides, rounded; at least 1
        strength: as for `image_to_image`

    Raises:
        UserError: for an impossible scale or strength
    """
    if not 1 <= scale < math.inf:
        raise UserError(f"scale={scale}: expected a number of at least 1")
    pixels = model.pixels(image)
    size = tuple(round(side * scale) for side in pixels.shape[2:])
    large = F.interpolate(pixels, size, mode="bicubic", align_corners=False).clamp(-1, 1)
    return image_to_image(
        model,
        large,
        replace(request or Request(), height=size[0], width=size[1]),
        strength=strength,
    )


def two_pass(
    model: LatentDiffusion, request: Request, *, scale: float = 2.0, strength: float = 0.6
) -> Plan:
    """Run a request at the model's size, and plan its images `scale` times as large.

    Args:
        model: any that takes the latent alone
        request: of the first pass; height and width are those of the small images
        scale: as for `enlarge`
        strength: as for `image_to_image`
    """
    pixels = model.run(request, output="tensor") * 2 - 1
    second = replace(request, height=None, width=None, n=len(pixels))
    return enlarge(
        model, pixels[:, : model.autoencoder.channels], second, scale=scale, strength=strength
    )
