"""Instructions to an image: "make it winter".

InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800): the network takes the image's latent beside
x (8 channels). Guidance has two scales (their eq. 3): towards the instruction, from the image
alone, and towards the image, from nothing: p = p_0 + s_image (p_image - p_0) + s_text (p_both -
p_image).

FLUX.1 Kontext (Batifol et al. 2025, arXiv:2506.15742, section 3) and FLUX.2: the image's latent
becomes more tokens of the transformer beside x's, at positions of their own. It may have another
size than the result.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks._images import (
    ImageInput,
    channels_error,
    check_count,
    extra_channels,
    network_of,
    outline,
    resize_request,
)
from sfumato.validate import number_in, positive_int

LARGEST = 1024 * 1024
"""Number of pixels of an image that becomes tokens: about as many as in training."""


def kind_of_edit(model: LatentDiffusion) -> str | None:
    """The way in which a model follows instructions.

    Returns:
        "reference" (the image as tokens), "concat" (channels beside x), or None (it does not).
    """
    if model.defaults.max_reference_images:
        return "reference"
    is_unet = network_of(model).part == "unet"
    takes_image = extra_channels(model) == model.autoencoder.space.channels
    return "concat" if is_unet and takes_image else None


def edit(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    image_guidance: float = 1.5,
    also: Sequence[ImageInput] = (),
    largest: int = LARGEST,
) -> Plan:
    """Plan an edit by instruction.

    Args:
        model: A model that was trained for instructions.
        image: One for all images or one an image.
        request: Its prompt is the instruction, its guidance (one number) the scale towards it.
        image_guidance: Scale towards the image, 1 is off; for models with two scales.
        also: More images, each for all or one an image, for models that take several (FLUX.2).
        largest: Number of pixels. Larger images are reduced before they become tokens, and all are
            cropped to whole tokens; the result has the (first) image's size then, or the request's.

    Raises:
        UserError: For a model that was not trained for instructions: use `image_to_image`.
    """
    kind = kind_of_edit(model)
    if kind == "reference":
        return _edit_by_reference(model, (image, *also), request or Request(), largest)
    if also:
        raise UserError(f"{1 + len(also)} images: this model takes one")
    pixels, request = resize_request(model, image, request)
    if kind is None:
        channels = model.autoencoder.space.channels
        raise channels_error(
            model,
            f"instructions need a model that takes an image ({channels}); "
            "image_to_image edits with any other",
        )
    number_in("image_guidance", image_guidance, at_least=0, hint="1 is off")
    scale = model.defaults.guidance if request.guidance is None else request.guidance
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(
            f"guidance={scale!r} for an edit: expected one number, the scale towards the "
            "instruction"
        )
    guidance = {
        "scale": scale,
        "rule": f"dual:kind=chain,second={image_guidance}",
        "baseline": "condition condition",
    }
    plan = model.plan(replace(request, guidance=guidance, concat=(outline(model, pixels),) * 3))
    model.fitted(plan)  # memory for the run is checked before the time is spent
    # not standardised: as they trained it
    raw = model.autoencoder.space.restore(model.encode(pixels))
    return plan.edit(concat=(raw, raw, torch.zeros_like(raw)))


def _edit_by_reference(
    model: LatentDiffusion, images: Sequence[ImageInput], request: Request, largest: int
) -> Plan:
    """A plan with the images' latents as reference images."""
    limit = model.defaults.max_reference_images
    if len(images) > limit:
        raise UserError(f"{len(images)} images: this model takes {limit}")
    positive_int("largest", largest, "pixels", f"{LARGEST} is usual")
    references = [_fit_tokens(model, model.pixels(image), largest) for image in images]
    for pixels in references:
        check_count(pixels, request.count)
    height, width = references[0].shape[2:]
    request = replace(
        request,
        height=request.height or height,
        width=request.width or width,
        reference_images=tuple(outline(model, pixels) for pixels in references),
    )
    plan = model.plan(request)
    model.fitted(plan)
    return plan.edit(reference_images=tuple(model.encode(pixels) for pixels in references))


def _fit_tokens(model: LatentDiffusion, pixels: Tensor, largest: int) -> Tensor:
    """Pixels whose sides are whole tokens, at most `largest` of them.

    They are reduced, then the excess is cropped around the middle, as FLUX.2 was trained. A side of
    less than a token is enlarged to one.
    """
    cell = model.autoencoder.space.factor * network_of(model).patch
    height, width = pixels.shape[2:]
    scale = min(1.0, math.sqrt(largest / (height * width)))
    size = [max(cell, int(side * scale + 1e-6)) for side in (height, width)]
    if size != [height, width]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    (top, rows), (left, columns) = ((side % cell // 2, side // cell * cell) for side in size)
    return pixels[:, :, top : top + rows, left : left + columns]
