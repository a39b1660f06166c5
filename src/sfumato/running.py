"""A request's run: the string of questions to the denoiser that ends with the latents.

`model` in this file is a `LatentDiffusion`, or anything with its autoencoder, denoiser,
conditioner, defaults, sample_size and device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn
from sfumato.diffuse.blend import BlendedNoise
from sfumato.diffuse.sample import SeededNoise, Step, all_finite, conduct
from sfumato.diffuse.samplers import calls
from sfumato.errors import UserError
from sfumato.predict.conditioners._between import between
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.wrappers.feature_cache import feature_cache
from sfumato.predict.wrappers.known_region import finish as finish_known
from sfumato.predict.wrappers.known_region import known_region
from sfumato.predict.wrappers.known_region import start as begin_known
from sfumato.predict.wrappers.large_canvas import large_canvas
from sfumato.sampling import (
    Prompt,
    Request,
    chosen_settings,
    latent_shape,
    prompts,
    sampler_of,
    seeds_of,
    times_of,
)
from sfumato.types import Conditioning, ImageSpec, Noise


def questions(
    model: Any, request: Request, on_step: Callable[[Step], bool | None] | None = None
) -> DenoiseCalls[Tensor | None]:
    """A request's run: a string of questions that ends with the latents (None: cancelled). What is
    wrong shows at the first question.
    """
    chosen = chosen_settings(model, request)
    times = times_of(model, request, chosen)
    schedule = model.denoiser.process.schedule
    draw = noise_of(model, request, latent_shape(model, chosen["height"], chosen["width"]))
    for _ in range(request.drawn):
        draw()
    start = draw()  # drawn also where `noise` takes its place: what is drawn next is then the same
    if request.noise is not None:
        if request.noise.shape != start.shape or not all_finite(request.noise):
            raise UserError(
                f"noise of shape {tuple(request.noise.shape)}: expected finite numbers of shape {tuple(start.shape)}"
            )
        start = request.noise.to(model.device, torch.float32)
    ask, x, known = (
        _asked(model, request, chosen),
        _start(model, request, schedule.point(times[0]), start),
        request.known,
    )
    if known is not None:
        z, mask = known = _known(model, known)
        ask = known_region(ask, z, mask, schedule.point, x if request.blind_start else None)
        if request.begin is None and request.resume is None:
            x = begin_known(start, z, mask, schedule.point, times[0])
    sampler, options = sampler_of(chosen["sampler"])
    found = yield from conduct(
        sampler(x, times, schedule, draw, **options),
        ask,
        calls(sampler, times, schedule, **options),
        on_step,
    )
    if found is not None and known is not None and times[-1] == 0:
        found = finish_known(found, *known)
    return found


def noise_of(model: Any, request: Request, shape: Sequence[int]) -> Noise:
    """What a request draws: image k's from seed + k; with `other_noise` between that of two
    seeds.
    """
    n = request.count
    if request.other_noise is None:
        return SeededNoise(shape, seeds_of(request.seed, n), model.device)
    seeds, shares = request.other_noise
    if len(seeds) != n:
        raise UserError(
            f"other_noise with {len(seeds)} seeds for {n} images: expected one an image"
        )
    check_shares("other_noise", shares, n)
    first = SeededNoise(shape, seeds_of(request.seed, 1) * n, model.device)
    second = SeededNoise(
        shape, [seed for given in seeds for seed in seeds_of(given, 1)], model.device
    )
    return BlendedNoise(first, second, shares)


def check_shares(name: str, shares: Sequence[float], n: int) -> None:
    """`UserError` unless there is a number in [0, 1] for each image."""
    if len(shares) != n or not all(
        isinstance(share, int | float) and 0 <= share <= 1 for share in shares
    ):
        raise UserError(
            f"{name} with shares {list(shares)}: expected a number from 0 to 1 for each of {n} images"
        )


def _start(model: Any, request: Request, point: tuple[float, float], noise: Tensor) -> Tensor:
    """x at the first time: what a request gives, or noise as strong as x is there."""
    alpha, sigma = point
    if request.resume is not None:
        if request.begin is not None or request.noise is not None:
            raise UserError(
                "resume with begin or noise: expected one of them, resume is all that a run begins with"
            )
        return _latent(model, "resume", request.resume, noise).expand(len(noise), -1, -1, -1)
    if request.begin is not None:
        return alpha * _latent(model, "begin", request.begin, noise) + sigma * noise
    # the variance of x_t of standardised latents, also where a run begins later than at t = 1
    return math.hypot(alpha, sigma) * noise


def _asked(model: Any, request: Request, chosen: dict[str, Any]) -> DenoiseFn:
    """The denoiser under the request's conditions, with guidance and the wrappers asked for."""
    guidance: Guidance = chosen["guidance"]
    _check_guidance(request, guidance, chosen.get("learned_guidance"))
    given, references = _conditions(model, request, chosen, guidance)
    schedule = model.denoiser.process.schedule
    ask = build(
        guidance,
        model.denoiser,
        given,
        references,
        schedule.point,
        getattr(request.weaker, "denoiser", request.weaker),
    )
    if request.canvas is not None:
        ask = large_canvas(ask, *request.canvas)
    return ask if request.cache is None else feature_cache(ask, request.cache)


def _conditions(
    model: Any, request: Request, chosen: dict[str, Any], guidance: Guidance
) -> tuple[Conditioning, list[Conditioning]]:
    """The condition, and what there is to move away from, which is not read where nothing is."""
    n, picture = chosen["n"], request.picture or ImageSpec(chosen["height"], chosen["width"])
    given = told(model, request, n, picture)
    words = request.negative_prompt, request.negative_prompt_2
    reference = (
        given if guidance.off else _read(model, "negative_prompt", *words, n, picture.negative)
    )
    if request.vector is not None:
        if given.vector is not None:
            raise UserError(
                "this model's conditioner fills the vector itself: expected vector=None"
            )
        vector = request.vector.to(model.device, torch.float32).expand(n, -1)
        given, reference = replace(given, vector=vector), replace(reference, vector=vector)
    learned = chosen.get("learned_guidance")
    given, reference = (
        told_guidance(given, n, learned, model.device),
        told_guidance(reference, n, learned, model.device),
    )
    if request.references is not None:
        read = tuple(
            z.to(model.device, torch.float32).expand(n, -1, -1, -1) for z in request.references
        )
        given, reference = replace(given, references=read), replace(reference, references=read)
    if request.concat is None:
        return given, [reference]
    joined = (
        request.concat if isinstance(request.concat, tuple) else (request.concat, request.concat)
    )
    maps = [part.to(model.device, torch.float32).expand(n, -1, -1, -1) for part in joined]
    cells = latent_shape(model, chosen["height"], chosen["width"])[1:]
    if any(part.shape[2:] != cells for part in maps):
        raise UserError(
            f"concat of shapes {[tuple(part.shape) for part in maps]}: expected maps of {cells[0]} x {cells[1]} latent cells"
        )
    return replace(given, concat=maps[0]), [replace(reference, concat=part) for part in maps[1:]]


def told_guidance(
    given: Conditioning, n: int, learned: float | None, device: torch.device
) -> Conditioning:
    """The same with the strength of a learned guidance as the vector's last number, if there is
    one.
    """
    if learned is None:
        return given
    column = torch.full((n, 1), learned, device=device)
    return replace(
        given,
        vector=column if given.vector is None else torch.cat([given.vector.float(), column], dim=1),
    )


def told(model: Any, request: Request, n: int, picture: ImageSpec) -> Conditioning:
    """What the network is told by the request's words: its prompt's, or what lies between two."""
    given = _read(model, "prompt", request.prompt, request.prompt_2, n, picture)
    if request.other_prompt is None:
        return given
    prompt, shares = request.other_prompt
    check_shares("other_prompt", shares, n)
    if not all(
        words is None or isinstance(words, str)
        for words in (request.prompt, request.prompt_2, prompt)
    ):
        raise UserError(
            f"other_prompt with a list of prompts ({request.prompt!r}): expected one text for all images at each end"
        )
    return between(given, _read(model, "prompt", prompt, request.prompt_2, n, picture), shares)


def _read(
    model: Any, name: str, prompt: Prompt, second: Prompt, n: int, picture: ImageSpec
) -> Conditioning:
    """Words for each image, read by the conditioner; `second` by its second text encoder."""
    if second is None:
        return model.conditioner(prompts(prompt, n), picture).to(model.device)
    if len(getattr(model.conditioner, "encoders", {})) < 2:
        raise UserError(
            f"{name}_2 {second!r}: this model has no second text encoder to read it, put everything into {name}"
        )
    if prompt is None:
        raise UserError(
            f"{name}_2 {second!r} without {name}: say what the first text encoder reads too; '' is no words"
        )
    return model.conditioner(prompts(prompt, n), picture, prompts(second, n)).to(model.device)


def _check_guidance(request: Request, guidance: Guidance, learned: float | None) -> None:
    """`UserError` for settings that guidance would not obey."""
    negative = (
        request.negative_prompt
        if request.negative_prompt is not None
        else request.negative_prompt_2
    )
    if negative is not None and guidance.off and learned is not None:
        raise UserError(
            f"negative prompt {negative!r} with learned guidance {learned:g} alone, in which nothing is moved away from it: give guidance above 1 "
            f"for a second pass, and learned_guidance={learned:g} beside it"
        )
    if negative is not None and guidance.off:
        raise UserError(
            f"negative prompt {negative!r} with guidance {guidance}: nothing is moved away from it; raise the guidance"
        )
    if request.weaker is not None and "model" not in guidance.reference:
        raise UserError(
            f"a weaker model with guidance {guidance}: expected the reference model, as in '2 model:path=NAME'"
        )
    canvas = request.canvas
    if canvas is None:
        return
    if not (
        isinstance(canvas, tuple | list)
        and len(canvas) == 2
        and all(isinstance(n, int) and n > 0 for n in canvas)
    ):
        raise UserError(
            f"canvas={canvas!r}: expected (size, stride) of the windows in latent cells, as (32, 16)"
        )
    if getattr(guidance.parts()[1], "momentum", 0):
        raise UserError(
            f"guidance {guidance} on a canvas: its momentum would pass from window to window; expected momentum=0"
        )


def _latent(model: Any, name: str, z: Tensor, like: Tensor) -> Tensor:
    """A latent for each image of the run."""
    if (
        z.ndim != 4
        or z.shape[1:] != like.shape[1:]
        or len(z) not in (1, len(like))
        or not all_finite(z)
    ):
        raise UserError(
            f"{name} of shape {tuple(z.shape)}: expected finite numbers of shape {tuple(like.shape)}, or one latent for all images"
        )
    return z.to(model.device, torch.float32)


def _known(model: Any, known: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    pair = isinstance(known, tuple | list) and len(known) == 2
    if not pair or not all(isinstance(part, Tensor) and part.ndim == 4 for part in known):
        raise UserError(
            "known: expected (z, mask), a latent (n, c, h, w) to keep and where to keep it (n or 1, 1 or c, h, w), 1 is known"
        )
    z, mask = (part.to(model.device, torch.float32) for part in known)
    return z, mask
