"""One run shared by two models: the first draws it down to some noise, the second goes on from
there (SDXL's base and refiner; Podell et al. 2023, arXiv:2307.01952, section 2.5; an ensemble of
expert denoisers, Balaji et al. 2022, arXiv:2211.01324).

`at` is the share of the process that is the first's: of a table of T timesteps it asks those of at
least round(T - at T), as diffusers' `denoising_end` and `denoising_start` do; of a continuous one
the times t of at least 1 - at. What is handed over is the noisy latent.
"""

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.samplers import draws
from sfumato.errors import UserError
from sfumato.sampling import Request, chosen_settings, sampler_of, times_of


def refine(base: Any, refiner: Any, request: Request, *, at: float = 0.8) -> Request:
    """Runs the first part of the request with `base`, and gives the last part, for `refiner.run`.
    Both read the same prompts.

    Steps, sampler, spacing and guidance that the request leaves open are each model's own.
    `UserError` for latents of two kinds, or an `at` that leaves one of the models nothing to do.
    """
    check_pair(base, refiner)
    return last_part(
        base, refiner, base.run(first_part(base, request, at=at), output="latent"), request, at=at
    )


def check_pair(base: Any, refiner: Any) -> None:
    """`UserError` for models whose latents are not the same thing."""
    ours, theirs = base.autoencoder.space, refiner.autoencoder.space
    if ours != theirs:
        raise UserError(
            f"the refiner's latents have {theirs.channels} channels, factor {theirs.factor} and std {theirs.std[0]:.4g}, the first model's "
            f"{ours.channels}, {ours.factor} and {ours.std[0]:.4g}: expected two models of one latent space"
        )


def first_part(model: Any, request: Request, *, at: float = 0.8) -> Request:
    """The request down to the hand-over: `model.run(..., output="latent")` gives a noisy latent."""
    times = times_of(model, request)
    return replace(request, timesteps=times[: _asked(model, times, at) + 1])


def last_part(
    base: Any, refiner: Any, x: Float[Tensor, "B c h w"], request: Request, *, at: float = 0.8
) -> Request:
    """What `base` ended `first_part` with (n, c, h, w) -> the rest of the request, for `refiner`.

    A refiner with one text encoder reads `prompt`, not `prompt_2`. Where its process is another
    than the base's, it begins at the time at which it knows as much noise.
    """
    first = first_part(base, request, at=at)
    assert first.timesteps is not None
    here, theirs, ours = (
        first.timesteps[-1],
        base.denoiser.process.schedule,
        refiner.denoiser.process.schedule,
    )
    if ours != theirs:
        before = theirs.point(here)
        here = ours.at_noise_level(theirs.noise_level(here))
        x = x * (math.hypot(*ours.point(here)) / math.hypot(*before))
    times = [here, *(t for t in times_of(refiner, request) if t < here)]
    if len(times) < 2:
        raise UserError(
            f"at={at}: the refiner's {len(times_of(refiner, request)) - 1} steps are all before it; expected less, or more steps"
        )
    words = (
        request
        if len(getattr(refiner.conditioner, "encoders", {})) > 1
        else replace(request, prompt_2=None, negative_prompt_2=None)
    )
    return replace(
        words,
        timesteps=times,
        begin=None,
        noise=None,
        resume=x,
        drawn=request.drawn + _drawn(base, first),
    )


def _asked(model: Any, times: list[float], at: float) -> int:
    """How many of the times are asked before the hand-over."""
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 < at < 1:
        raise UserError(
            f"at={at!r}: expected a number above 0 and below 1, the share of the process before the hand-over; 0.8 is usual"
        )
    schedule = model.denoiser.process.schedule
    least = (
        1 - at if schedule.grid is None else (round(schedule.grid * (1 - at)) + 1) / schedule.grid
    )
    count = sum(t > least - 1e-9 for t in times[:-1])
    if not 0 < count < len(times) - 1:
        raise UserError(
            f"at={at} of a run of {len(times) - 1} steps leaves {'the first' if count == 0 else 'the second'} model none: expected more "
            "steps, or another share"
        )
    return count


def _drawn(model: Any, request: Request) -> int:
    """How often the first part draws noise after its start: the last part goes on with the next,
    not with what x has in it already.
    """
    sampler, options = sampler_of(chosen_settings(model, request)["sampler"])
    assert request.timesteps is not None
    return draws(sampler, tuple(request.timesteps), model.denoiser.process.schedule, **options)
