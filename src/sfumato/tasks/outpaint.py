"""Outpainting: an image grows at any side, and its own pixels stay as they are."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request
from sfumato.tasks._images import ImageInput
from sfumato.tasks.inpaint import inpaint


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
        model: as for `inpaint`
        image: one for all images or one an image
        request: everything else
        left: pixels to add
        right: pixels to add
        top: pixels to add
        bottom: pixels to add
        overlap: pixels of the image beside them that may change too, blended in
        strength: as for `inpaint`
        posterior: as for `image_to_image`

    Raises:
        UserError: nothing is added, or a number is impossible
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom, "overlap": overlap}
    for name, value in sides.items():
        if not isinstance(value, int) or value < 0:
            raise UserError(f"{name}={value!r}: expected a whole number of pixels, 0 or more")
    if not (left or right or top or bottom):
        raise UserError("left, right, top and bottom are 0: say how many pixels to add, and where")
    pixels = model.pixels(image)
    if overlap >= min(pixels.shape[2:]):
        raise UserError(
            f"overlap={overlap} for a picture of {pixels.shape[2]} x {pixels.shape[3]}: expected less than its sides"
        )
    wide = F.pad(pixels, (left, right, top, bottom), mode="replicate")
    sized = replace(request or Request(), height=wide.shape[2], width=wide.shape[3])
    return inpaint(
        model, wide, outpaint_mask(pixels, sides), sized, strength=strength, posterior=posterior
    )


def outpaint_mask(pixels: Tensor, sides: dict[str, int]) -> Tensor:
    """1 where pixels are added, falling to 0 over the overlap: (1, 1, H, W)."""

    def along(length: int, before: int, after: int) -> Tensor:
        inside = pixels.new_ones(length).cumsum(0)  # 1 ... length
        ramp = sides["overlap"] + 1
        near = pixels.new_zeros(length)
        if before:
            near = near.maximum(1 - inside / ramp)
        if after:
            near = near.maximum(1 - inside.flip(0) / ramp)
        return F.pad(near.clamp(0, 1), (before, after), value=1.0)

    height, width = pixels.shape[2:]
    rows, columns = (
        along(height, sides["top"], sides["bottom"]),
        along(width, sides["left"], sides["right"]),
    )
    return rows[:, None].maximum(columns[None])[None, None]
