"""Upscaling by a network that takes the small image beside the latent.

Rombach et al. 2022, arXiv:2112.10752, section 4.4: four times larger. Some noise is added to the
small image, and its level is a class of the network (noise-conditioning augmentation, Ho et al.
2022, arXiv:2106.15282, section 4.2): more noise leaves fewer of the image's faults, and more to
invent.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from sfumato.diffuse.seeds import seeded_generator
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.sampling.plan import latent_shape, seeds_of
from sfumato.tasks._images import ImageInput, check_count, extra_channels, network_of
from sfumato.validate import whole_number


def upscale(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    noise_level: int = 20,
) -> Plan:
    """Plan a larger image by a model trained for it.

    Args:
        model: An upscaler, such as Stable Diffusion's x4.
        image: One for all images or one an image; the result is larger by the autoencoder's factor
            (4).
        request: Everything else.
        noise_level: Timestep of the small image's noise, from 0.

    Raises:
        UserError: For another model, an impossible size or noise level.
    """
    request, pixels = request or Request(), model.pixels(image)
    process, space, count = model.low_res, model.autoencoder.space, request.count
    levels = network_of(model).classes
    if process is None or extra_channels(model) != pixels.shape[1] or not levels:
        raise UserError(
            "this model was not trained to enlarge images: "
            "expected one such as Stable Diffusion's x4 upscaler"
        )
    whole_number("noise_level", noise_level, 0, levels - 1)
    check_count(pixels, count)
    height, width = (side * space.factor for side in pixels.shape[2:])
    if (request.height or height, request.width or width) != (height, width):
        raise UserError(
            f"height={request.height}, width={request.width}: an image of {pixels.shape[2]} x "
            f"{pixels.shape[3]} becomes {height} x {width}"
        )
    if request.noise_mix is not None:
        raise UserError(
            "noise_mix for an upscaler: it draws noise of two kinds from each seed; expected None"
        )
    generators = [seeded_generator(seed) for seed in seeds_of(request.seed, count)]
    # before the run's own noise, from the same seed
    eps = torch.stack([torch.randn(pixels.shape[1:], generator=g) for g in generators])
    shape = latent_shape(space, height, width)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    t = float(process.schedule.time(torch.tensor(float(noise_level))))
    small = process.add_noise(pixels.expand(count, -1, -1, -1).to(eps), eps, t)
    vector = F.one_hot(torch.tensor([noise_level]), levels).float()
    inputs = {"noise": noise, "concat": small, "vector": vector, "noise_offset": 1}
    return model.plan(replace(request, height=height, width=width, **inputs))
