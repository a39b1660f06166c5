"""Image to image: a run begins with an image, noised to its first time.

SDEdit (Meng et al. 2022, arXiv:2108.01073, algorithm 1).

A model trained for inpainting draws the whole image anew: its mask is 1 everywhere, as in
diffusers' inpainting pipelines with a white mask.

With little strength colours and shapes stay, with much only the composition: style transfer,
variations, repairs.
"""

import torch

from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    channels_error,
    extra_channels,
    inpainting_channels,
    last_steps,
    own_task,
    resize_request,
)
from sfumato.tasks.inpaint import inpaint


def image_to_image(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    strength: float = 0.8,
    posterior: str = "mean",
) -> Plan:
    """Plan images that begin with an image.

    Args:
        model: A model that takes the latent alone, or one trained for inpainting.
        image: One for all images or one an image; the result has its size.
        request: Everything else.
        strength: Share of the steps that are run, in (0, 1].
        posterior: "mean": begin with the mean of the autoencoder's posterior; "sample": with a draw
            from it (diffusers' way), made before the run's noise.

    Raises:
        UserError: For a size, strength or network that does not fit.
    """
    pixels, request = resize_request(model, image, request)
    if extra_channels(model) in inpainting_channels(model):
        whole = torch.ones_like(pixels[:1, :1])
        return inpaint(
            model, pixels, whole, request, strength=strength, posterior=posterior, paste=False
        )
    if extra_channels(model):
        task = own_task(model)
        raise channels_error(model, f"use {task or 'the task that it was trained for'}")
    plan = model.plan(request)
    times = last_steps(plan.timesteps, strength)
    draws = NoiseDraws(model, plan, posterior)
    z = draws.encode(pixels)
    return plan.edit(timesteps=times, init_latent=z, noise_offset=draws.used)
