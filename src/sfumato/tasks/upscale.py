"""Four times larger by a network that sees the small picture beside the latent (Rombach et al.
2022, arXiv:2112.10752, section 4.4).

The small picture is given some noise, and the network is told how much, as a class
(noise-conditioning augmentation, Ho et al. 2022, arXiv:2106.15282, section 4.2): more noise leaves
less of what is wrong with the picture, and more to be invented.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from sfumato.errors import UserError
from sfumato.sampling import Request, latent_shape, seeds_of
from sfumato.tasks._pictures import Picture, extra_channels


def upscale(
    model: Any, picture: Picture, request: Request | None = None, *, noise_level: int = 20
) -> Request:
    """picture: one for all images, or one an image; the result is larger by the autoencoder's
    factor (4).

    noise_level: the timestep of the small picture's noise, from 0. `UserError` for a model that was
    not trained for it.
    """
    request, pixels = request or Request(), model.pixels(picture)
    process, factor, count = model.low_res, model.autoencoder.space.factor, request.count
    levels = model.denoiser.network.config.num_class_embeds or 0
    if process is None or extra_channels(model) != pixels.shape[1] or not levels:
        raise UserError(
            "this model was not trained to enlarge pictures: expected one such as Stable Diffusion's x4 upscaler"
        )
    if not isinstance(noise_level, int) or not 0 <= noise_level < levels:
        raise UserError(
            f"noise_level={noise_level!r}: expected a whole number from 0 to {levels - 1}"
        )
    if len(pixels) not in (1, count):
        raise UserError(f"{len(pixels)} pictures for {count} images: expected one, or one an image")
    height, width = (side * factor for side in pixels.shape[2:])
    if (request.height or height, request.width or width) != (height, width):
        raise UserError(
            f"height={request.height}, width={request.width}: a picture of {pixels.shape[2]} x {pixels.shape[3]} becomes {height} x {width}"
        )
    if request.other_noise is not None:
        raise UserError(
            "other_noise for an upscaler: it draws noise of two kinds from each seed; expected None"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds_of(request.seed, count)]
    # before the run's own noise, from the same seed
    eps = torch.stack([torch.randn(pixels.shape[1:], generator=g) for g in generators])
    noise = torch.stack(
        [torch.randn(latent_shape(model, height, width), generator=g) for g in generators]
    )
    t = float(process.schedule.time(torch.tensor(float(noise_level))))
    small = process.add_noise(pixels.expand(count, -1, -1, -1).to(eps), eps, t)
    told = F.one_hot(torch.tensor([noise_level]), levels).float()
    return replace(
        request, height=height, width=width, noise=noise, concat=small, vector=told, drawn=1
    )
