"""Instructions to a picture: "make it winter".

InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800): the network takes the picture's latent
beside x (8 channels). Guidance has two scales (their eq. 3): towards the instruction, from the
picture alone, and towards the picture, from nothing: p = p_0 + s_picture (p_picture - p_0) + s_text
(p_both - p_picture).

FLUX.1 Kontext (Batifol et al. 2025, arXiv:2506.15742, section 3) and FLUX.2: a transformer reads
the picture's latent as more tokens beside x's, at places of their own; it may have another size
than what is drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.sampling import Request
from sfumato.tasks._pictures import Picture, extra_channels, sized

LARGEST = 1024 * 1024
"""Pixels of a picture that is read as tokens: models that do so were trained on about so many."""


def kind_of_edit(model: Any) -> str | None:
    """How a model follows instructions to pictures: "reference" (tokens), "joined" (channels beside
    x), None (it does not).
    """
    if model.defaults.references:
        return "reference"
    joined = (
        model.denoiser.network.part == "unet"
        and extra_channels(model) == model.autoencoder.space.channels
    )
    return "joined" if joined else None


def edit(
    model: Any,
    picture: Picture,
    request: Request | None = None,
    *,
    picture_guidance: float = 1.5,
    also: Sequence[Picture] = (),
    largest: int = LARGEST,
) -> Request:
    """picture: one for all images, or one an image. The request's prompt is the instruction, its
    guidance (one number) the first scale.

    picture_guidance: the second, 1 is off; for models with two. also: more pictures, each for all
    images or one an image, for models that read several (FLUX.2). largest: pictures of more pixels
    are made smaller before such models read them, and all are cut to whole tokens; what is drawn
    has the (first) picture's size then, or the request's. `UserError` for a model that was not
    trained for instructions: use image_to_image with it.
    """
    if kind_of_edit(model) == "reference":
        return _by_reference(model, (picture, *also), request or Request(), largest)
    if also:
        raise UserError(f"{1 + len(also)} pictures: this model reads one")
    pixels, request = sized(model, picture, request or Request())
    channels = model.autoencoder.space.channels
    if kind_of_edit(model) is None:
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: instructions need a model that takes a picture ({channels}); "
            "image_to_image edits with any other"
        )
    if not 0 <= picture_guidance < math.inf:
        raise UserError(
            f"picture_guidance={picture_guidance}: expected a number of at least 0, 1 is off"
        )
    scale = model.defaults.guidance if request.guidance is None else request.guidance
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(
            f"guidance={scale!r} for an edit: expected one number, the scale towards the instruction"
        )
    # As they trained it: the picture's raw latent, not standardised.
    seen = model.autoencoder.space.restore(model.encode(pixels))
    guidance = {
        "scale": scale,
        "combine": f"dual:kind=chain,second={picture_guidance}",
        "reference": "condition condition",
    }
    return replace(request, guidance=guidance, concat=(seen, seen, torch.zeros_like(seen)))


def _by_reference(
    model: Any, pictures: Sequence[Picture], request: Request, largest: int
) -> Request:
    """The request with the pictures' latents as references."""
    if len(pictures) > model.defaults.references:
        raise UserError(f"{len(pictures)} pictures: this model reads {model.defaults.references}")
    if largest < 1:
        raise UserError(f"largest={largest}: expected a number of pixels, {LARGEST} is usual")
    read = [_fitted(model, model.pixels(picture), largest) for picture in pictures]
    for pixels in read:
        if len(pixels) not in (1, request.count):
            raise UserError(
                f"{len(pixels)} pictures for {request.count} images: expected one, or one an image"
            )
    height, width = read[0].shape[2:]
    size = {"height": request.height or height, "width": request.width or width}
    return replace(request, **size, references=tuple(model.encode(pixels) for pixels in read))


def _fitted(model: Any, pixels: Tensor, largest: int) -> Tensor:
    """Pixels whose sides are whole tokens, at most `largest` of them: made smaller, then what is
    too much is cut off around the middle, as FLUX.2 was trained. A side of less than a token is
    drawn out to one.
    """
    cell, (height, width) = (
        model.autoencoder.space.factor * model.denoiser.network.patch,
        pixels.shape[2:],
    )
    scale = min(1.0, math.sqrt(largest / (height * width)))
    wanted = [max(cell, int(side * scale + 1e-6)) for side in (height, width)]
    if wanted != [height, width]:
        pixels = F.interpolate(pixels, size=wanted, mode="bicubic", antialias=True).clamp(-1, 1)
    (top, rows), (left, columns) = ((side % cell // 2, side // cell * cell) for side in wanted)
    return pixels[:, :, top : top + rows, left : left + columns]
