"""A plan as a coroutine of denoiser calls.

Nothing of the request is checked here: `plan.py` has done so.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn
from sfumato.diffuse.run import SeededNoise, Step, sampler_coroutine
from sfumato.diffuse.samplers import calls, traits_of
from sfumato.diffuse.slerp import SlerpNoise
from sfumato.predict.conditioners import interpolate_conditioning
from sfumato.predict.guidance.moment import Moment
from sfumato.predict.guidance.settings import build
from sfumato.predict.wrappers.feature_cache import feature_cache
from sfumato.predict.wrappers.known_region import finish as restore_region
from sfumato.predict.wrappers.known_region import known_region
from sfumato.predict.wrappers.known_region import start as start_region
from sfumato.predict.wrappers.multidiffusion import multidiffusion
from sfumato.sampling.plan import Plan, Prompts, concat_parts, guide_denoiser, seeds_of
from sfumato.sampling.request import Model
from sfumato.types import Conditioning, ImageSpec, Noise

logger = logging.getLogger(__name__)


def plan_coroutine(
    model: Model, plan: Plan, on_step: Callable[[Step], bool | None] | None = None
) -> DenoiseCalls[Tensor | None]:
    """Coroutine that samples one plan: yields denoiser calls, returns the latents.

    Args:
        model: The model that the plan was made for.
        plan: The plan.
        on_step: Called after each network call; cancels the run by returning False.

    Returns:
        The latents; None where `on_step` cancelled the run.
    """
    request, times, schedule = plan.request, plan.timesteps, model.denoiser.process.schedule
    draw = noise_source(plan, model.device)
    for _ in range(request.noise_offset):
        draw()
    start = draw()  # drawn also where `noise` replaces it, so that later draws are the same
    if request.noise is not None:
        start = request.noise.to(model.device, torch.float32)
    denoise = _denoise_fn(model, plan)
    x = _first_latent(model, plan, schedule.point(times[0]), start)
    region = None
    if request.known_region is not None:
        z, mask = region = tuple(v.to(model.device, torch.float32) for v in request.known_region)
        first = x if request.noise_only_start else None
        denoise = known_region(denoise, z, mask, schedule.point, first)
        if request.init_latent is None and request.noisy_latent is None:
            x = start_region(start, z, mask, schedule.point, times[0])
    sampler, options = plan.sampler_function, plan.options
    steps = calls(sampler, times, schedule, **options)
    latents = yield from sampler_coroutine(
        sampler(x, times, schedule, draw, **options), denoise, steps, on_step
    )
    if latents is not None and region is not None and times[-1] == 0:
        latents = restore_region(latents, *region)
    return latents


def noise_source(plan: Plan, device: torch.device | str) -> Noise:
    """The noise of a plan's images, draw after draw, from each image's seed or two seeds."""
    if plan.request.noise_mix is None:
        return SeededNoise(plan.latent_shape, plan.seeds, device)
    seeds, shares = plan.request.noise_mix
    first = SeededNoise(plan.latent_shape, seeds_of(plan.request.seed, 1) * plan.n, device)
    return SlerpNoise(first, SeededNoise(plan.latent_shape, seeds, device), shares)


def _first_latent(model: Model, plan: Plan, point: tuple[float, float], noise: Tensor) -> Tensor:
    """The latent at the first time: the request's own, or noise of the process's variance."""
    alpha, sigma = point
    request = plan.request
    if request.noisy_latent is not None:
        return request.noisy_latent.to(model.device, torch.float32).expand(plan.n, -1, -1, -1)
    if request.init_latent is not None:
        return alpha * request.init_latent.to(model.device, torch.float32) + sigma * noise
    # the variance of x_t of standardised latents, also where a run begins later than at t = 1
    return math.hypot(alpha, sigma) * noise


def _denoise_fn(model: Model, plan: Plan) -> DenoiseFn:
    """The denoiser under the plan's conditioning, with guidance and wrappers."""
    request = plan.request
    conditioning, references = _conditionings(model, plan)
    point = model.denoiser.process.schedule.point
    _log_idle_guidance(plan, point)
    denoise = build(
        plan.guidance, model.denoiser, conditioning, references, point, guide_denoiser(request)
    )
    if request.tiles is not None:
        denoise = multidiffusion(denoise, *request.tiles)
    return denoise if request.cache is None else feature_cache(denoise, request.cache)


def _log_idle_guidance(plan: Plan, point: Callable[[float], tuple[float, float]]) -> None:
    """Log guidance, and with it a negative prompt, whose weight is 1 at all times of the run.

    Samplers that call the network between the times are left out.
    """
    weight, rule, _ = plan.guidance.parts()
    if plan.guidance.off or rule.always or traits_of(plan.sampler_function).calls > 1:
        return
    times = plan.timesteps[:-1]
    if not any(weight.active(Moment(t, *point(t))) for t in times):
        logger.warning(
            "guidance %s has no effect: its weight is 1 at all times of this run, %.3g to %.3g",
            plan.guidance,
            times[0],
            times[-1],
        )


def _conditionings(model: Model, plan: Plan) -> tuple[Conditioning, list[Conditioning]]:
    """The condition, and the conditionings that guidance moves away from."""
    request, n, device = plan.request, plan.n, model.device
    condition = reference = _encode_prompts(model, plan)
    if not plan.guidance.off:
        spec = plan.image_spec.negative
        reference = _encode(model, plan, plan.negative_prompts, plan.negative_prompts_2, spec)

    def rows(value: Tensor) -> Tensor:
        """One row an image."""
        return value.to(device, torch.float32).expand(n, *[-1] * (value.ndim - 1))

    def complete(conditioning: Conditioning) -> Conditioning:
        """Add the inputs beside the prompt, which guidance does not move away from."""
        if request.vector is not None:
            conditioning = replace(conditioning, vector=rows(request.vector))
        if request.reference_images is not None:
            references = tuple(map(rows, request.reference_images))
            conditioning = replace(conditioning, references=references)
        return append_distilled_guidance(conditioning, n, plan.distilled_guidance, device)

    condition, reference = complete(condition), complete(reference)
    maps = [*map(rows, concat_parts(request))]
    if not maps:
        return condition, [reference]
    references = [replace(reference, concat=part) for part in maps[1:]]
    return replace(condition, concat=maps[0]), references


def condition_of(model: Model, plan: Plan) -> Conditioning:
    """The conditioning of a plan's prompts, with the scale of distilled guidance."""
    return append_distilled_guidance(
        _encode_prompts(model, plan), plan.n, plan.distilled_guidance, model.device
    )


def _encode_prompts(model: Model, plan: Plan) -> Conditioning:
    """The conditioning of a plan's prompts, or between two prompts."""
    condition = _encode(model, plan, plan.prompts, plan.prompts_2, plan.image_spec)
    if plan.request.prompt_mix is None:
        return condition
    prompt, shares = plan.request.prompt_mix
    return interpolate_conditioning(
        condition, _encode(model, plan, (prompt,) * plan.n, plan.prompts_2, plan.image_spec), shares
    )


def _encode(
    model: Model, plan: Plan, prompts: Prompts, prompts_2: Prompts | None, image_spec: ImageSpec
) -> Conditioning:
    """Encode prompts, and `prompts_2` for the second text encoder, by the plan's weights."""
    conditioner = model.conditioner.with_prompt_weights(plan.prompt_weights)
    return conditioner(prompts, image_spec, prompts_2).to(model.device)


def append_distilled_guidance(
    conditioning: Conditioning, n: int, scale: float | None, device: torch.device
) -> Conditioning:
    """Append the scale of distilled guidance to the vector; None: unchanged."""
    if scale is None:
        return conditioning
    column, vector = torch.full((n, 1), scale, device=device), conditioning.vector
    vector = column if vector is None else torch.cat([vector.float(), column], dim=1)
    return replace(conditioning, vector=vector)
