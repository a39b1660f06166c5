"""Inpainting: a part of an image is drawn anew, every pixel of the rest stays as it is.

An ordinary model keeps the known region at every noise level (`predict/wrappers/known_region.py`).
One trained for it (9 channels; Rombach et al. 2022, arXiv:2112.10752, section 4.5) reads the mask
and the masked image: x, mask, latent of the image with grey under the mask. FLUX.1 Fill reads the
latent first, then every pixel of the mask: a latent cell's pixels are channels (16 + 64).
"""

from dataclasses import replace

import torch
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    check_posterior,
    encode_images,
    extra_channels,
    last_steps,
    latent_mask,
    mask_by_cell,
    mask_by_pixel,
    mask_pixels,
    outline,
    resize_request,
)


def inpaint(
    model: LatentDiffusion,
    image: ImageInput,
    mask: pil.Image | Tensor,
    request: Request | None = None,
    *,
    strength: float = 1.0,
    posterior: str = "mean",
    paste: bool = True,
    noise_only_start: bool = False,
) -> Plan:
    """Plan an image of which a part is drawn anew.

    Args:
        model: one trained for inpainting, or any that takes the latent alone
        image: one for all images or one an image; the result has its size
        mask: white, or 1 in (1, 1, H, W), is drawn anew; grey is blended at the end
        request: everything else
        strength: below 1 the run begins with the image under the mask too, as `image_to_image`
        posterior: as for `image_to_image`
        paste: put the pixels back that the mask leaves alone; without, they go through the
            autoencoder
        noise_only_start: an ordinary model's first call, at strength 1, sees noise alone in the
            known region too, as in diffusers; otherwise it sees the known latent there, as faint as
            the first time has it

    Raises:
        UserError: for a size, mask, strength or network that does not fit
    """
    pixels, request = resize_request(model, image, request or Request())
    mask, extra, space = mask_pixels(pixels, mask), extra_channels(model), model.autoencoder.space
    by_cell, by_pixel = 1 + space.channels, space.channels + space.factor**2
    if extra not in (0, by_cell, by_pixel):
        raise UserError(
            f"this model takes {extra} channels beside the latent: inpainting needs none, or a mask and a picture ({by_cell} or {by_pixel})"
        )
    if noise_only_start and (extra or strength < 1):
        raise UserError(
            f"noise_only_start=True with strength={strength} and {extra} channels beside the latent: expected strength 1 and an ordinary model"
        )
    check_posterior(posterior)
    request = replace(request, composite=(pixels, mask) if paste else None)
    plan = model.plan(replace(request, concat=outline(model, pixels, extra)) if extra else request)
    times, draws = last_steps(plan.timesteps, strength), NoiseDraws(model, plan)
    z = encode_images(model, pixels, posterior, draws) if strength < 1 or not extra else None
    init_latent = z if strength < 1 else None
    if not extra:
        assert z is not None
        region = z, 1 - latent_mask(model, mask)
        return plan.edit(
            timesteps=times,
            init_latent=init_latent,
            known_region=region,
            noise_only_start=noise_only_start,
            noise_offset=draws.used,
        )
    noise = draws()
    masked = encode_images(
        model, torch.where(mask >= 0.5, torch.zeros_like(pixels), pixels), posterior, draws
    )
    parts = (
        [masked, mask_by_pixel(model, mask)]
        if extra == by_pixel
        else [mask_by_cell(model, mask), masked]
    )
    concat = torch.cat([part.expand(plan.n, -1, -1, -1) for part in parts], 1)
    # The run's own first draw is replaced by `noise`, which was drawn before the masked image's.
    return plan.edit(
        timesteps=times,
        init_latent=init_latent,
        noise=noise,
        concat=concat,
        noise_offset=draws.used - 1,
    )
