"""Inpainting: a part of an image is drawn anew, every pixel of the rest stays as it is.

An ordinary model keeps the known region at every noise level (`predict/wrappers/known_region.py`).
One trained for it (9 channels; Rombach et al. 2022, arXiv:2112.10752, section 4.5) reads the mask
and the masked image: x, mask, latent of the image with grey under the mask. FLUX.1 Fill reads the
latent first, then every pixel of the mask: a latent cell's pixels are channels (16 + 64).
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    channels_error,
    extra_channels,
    inpainting_channels,
    last_steps,
    outline,
    own_colours,
    resize_request,
)
from sfumato.tasks._masks import latent_mask, mask_by_cell, mask_by_pixel, mask_pixels


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
        model: A model trained for inpainting, or any that takes the latent alone.
        image: One for all images or one an image; the result has its size.
        mask: White, or 1 in (1, 1, H, W), is drawn anew; grey is blended at the end. Of an image,
            levels within 16 of black or white count as black or white.
        request: Everything else.
        strength: Below 1 the run begins with the image under the mask too, as `image_to_image`.
        posterior: As for `image_to_image`.
        paste: Put the pixels back that the mask leaves alone, with the transparency and the ICC
            profile of a PIL image; else they go through the autoencoder, opaque and in sRGB.
        noise_only_start: At strength 1, give an ordinary model's first call noise alone in the
            known region too, as in diffusers; else the known latent there, as faint as the first
            time has it.

    Raises:
        UserError: For a size, mask, strength or network that does not fit.
    """
    pixels, request = resize_request(model, image, request)
    mask = mask_pixels(pixels, mask)
    if paste:
        request = replace(request, composite=(pixels, mask), originals=own_colours(image))
    else:
        request = replace(request, composite=None, originals=None)
    return plan_inpainting(model, pixels, mask, request, strength, posterior, noise_only_start)


def plan_inpainting(
    model: LatentDiffusion,
    pixels: Float[Tensor, "N C H W"],
    mask: Float[Tensor, "M _ H W"],
    request: Request,
    strength: float,
    posterior: str,
    noise_only_start: bool = False,
) -> Plan:
    """Plan the part of an image that a mask covers, as a request pastes it.

    Args:
        model: As for `inpaint`.
        pixels: The image, in [-1, 1].
        mask: 1 is drawn anew, in [0, 1].
        request: Of the image's size, with its composite and originals.
        strength: As for `inpaint`.
        posterior: As for `inpaint`.
        noise_only_start: As for `inpaint`.

    Raises:
        UserError: For a strength or network that does not fit.
    """
    extra = extra_channels(model)
    by_cell, by_pixel = inpainting_channels(model)
    if extra not in (0, by_cell, by_pixel):
        needs = f"inpainting needs none, or a mask and an image ({by_cell} or {by_pixel})"
        raise channels_error(model, needs)
    if noise_only_start and (extra or strength < 1):
        raise UserError(
            f"noise_only_start=True with strength={strength} and {extra} channels beside the "
            "latent: expected strength 1 and an ordinary model"
        )
    plan = model.plan(replace(request, concat=outline(model, pixels, extra)) if extra else request)
    times, draws = last_steps(plan.timesteps, strength), NoiseDraws(model, plan, posterior)
    z = draws.encode(pixels) if strength < 1 or not extra else None
    init_latent = z if strength < 1 else None
    if not extra:
        assert z is not None
        return plan.edit(
            timesteps=times,
            init_latent=init_latent,
            known_region=(z, 1 - latent_mask(model, mask)),
            noise_only_start=noise_only_start,
            noise_offset=draws.used,
        )
    noise = draws()
    masked = draws.encode(torch.where(mask >= 0.5, torch.zeros_like(pixels), pixels))
    parts = [mask_by_cell(model, mask), masked]
    if extra == by_pixel:
        parts = [masked, mask_by_pixel(model, mask)]
    # The run's own first draw is replaced by `noise`, which was drawn before the masked image's.
    return plan.edit(
        timesteps=times,
        init_latent=init_latent,
        noise=noise,
        concat=torch.cat([part.expand(plan.n, -1, -1, -1) for part in parts], 1),
        noise_offset=draws.used - 1,
    )
