"""Inpainting: a part of a picture is drawn anew, the rest stays, to the last bit of its pixels.

An ordinary model keeps what is known at every noise level (`predict/wrappers/known_region.py`). One
trained for it (9 channels; Rombach et al. 2022, arXiv:2112.10752, section 4.5) is told the mask and
the masked picture: x, mask, latent of the picture with grey under the mask. FLUX.1 Fill is told the
latent first, and then every pixel of the mask: a latent cell's pixels are channels (16 + 64).
"""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError
from sfumato.sampling import Request
from sfumato.tasks._pictures import (
    Draws,
    Picture,
    by_pixels,
    covered,
    encoded,
    extra_channels,
    later,
    mask_like,
    nearest,
    sized,
)


def inpaint(
    model: Any,
    picture: Picture,
    mask: pil.Image | Tensor,
    request: Request | None = None,
    *,
    strength: float = 1.0,
    posterior: str = "mean",
    paste: bool = True,
    blind: bool = False,
) -> Request:
    """picture: one for all images, or one an image. mask: white, or 1 in (1, 1, H, W), is drawn
    anew; grey is blended at the end.

    strength below 1 begins with the picture under the mask too (image_to_image). paste: the pixels
    that the mask leaves alone are put back as they were; without, they went through the
    autoencoder. blind: an ordinary model's first look, at strength 1, is at noise alone, as in
    diffusers; otherwise it sees there what is known, as faint as the first time says. `UserError`
    for what does not fit.
    """
    pixels, request = sized(model, picture, request or Request())
    mask, extra, channels = (
        mask_like(pixels, mask),
        extra_channels(model),
        model.autoencoder.space.channels,
    )
    every = channels + model.autoencoder.space.factor**2  # the mask by pixels
    if extra not in (0, 1 + channels, every):
        raise UserError(
            f"this model takes {extra} channels beside the latent: inpainting needs none, or a mask and a picture ({1 + channels} or {every})"
        )
    if blind and (extra or strength < 1):
        raise UserError(
            f"blind=True with strength={strength} and {extra} channels beside the latent: expected strength 1 and an ordinary model"
        )
    times, draws = later(model, request, strength), Draws(model, request)
    made = replace(request, timesteps=times, paste=(pixels, mask) if paste else None)
    z = encoded(model, pixels, posterior, draws) if strength < 1 or not extra else None
    begin = z if strength < 1 else None
    if not extra:
        assert z is not None
        return replace(
            made,
            begin=begin,
            known=(z, 1 - covered(model, mask)),
            blind_start=blind,
            drawn=draws.used,
        )
    noise = draws()
    hidden = torch.where(mask >= 0.5, torch.zeros_like(pixels), pixels)
    count = request.count
    shown = encoded(model, hidden, posterior, draws)
    told = [shown, by_pixels(model, mask)] if extra == every else [nearest(model, mask), shown]
    concat = torch.cat([part.expand(count, -1, -1, -1) for part in told], 1)
    # The run's own first draw is replaced by `noise`, which was drawn before the masked picture's.
    return replace(made, begin=begin, noise=noise, concat=concat, drawn=draws.used - 1)
