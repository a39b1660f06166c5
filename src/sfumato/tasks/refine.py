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
from sfumato.sampling import Plan, Request
from sfumato.validate import number_in


@dataclass(frozen=True)
class Handover:
    """Two plans that share one run.

    Attributes:
        first: Plan of the base model; `base.run(first, output="latent")` gives the noisy latent.
        last: Plan of the refiner, without that latent.
        scale: Factor of the latent, for a refiner whose process has another scale.
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

    Both encode the same prompts; a refiner with one text encoder encodes `prompt`, not `prompt_2`.
    Steps, sampler, spacing and guidance that the request leaves open are each model's own.

    Args:
        base: The first model.
        refiner: The second, of the same latent space.
        request: Request of the whole run, or the base model's plan of it.
        at: The base model's share of the process, in (0, 1).

    Returns:
        A plan for `refiner.run`.

    Raises:
        UserError: For latents of two kinds, or an `at` that leaves one of the models no step.
    """
    plans = handover(base, refiner, request, at=at)
    return plans.resume(base.run(plans.first, output="latent"))


def handover(
    base: LatentDiffusion, refiner: LatentDiffusion, request: Request | Plan, *, at: float = 0.8
) -> Handover:
    """Plan both parts of `refine`, without a weight.

    A refiner with another process than the base's begins at the time of equal noise level.
    Arguments and errors are those of `refine`.
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
    if refiner.conditioner.prompt_weights is None:  # it cannot weigh words
        request = replace(request, prompt_weights=None)
    last = refiner.plan(replace(request, init_latent=None, noise=None))
    times = [time, *(t for t in last.timesteps if t < time)]
    if len(times) < 2:
        raise UserError(
            f"at={at}: the refiner's {len(last.timesteps) - 1} steps are all before it; "
            "expected less, or more steps"
        )
    # The latent holds the first part's draws: the last part continues with the next one.
    last = last.edit(timesteps=times, noise_offset=request.noise_offset + drawn)
    return Handover(first, last, scale)


def _check_pair(base: LatentDiffusion, refiner: LatentDiffusion) -> None:
    """Raise `UserError` for models of different latent spaces."""
    space, own = base.autoencoder.space, refiner.autoencoder.space
    if space != own:
        raise UserError(
            f"the refiner's latents have {own.channels} channels, factor {own.factor} and std "
            f"{own.std[0]:.4g}, the first model's {space.channels}, {space.factor} and "
            f"{space.std[0]:.4g}: expected two models of one latent space"
        )


def _count_steps(model: LatentDiffusion, times: tuple[float, ...], at: float) -> int:
    """Number of times before the hand-over."""
    hint = "the share of the process before the hand-over; 0.8 is usual"
    number_in("at", at, above=0, below=1, hint=hint)
    grid, least = model.denoiser.process.schedule.grid, 1 - at
    if grid is not None:
        least = (round(grid * (1 - at)) + 1) / grid
    count = sum(t > least - 1e-9 for t in times[:-1])
    if not 0 < count < len(times) - 1:
        raise UserError(
            f"at={at} of a run of {len(times) - 1} steps leaves "
            f"{'the first' if count == 0 else 'the second'} model none: expected more steps, "
            "or another share"
        )
    return count
