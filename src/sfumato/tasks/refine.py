"""One run shared by two models: a base model begins, a refiner continues.

SDXL's base and refiner (Podell et al. 2023, arXiv:2307.01952, section 2.5); an ensemble of expert
denoisers (Balaji et al. 2022, arXiv:2211.01324).

`at` is the base model's share of the process: of a table of T timesteps it evaluates those of at
least round(T - at T), as diffusers' `denoising_end` and `denoising_start` do; of a continuous one
the times t of at least 1 - at. The noisy latent is handed over.
"""

import math
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.samplers import draws
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request


@dataclass(frozen=True)
class Handover:
    """Two plans that share one run.

    Attributes:
        first: for the base model; `base.run(first, output="latent")` gives the noisy latent
        last: for the refiner, without that latent
        scale: what the latent is multiplied by where the refiner's process has another scale
    """

    first: Plan
    last: Plan
    scale: float = 1.0

    def resume(self, x: Float[Tensor, "B c h w"]) -> Plan:
        """The refiner's plan, from the noisy latent (n, c, h, w) of the base model."""
        return self.last.edit(noisy_latent=x if self.scale == 1 else x * self.scale)


def refine(
    base: LatentDiffusion, refiner: LatentDiffusion, request: Request | Plan, *, at: float = 0.8
) -> Plan:
    """Run the first part of a request with a base model, and plan the last part for a refiner.

    Both read the same prompts; a refiner with one text encoder reads `prompt`, not `prompt_2`.
    Steps, sampler, spacing and guidance that the request leaves open are each model's own.

    Args:
        base: the first model
        refiner: the second, of the same latent space
        request: of the whole run, or the base model's plan of it
        at: the base model's share of the process, in (0, 1)

    Returns:
        a plan for `refiner.run`

    Raises:
        UserError: latents of two kinds, or an `at` that leaves one of the models no step
    """
    plans = handover(base, refiner, request, at=at)
    return plans.resume(base.run(plans.first, output="latent"))


def handover(
    base: LatentDiffusion, refiner: LatentDiffusion, request: Request | Plan, *, at: float = 0.8
) -> Handover:
    """Plan both parts of `refine`, without a weight.

    Where the refiner's process is another than the base's, it begins at the time of equal noise
    level.
    """
    _check_pair(base, refiner)
    plan = request if isinstance(request, Plan) else base.plan(request)
    request = plan.request
    first = plan.edit(timesteps=plan.timesteps[: _count_steps(base, plan.timesteps, at) + 1])
    time, scale = first.timesteps[-1], 1.0
    schedule, own = base.denoiser.process.schedule, refiner.denoiser.process.schedule
    drawn = draws(first.sampler_function, first.timesteps, schedule, **first.options)
    if own != schedule:
        before = schedule.point(time)
        time = own.at_noise_level(schedule.noise_level(time))
        scale = math.hypot(*own.point(time)) / math.hypot(*before)
    if len(refiner.conditioner.encoders) < 2:
        request = replace(request, prompt_2=None, negative_prompt_2=None)
    last = refiner.plan(replace(request, init_latent=None, noise=None))
    times = [time, *(t for t in last.timesteps if t < time)]
    if len(times) < 2:
        raise UserError(
            f"at={at}: the refiner's {len(last.timesteps) - 1} steps are all before it; expected less, or more steps"
        )
    # What the first part drew is in the latent already: the last part continues with the next draw.
    return Handover(
        first, last.edit(timesteps=times, noise_offset=request.noise_offset + drawn), scale
    )


def _check_pair(base: LatentDiffusion, refiner: LatentDiffusion) -> None:
    """Raise `UserError` for models of different latent spaces."""
    space, own = base.autoencoder.space, refiner.autoencoder.space
    if space != own:
        raise UserError(
            f"the refiner's latents have {own.channels} channels, factor {own.factor} and std {own.std[0]:.4g}, the first model's "
            f"{space.channels}, {space.factor} and {space.std[0]:.4g}: expected two models of one latent space"
        )


def _count_steps(model: LatentDiffusion, times: tuple[float, ...], at: float) -> int:
    """Number of times before the hand-over."""
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
