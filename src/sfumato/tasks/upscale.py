"""Upscaling by a network that reads the small image beside the latent.

Rombach et al. 2022, arXiv:2112.10752, section 4.4: four times larger. The small image is given some
noise, and the network reads how much as a class (noise-conditioning augmentation, Ho et al. 2022,
arXiv:2106.15282, section 4.2): more noise leaves fewer of the image's faults, and more to be
invented.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan, latent_shape, seeds_of
from sfumato.sampling.request import Request
from sfumato.tasks._images import ImageInput, check_count, extra_channels, network_of


def upscale(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    noise_level: int = 20,
) -> Plan:
    """Plan a larger image by a model trained for it.

    Args:
        model: an upscaler, such as Stable Diffusion's x4
        image: one for all images or one an image; the result is larger by the autoencoder's factor
            (4)
        request: everything else
        noise_level: timestep of the small image's noise, from 0

    Raises:
        UserError: for another model, an impossible size or noise level
    """
    request, pixels = request or Request(), model.pixels(image)
    process, factor, count = model.low_res, model.autoencoder.space.factor, request.count
    levels = network_of(model).config.num_class_embeds or 0
    if process is None or extra_channels(model) != pixels.shape[1] or not levels:
        raise UserError(
            "this model was not trained to enlarge pictures: expected one such as Stable Diffusion's x4 upscaler"
        )
    if not isinstance(noise_level, int) or not 0 <= noise_level < levels:
        raise UserError(
            f"noise_level={noise_level!r}: expected a whole number from 0 to {levels - 1}"
        )
    check_count(pixels, count)
    height, width = (side * factor for side in pixels.shape[2:])
    if (request.height or height, request.width or width) != (height, width):
        raise UserError(
            f"height={request.height}, width={request.width}: a picture of {pixels.shape[2]} x {pixels.shape[3]} becomes {height} x {width}"
        )
    if request.noise_mix is not None:
        raise UserError(
            "noise_mix for an upscaler: it draws noise of two kinds from each seed; expected None"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds_of(request.seed, count)]
    # before the run's own noise, from the same seed
    eps = torch.stack([torch.randn(pixels.shape[1:], generator=g) for g in generators])
    shape = latent_shape(model.autoencoder.space, height, width)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    t = float(process.schedule.time(torch.tensor(float(noise_level))))
    small = process.add_noise(pixels.expand(count, -1, -1, -1).to(eps), eps, t)
    vector = F.one_hot(torch.tensor([noise_level]), levels).float()
    return model.plan(
        replace(
            request,
            height=height,
            width=width,
            noise=noise,
            concat=small,
            vector=vector,
            noise_offset=1,
        )
    )
