"""Larger pictures from a model trained on smaller ones, in two passes: the composition at the
model's own size, then details.

The first picture is enlarged by a cubic filter and a run begins with it, made a little noisy
(image_to_image): what was there stays where it was, and what the filter cannot know is drawn.
Straight away at the large size such models repeat themselves.
"""

import math
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from sfumato.errors import UserError
from sfumato.sampling import Request
from sfumato.tasks._pictures import Picture
from sfumato.tasks.image_to_image import image_to_image


def enlarge(
    model: Any,
    picture: Picture,
    request: Request | None = None,
    *,
    scale: float = 2.0,
    strength: float = 0.4,
) -> Request:
    """picture: one for all images, or one an image. The result has `scale` times its sides,
    rounded. strength: see image_to_image.
    """
    if not 1 <= scale < math.inf:
        raise UserError(f"scale={scale}: expected a number of at least 1")
    pixels = model.pixels(picture)
    size = tuple(round(side * scale) for side in pixels.shape[2:])
    large = F.interpolate(pixels, size, mode="bicubic", align_corners=False).clamp(-1, 1)
    return image_to_image(
        model,
        large,
        replace(request or Request(), height=size[0], width=size[1]),
        strength=strength,
    )


def two_pass(model: Any, request: Request, *, scale: float = 2.0, strength: float = 0.6) -> Request:
    """Runs the request, and gives the second one, which draws its pictures `scale` times as
    large.
    """
    first = model.run(request, output="tensor") * 2 - 1
    return enlarge(
        model,
        first[:, : model.autoencoder.channels],
        replace(request, height=None, width=None, n=len(first)),
        scale=scale,
        strength=strength,
    )
