"""Instructions to a picture: "make it winter" (InstructPix2Pix, Brooks et al. 2023, arXiv:2211.09800).

The network takes the picture's latent beside x (8 channels). Guidance has two scales (their eq. 3): towards the instruction, from the picture
alone, and towards the picture, from nothing: p = p_0 + s_picture (p_picture - p_0) + s_text (p_both - p_picture).
"""

import math
from dataclasses import replace
from typing import Any

import torch

from sfumato.errors import UserError
from sfumato.sampling import Request
from sfumato.tasks._pictures import Picture, extra_channels, sized


def edit(model: Any, picture: Picture, request: Request | None = None, *, picture_guidance: float = 1.5) -> Request:
    """picture: one for all images, or one an image. The request's prompt is the instruction, its guidance (one number) the first scale.

    picture_guidance: the second, 1 is off. `UserError` for a model that was not trained for instructions: use image_to_image with it.
    """
    pixels, request = sized(model, picture, request or Request())
    channels = model.autoencoder.space.channels
    if extra_channels(model) != channels:
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: instructions need a model that takes a picture ({channels}); "
            "image_to_image edits with any other"
        )
    if not 0 <= picture_guidance < math.inf:
        raise UserError(f"picture_guidance={picture_guidance}: expected a number of at least 0, 1 is off")
    scale = model.defaults.guidance if request.guidance is None else request.guidance
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(f"guidance={scale!r} for an edit: expected one number, the scale towards the instruction")
    # As they trained it: the picture's raw latent, not standardised.
    seen = model.autoencoder.space.restore(model.encode(pixels))
    guidance = {"scale": scale, "combine": f"dual:kind=chain,second={picture_guidance}", "reference": "condition condition"}
    return replace(request, guidance=guidance, concat=(seen, seen, torch.zeros_like(seen)))
