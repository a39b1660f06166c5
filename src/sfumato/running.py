"""A request's run: the string of questions to the denoiser that ends with the latents.

`model` in this file is a `LatentDiffusion`, or anything with its autoencoder, denoiser, conditioner, defaults, sample_size and device.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.diffuse.sample import SeededNoise, Step, all_finite, conduct
from sfumato.diffuse.samplers import calls
from sfumato.errors import UserError
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.wrappers.feature_cache import feature_cache
from sfumato.predict.wrappers.known_region import finish as finish_known
from sfumato.predict.wrappers.known_region import known_region
from sfumato.predict.wrappers.known_region import start as begin_known
from sfumato.predict.wrappers.large_canvas import large_canvas
from sfumato.sampling import Request, chosen_settings, latent_shape, prompts, sampler_of, seeds_of, times_of
from sfumato.types import Ask, Asking, Conditioning, Picture


def questions(model: Any, request: Request, on_step: Callable[[Step], bool | None] | None = None) -> Asking[Tensor | None]:
    """A request's run: a string of questions that ends with the latents (None: cancelled). What is wrong shows at the first question."""
    chosen = chosen_settings(model, request)
    times = times_of(model, request, chosen)
    n, schedule = chosen["n"], model.denoiser.process.schedule
    draw = SeededNoise(latent_shape(model, chosen["height"], chosen["width"]), seeds_of(request.seed, n), model.device)
    for _ in range(request.drawn):
        draw()
    start = draw()  # drawn also where `noise` takes its place: what is drawn next is then the same
    if request.noise is not None:
        if request.noise.shape != start.shape or not all_finite(request.noise):
            raise UserError(f"noise of shape {tuple(request.noise.shape)}: expected finite numbers of shape {tuple(start.shape)}")
        start = request.noise.to(model.device, torch.float32)
    ask = _asked(model, request, chosen)
    if request.begin is None:  # x_t of standardised latents has variance alpha^2 + sigma^2, at full noise and where a run begins later
        x = math.hypot(*schedule.point(times[0])) * start
    else:
        alpha, sigma = schedule.point(times[0])
        x = alpha * _latent(model, "begin", request.begin, start) + sigma * start
    known = request.known
    if known is not None:
        z, mask = known = _known(model, known)
        ask = known_region(ask, z, mask, schedule.point)
        x = begin_known(start, z, mask, schedule.point, times[0]) if request.begin is None else x
    sampler, options = sampler_of(chosen["sampler"])
    found = yield from conduct(sampler(x, times, schedule, draw, **options), ask, calls(sampler, times, schedule, **options), on_step)
    if found is not None and known is not None and times[-1] == 0:
        found = finish_known(found, *known)
    return found


def _asked(model: Any, request: Request, chosen: dict[str, Any]) -> Ask:
    """The denoiser under the request's conditions, with guidance and the wrappers asked for."""
    guidance: Guidance = chosen["guidance"]
    _check_guidance(request, guidance)
    given, references = _conditions(model, request, chosen)
    schedule = model.denoiser.process.schedule
    ask = build(guidance, model.denoiser, given, references, schedule.point, getattr(request.weaker, "denoiser", request.weaker))
    if request.canvas is not None:
        ask = large_canvas(ask, *request.canvas)
    return ask if request.cache is None else feature_cache(ask, request.cache)


def _conditions(model: Any, request: Request, chosen: dict[str, Any]) -> tuple[Conditioning, list[Conditioning]]:
    """The condition, and what there is to move away from."""
    n, picture = chosen["n"], request.picture or Picture(chosen["height"], chosen["width"])
    given = model.conditioner(prompts(request.prompt, n), picture).to(model.device)
    reference = model.conditioner(prompts(request.negative_prompt, n), picture.negative).to(model.device)
    if request.vector is not None:
        if given.vector is not None:
            raise UserError("this model's conditioner fills the vector itself: expected vector=None")
        vector = request.vector.to(model.device, torch.float32).expand(n, -1)
        given, reference = replace(given, vector=vector), replace(reference, vector=vector)
    if request.concat is None:
        return given, [reference]
    joined = request.concat if isinstance(request.concat, tuple) else (request.concat, request.concat)
    maps = [part.to(model.device, torch.float32).expand(n, -1, -1, -1) for part in joined]
    cells = latent_shape(model, chosen["height"], chosen["width"])[1:]
    if any(part.shape[2:] != cells for part in maps):
        raise UserError(f"concat of shapes {[tuple(part.shape) for part in maps]}: expected maps of {cells[0]} x {cells[1]} latent cells")
    return replace(given, concat=maps[0]), [replace(reference, concat=part) for part in maps[1:]]


def _check_guidance(request: Request, guidance: Guidance) -> None:
    """`UserError` for settings that guidance would not obey."""
    if request.negative_prompt is not None and guidance.off:
        raise UserError(
            f"negative prompt {request.negative_prompt!r} with guidance {guidance}: nothing is moved away from it; raise the guidance"
        )
    if request.weaker is not None and "model" not in guidance.reference:
        raise UserError(f"a weaker model with guidance {guidance}: expected the reference model, as in '2 model:path=NAME'")
    canvas = request.canvas
    if canvas is None:
        return
    if not (isinstance(canvas, tuple | list) and len(canvas) == 2 and all(isinstance(n, int) and n > 0 for n in canvas)):
        raise UserError(f"canvas={canvas!r}: expected (size, stride) of the windows in latent cells, as (32, 16)")
    if getattr(guidance.parts()[1], "momentum", 0):
        raise UserError(f"guidance {guidance} on a canvas: its momentum would pass from window to window; expected momentum=0")


def _latent(model: Any, name: str, z: Tensor, like: Tensor) -> Tensor:
    """A latent for each image of the run."""
    if z.ndim != 4 or z.shape[1:] != like.shape[1:] or len(z) not in (1, len(like)) or not all_finite(z):
        raise UserError(
            f"{name} of shape {tuple(z.shape)}: expected finite numbers of shape {tuple(like.shape)}, or one latent for all images"
        )
    return z.to(model.device, torch.float32)


def _known(model: Any, known: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    pair = isinstance(known, tuple | list) and len(known) == 2
    if not pair or not all(isinstance(part, Tensor) and part.ndim == 4 for part in known):
        raise UserError("known: expected (z, mask), a latent (n, c, h, w) to keep and where to keep it (n or 1, 1 or c, h, w), 1 is known")
    z, mask = (part.to(model.device, torch.float32) for part in known)
    return z, mask
