"""Outpainting: an image grows at any side, and its own pixels stay as they are."""

from dataclasses import replace

import torch.nn.functional as F
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks._images import ImageInput, check_count, own_colours
from sfumato.tasks.inpaint import plan_inpainting
from sfumato.validate import LONGEST_SIDE, whole_number


def outpaint(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    overlap: int = 0,
    strength: float = 1.0,
    posterior: str = "mean",
) -> Plan:
    """Plan an image with new pixels at its sides.

    Under the added part lies the image's edge, repeated: with a strength below 1 the run begins
    with it.

    Args:
        model: As for `inpaint`.
        image: One for all images or one an image.
        request: Everything else.
        left: Pixels to add.
        right: Pixels to add.
        top: Pixels to add.
        bottom: Pixels to add.
        overlap: Pixels of the image beside them that may change too, blended in.
        strength: As for `inpaint`.
        posterior: As for `image_to_image`.

    Raises:
        UserError: For an impossible number, or if nothing is added.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom, "overlap": overlap}
    for name, value in sides.items():
        whole_number(name, value, 0, LONGEST_SIDE, unit="pixels")
    if not (left or right or top or bottom):
        raise UserError("left, right, top and bottom are 0: say how many pixels to add, and where")
    pixels = model.pixels(image)
    if overlap >= min(pixels.shape[2:]):
        raise UserError(
            f"overlap={overlap} for an image of {pixels.shape[2]} x {pixels.shape[3]}: "
            "expected less than its sides"
        )
    wide = F.pad(pixels, (left, right, top, bottom), mode="replicate")
    mask = outpaint_mask(pixels, sides)
    originals = own_colours(image)
    if originals is not None:
        originals = tuple(_enlarge(one, sides) for one in originals)
    request = replace(request or Request(), height=wide.shape[2], width=wide.shape[3])
    check_count(pixels, request.count)
    request = replace(request, composite=(wide, mask), originals=originals)
    return plan_inpainting(model, wide, mask, request, strength, posterior)


def _enlarge(image: pil.Image, sides: dict[str, int]) -> pil.Image:
    """An image with empty pixels at its sides, and with its profile."""
    width = image.width + sides["left"] + sides["right"]
    wide = pil.new(image.mode, (width, image.height + sides["top"] + sides["bottom"]))
    wide.paste(image, (sides["left"], sides["top"]))
    wide.info = dict(image.info)
    return wide


def outpaint_mask(pixels: Tensor, sides: dict[str, int]) -> Tensor:
    """1 where pixels are added, falling to 0 over the overlap: (1, 1, H, W).

    Args:
        pixels: The image.
        sides: Pixels added at "left", "right", "top" and "bottom", and the "overlap".
    """
    ramp = sides["overlap"] + 1

    def along(length: int, before: int, after: int) -> Tensor:
        inside = pixels.new_ones(length).cumsum(0)  # 1 ... length
        near = pixels.new_zeros(length)
        if before:
            near = near.maximum(1 - inside / ramp)
        if after:
            near = near.maximum(1 - inside.flip(0) / ramp)
        return F.pad(near.clamp(0, 1), (before, after), value=1.0)

    height, width = pixels.shape[2:]
    rows = along(height, sides["top"], sides["bottom"])
    columns = along(width, sides["left"], sides["right"])
    return rows[:, None].maximum(columns[None])[None, None]
