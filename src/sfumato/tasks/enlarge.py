"""Larger images from a model trained on smaller ones: composition first, then details.

The first image is enlarged by a cubic filter and a run begins with it, made a little noisy
(`image_to_image`): the composition stays, and the details that the filter lacks are drawn. At the
large size from the start such models repeat themselves.
"""

from dataclasses import replace

import torch.nn.functional as F

from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks._images import ImageInput
from sfumato.tasks.image_to_image import image_to_image
from sfumato.validate import LONGEST_SIDE, number_in


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
        model: As for `image_to_image`.
        image: One for all images or one an image.
        request: Everything else.
        scale: The result has `scale` times the image's sides, rounded; at least 1.
        strength: As for `image_to_image`.

    Raises:
        UserError: For an impossible scale or strength.
    """
    pixels = model.pixels(image)
    number_in("scale", scale, at_least=1, at_most=LONGEST_SIDE / max(pixels.shape[2:]))
    height, width = (round(side * scale) for side in pixels.shape[2:])
    large = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)
    request = replace(request or Request(), height=height, width=width)
    return image_to_image(model, large, request, strength=strength)


def two_pass(
    model: LatentDiffusion, request: Request, *, scale: float = 2.0, strength: float = 0.6
) -> Plan:
    """Run a request at the model's size, and plan its images `scale` times as large.

    Args:
        model: As for `image_to_image`.
        request: Request of the first pass; height and width are those of the small images.
        scale: As for `enlarge`.
        strength: As for `image_to_image`.
    """
    images = model.run(request, output="tensor") * 2 - 1
    pixels = images[:, : model.autoencoder.channels]
    second = replace(request, height=None, width=None, n=len(pixels))
    return enlarge(model, pixels, second, scale=scale, strength=strength)
