"""A request resolved against a model, once: `resolve(model, request) -> Plan`.

Every `UserError` of a request is raised here, without touching a weight, so that a server may
refuse a request before it is queued. A run of a `Plan` can fail with `NumericalError`, or
for want of memory, and for no other reason.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import Tensor

from sfumato.batching import DenoiserLike
from sfumato.compress.base import SequentialAutoencoder
from sfumato.diffuse.run import all_finite
from sfumato.diffuse.samplers import Sampler, check_run, get_sampler, traits_of
from sfumato.diffuse.timesteps import check_times, timesteps
from sfumato.errors import UserError, quoted
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance.settings import Guidance
from sfumato.predict.networks.base import Network
from sfumato.predict.wrappers.feature_cache import check_cache, require_cuttable
from sfumato.predict.wrappers.known_region import check_fits, check_region
from sfumato.predict.wrappers.multidiffusion import check_windows
from sfumato.registry import names
from sfumato.sampling.request import (
    DECODINGS,
    Model,
    Prompt,
    Request,
    sampler_of,
    spacing_of,
)
from sfumato.types import Conditioning, ImageSpec, LatentSpace
from sfumato.validate import (
    LONGEST_SIDE,
    image_count,
    number_in,
    one_of,
    seed_number,
    step_count,
    whole_number,
)

logger = logging.getLogger(__name__)

Prompts = tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run with the model's defaults filled in.

    Attributes:
        n: Number of images.
        steps: Sampling steps of the whole run.
        sampler: "name" or "name:option=value,...".
        spacing: The same; "given" where the request has its timesteps, "tuned" for tuned ones.
        guidance: Guidance by two passes.
        distilled_guidance: Guidance scale of a guidance-distilled network; None for others.
        height: In pixels.
        width: In pixels.
        prompt_weights: Rule by which brackets weigh words; None: this model cannot weigh them.
    """

    n: int
    steps: int
    sampler: str
    spacing: str
    guidance: Guidance
    distilled_guidance: float | None
    height: int
    width: int
    prompt_weights: str | None

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object.

        `distilled_guidance` and `prompt_weights` are in it only where they have a value.
        """
        values = {f.name: getattr(self, f.name) for f in fields(Settings)}
        values["guidance"] = self.guidance.to_json()
        for name in ("distilled_guidance", "prompt_weights"):
            if values[name] is None:
                del values[name]
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Settings):
    """A request resolved against a model: everything a run needs, checked once.

    Attributes:
        request: The request; its latents, maps and regions are used as they are.
        latent_shape: (C, h, w).
        timesteps: Times to visit, strictly falling.
        sampler_function: The sampler of `diffuse.samplers`.
        options: Its options.
        seeds: Each image's seed.
        image_spec: Size, crop and score that the conditioner passes to the network.
        prompts: One an image.
        prompts_2: Texts for the second text encoder; None: the same.
        negative_prompts: One an image.
        negative_prompts_2: As `prompts_2`.
    """

    request: Request
    latent_shape: tuple[int, int, int]
    timesteps: tuple[float, ...]
    sampler_function: Sampler
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    image_spec: ImageSpec
    prompts: Prompts
    prompts_2: Prompts | None
    negative_prompts: Prompts
    negative_prompts_2: Prompts | None

    def explicit_request(self) -> Request:
        """The request with its settings filled in: another model runs it with the same ones."""
        names = [f.name for f in fields(Settings) if f.name != "n"]
        times = list(self.timesteps) if self.spacing in ("given", "tuned") else None
        return replace(
            self.request, timesteps=times, **{name: getattr(self, name) for name in names}
        )

    def edit(self, timesteps: Sequence[float] | None = None, **values: Any) -> Self:
        """Change the run without resolving the request again, as tasks do.

        Args:
            timesteps: Other times to visit.
            **values: Fields of the request that hold a latent, a map or a region, or
                `noise_offset`.

        Raises:
            UserError: For a latent or map of another shape than the run's, or that is not finite.
        """
        plan = replace(
            self,
            timesteps=self.timesteps if timesteps is None else tuple(timesteps),
            request=replace(self.request, **values),
        )
        _check_latents(plan.request, plan.n, plan.latent_shape)
        _check_maps(plan.request, plan.n, plan.latent_shape)
        return plan


def resolve_settings(model: Model, request: Request) -> Settings:
    """The settings of a request's run.

    Raises:
        UserError: For impossible ones.
    """
    defaults = model.defaults
    one_of("way to decode", request.decoding, DECODINGS)
    n = image_count("n", request.count)
    steps = defaults.steps if request.steps is None else request.steps
    if request.timesteps is not None:
        steps = len(check_times(request.timesteps)) - 1
    guidance, distilled = _guidance(model, request)
    sampler = defaults.sampler if request.sampler is None else request.sampler
    step_count("steps", steps)
    _check_sampler(sampler, guidance)
    height, width = (
        whole_number(
            name, model.sample_size if side is None else side, 1, LONGEST_SIDE, unit="pixels"
        )
        for name, side in (("height", request.height), ("width", request.width))
    )
    return Settings(
        n=n,
        steps=steps,
        sampler=sampler,
        spacing=_spacing(model, request, sampler, steps),
        guidance=guidance,
        distilled_guidance=distilled,
        height=height,
        width=width,
        prompt_weights=_prompt_weights(model, request),
    )


def resolve(model: Model, request: Request) -> Plan:
    """Resolve a request against a model: defaults filled in, all checks made.

    No weight is read: the model's networks may lie on the meta device.

    Args:
        model: A `LatentDiffusion`.
        request: The request.

    Returns:
        The plan that `LatentDiffusion.sample` and `finish` carry out.

    Raises:
        UserError: For whatever in the request cannot be carried out.
    """
    settings = resolve_settings(model, request)
    n, shape = settings.n, latent_shape(model.autoencoder.space, settings.height, settings.width)
    times = times_of(model, request, settings)
    sampler, options = sampler_of(settings.sampler)
    seeds = seeds_of(request.seed, n)
    spec = request.image_spec or ImageSpec(settings.height, settings.width)
    if not isinstance(spec, ImageSpec):
        raise UserError(f"image_spec={spec!r}: expected an ImageSpec(height, width, ...)")
    denoiser = model.denoiser
    check_run(sampler, times, denoiser.process.schedule, options, denoiser.learned_variance)
    _check_noise(request, n)
    _check_latents(request, n, shape)
    _check_negative_prompt(request, settings)
    prompts = _read_prompts(model, request, settings, spec)
    _check_maps(request, n, shape)
    _check_network(model, request, shape)
    _check_guidance(model, request, settings.guidance)
    _check_output(model, request, settings)
    return Plan(
        **vars(settings),
        **prompts,
        request=request,
        latent_shape=shape,
        timesteps=tuple(times),
        sampler_function=sampler,
        options=options,
        seeds=tuple(seeds),
        image_spec=spec,
    )


# ---- settings ------------------------------------------------------------------------------------


def _guidance(model: Model, request: Request) -> tuple[Guidance, float | None]:
    """Guidance by two passes, and the scale of distilled guidance (None: there is none)."""
    defaults, distilled = model.defaults, request.distilled_guidance
    guidance = (
        defaults.guidance_settings if request.guidance is None else Guidance.parse(request.guidance)
    )
    if not model.denoiser.guidance_embeds:
        if distilled is not None:
            raise UserError(
                f"distilled_guidance={distilled}: this model is not guidance-distilled; "
                f"expected guidance={distilled} (--guidance {distilled})"
            )
        return guidance, None
    scale_alone = request.guidance is not None and isinstance(guidance.to_json(), int | float)
    if distilled is None and scale_alone:
        return Guidance(), guidance.scale
    distilled = defaults.distilled_guidance if distilled is None else distilled
    return guidance, float(number_in("distilled_guidance", distilled, 0))


def _check_sampler(sampler: str, guidance: Guidance) -> None:
    """Raise `UserError` for a sampler that does not draw, or cannot use the guidance."""
    traits = traits_of(sampler_of(sampler)[0])
    if not (guidance.consistent or traits.uses_x0_and_eps):
        samplers = {name: get_sampler(name) for name in names("diffuse.samplers")}
        able = [name for name, one in samplers.items() if traits_of(one).uses_x0_and_eps]
        raise UserError(
            f"guidance {guidance} with sampler {sampler!r}: its x0 and eps do not add up to x; "
            f"expected one of {', '.join(able)}"
        )
    if traits.inverts:
        raise UserError(
            f"sampler {sampler!r} goes from an image to noise: "
            "expected one that draws; use `invert` for that"
        )


def _spacing(model: Model, request: Request, sampler: str, steps: int) -> str:
    """The spacing of the times: "given", "tuned", or a name."""
    defaults, spacing = model.defaults, request.spacing
    if request.timesteps is not None:
        return "given"
    if spacing is None:
        return defaults.spacing if defaults.tuned_for(sampler, steps) is None else "tuned"
    if spacing != "tuned":
        spacing_of(spacing)
    elif defaults.tuned_for(sampler, steps) is None:
        tables = defaults.tuned_timesteps.items()
        runs = [f"{name} in {len(times) - 1} steps" for name, table in tables for times in table]
        raise UserError(
            f"spacing 'tuned' for {sampler} in {steps} steps: this model has tuned times for "
            f"{', '.join(runs) or 'none'}; `sfumato tune-timesteps` finds more"
        )
    return spacing


def times_of(model: Model, request: Request, settings: Settings) -> list[float]:
    """The times that a run of these settings visits."""
    if request.timesteps is not None:
        return check_times(request.timesteps)
    if settings.spacing == "tuned":
        tuned = model.defaults.tuned_for(settings.sampler, settings.steps)
        assert tuned is not None
        return tuned
    name, options = spacing_of(settings.spacing)
    if name == "dynamic" and "tokens" not in options:
        options = {**options, "tokens": tokens_of(model, settings.height, settings.width)}
    return timesteps(name, settings.steps, model.denoiser.process.schedule, **options)


def tokens_of(model: Model, height: int, width: int) -> int:
    """Number of tokens that the network makes of an image."""
    _, *sides = latent_shape(model.autoencoder.space, height, width)
    return math.prod(-(-side // model.denoiser.patch) for side in sides)


def latent_shape(space: LatentSpace, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of an image's latent: the cells that cover it."""
    return space.channels, -(-height // space.factor), -(-width // space.factor)


def seeds_of(seed: int, n: int) -> list[int]:
    """Image k's seed, seed + k.

    Raises:
        UserError: For anything but a whole number with n seeds from it up to 2^64 - 1.
    """
    first = seed_number("seed", seed, n)
    return [first + k for k in range(n)]


def without_guidance(model: Model, request: Request) -> Request:
    """The request with guidance by two passes off, where it leaves the guidance open."""
    if request.guidance is not None:
        return request
    distilled = request.distilled_guidance
    if distilled is None and model.denoiser.guidance_embeds:
        distilled = model.defaults.distilled_guidance
    return replace(request, guidance=1.0, distilled_guidance=distilled)


# ---- prompts -------------------------------------------------------------------------------------


def _prompt_weights(model: Model, request: Request) -> str | None:
    """The rule for brackets: the request's, or the conditioner's; None: they cannot weigh."""
    rule = request.prompt_weights
    conditioner = model.conditioner.with_prompt_weights(rule)
    return conditioner.prompt_weights if rule is None else rule


def check_second_encoder(model: Model, name: str, second: Prompt) -> None:
    """Raise `UserError` for a model without a second text encoder, which would read `second`."""
    if len(model.conditioner.encoders) < 2:
        raise UserError(
            f"{name}_2 {second!r}: this model has no second text encoder, "
            f"put everything into {name}"
        )


def prompt_list(prompt: Prompt, n: int) -> list[str | None]:
    """One prompt an image.

    Raises:
        UserError: For anything but texts, or another number of prompts.
    """
    if prompt is None or isinstance(prompt, str):
        return [prompt] * n
    if not isinstance(prompt, Sequence) or not all(p is None or isinstance(p, str) for p in prompt):
        raise UserError(f"prompt {prompt!r}: expected text, a list of texts, or None")
    if len(prompt) != n:
        raise UserError(f"{len(prompt)} prompts for {n} images: expected one, or one an image")
    return list(prompt)


def _read_prompts(
    model: Model, request: Request, settings: Settings, spec: ImageSpec
) -> dict[str, Any]:
    """Fields of the plan: prompts and negative prompts of each image, for both text encoders."""
    n = settings.n
    conditioner = model.conditioner.with_prompt_weights(settings.prompt_weights)

    def pair(
        name: str, prompt: Prompt, second: Prompt, image_spec: ImageSpec
    ) -> tuple[Prompts, Prompts | None]:
        if second is not None:
            check_second_encoder(model, name, second)
            if prompt is None:
                raise UserError(
                    f"{name}_2 {second!r} without {name}: "
                    "expected a text for the first text encoder too; '' is an empty prompt"
                )
        first, other = prompt_list(prompt, n), None if second is None else prompt_list(second, n)
        conditioner.check(first, image_spec, other)
        if settings.prompt_weights != "none":
            _log_notation(model, settings, [*first, *(other or ())])
        return tuple(first), None if other is None else tuple(other)

    prompts, prompts_2 = pair("prompt", request.prompt, request.prompt_2, spec)
    if request.prompt_mix is not None:
        prompt, shares = _mix("prompt_mix", "prompt", request.prompt_mix)
        check_shares("prompt_mix", shares, n)
        texts = request.prompt, request.prompt_2, prompt
        if not all(isinstance(text, str | None) for text in texts):
            raise UserError(
                f"prompt_mix with a list of prompts ({request.prompt!r}): "
                "expected one text for all images at each end"
            )
        if model.conditioner.masks_padding:
            raise UserError(
                "prompt_mix: conditionings with masks (of padding, as PixArt's) cannot be "
                "interpolated; expected one prompt for all images, two seeds or two images can be"
            )
        pair("prompt", prompt, request.prompt_2, spec)
    negative, negative_2 = (None,) * n, None
    if not settings.guidance.off:
        texts = request.negative_prompt, request.negative_prompt_2
        negative, negative_2 = pair("negative_prompt", *texts, spec.negative)
    return {
        "prompts": prompts,
        "prompts_2": prompts_2,
        "negative_prompts": negative,
        "negative_prompts_2": negative_2,
    }


def _log_notation(model: Model, settings: Settings, prompts: Sequence[str | None]) -> None:
    """Log brackets and notations of other programs that are text for this model."""
    unused = None if settings.prompt_weights else model.conditioner.unused_weight(prompts)
    if unused is not None:
        logger.warning(
            "brackets and BREAK have no effect on this model, which reads them as text (%s): "
            "leave them out, or set prompt_weights='none' (--prompt-weights none) if they are text",
            quoted(unused),
        )
    elif (notation := model.conditioner.foreign_notation(prompts)) is not None:
        logger.warning(
            "%s is a notation of other programs, and text here: leave it out, "
            "or set prompt_weights='none' (--prompt-weights none) if it is meant as text",
            quoted(notation),
        )


def _check_negative_prompt(request: Request, settings: Settings) -> None:
    """Raise `UserError` for a negative prompt that guidance leaves without effect.

    Empty texts pass: programs send them with every request.
    """
    texts = request.negative_prompt, request.negative_prompt_2
    negative = next((text for text in texts if not _is_empty(text)), None)
    if negative is None:
        return
    guidance, distilled = settings.guidance, settings.distilled_guidance
    if not guidance.off:
        if not any(baseline.takes_negative for baseline in guidance.parts()[2]):
            raise UserError(
                f"negative prompt {negative!r} with guidance {guidance}: its baseline "
                f"{guidance.baseline} keeps the prompt, so that nothing is moved away from the "
                "negative one; expected the baseline condition, or no negative prompt"
            )
        return
    if distilled is not None:
        raise UserError(
            f"negative prompt {negative!r} with distilled guidance {distilled:g} alone, in which "
            "nothing is moved away from it: give guidance above 1 for a second pass, "
            f"and distilled_guidance={distilled:g} (--distilled-guidance) beside it"
        )
    raise UserError(
        f"negative prompt {negative!r} with guidance {guidance}: "
        "nothing is moved away from it; raise the guidance above 1, or leave that prompt out"
    )


def _is_empty(prompt: Prompt) -> bool:
    """True for no prompt, whitespace, and lists of these."""
    texts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
    return isinstance(texts, Sequence) and not any(text and str(text).strip() for text in texts)


def _mix(name: str, end: str, value: Any) -> tuple[Any, Any]:
    """The pair of a mix: its other end, and the shares."""
    if not _is_pair(value) or not isinstance(value[1], Sequence):
        raise UserError(
            f"{name}={value!r}: expected ({end}, shares), with a share from 0 to 1 for each image"
        )
    return value[0], value[1]


def check_shares(name: str, shares: Sequence[float], n: int) -> None:
    """Raise `UserError` unless there is a number in [0, 1] for each image."""
    valid = all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares)
    if len(shares) != n or not valid:
        raise UserError(
            f"{name} with shares {list(shares)}: "
            f"expected a number from 0 to 1 for each of {n} images"
        )


# ---- noise, latents, maps ------------------------------------------------------------------------


def _check_noise(request: Request, n: int) -> None:
    whole_number("noise_offset", request.noise_offset, 0, unit="draws")
    if request.noise_mix is None:
        return
    seeds, shares = _mix("noise_mix", "seeds", request.noise_mix)
    if not isinstance(seeds, Sequence) or len(seeds) != n:
        count = len(seeds) if isinstance(seeds, Sequence) else repr(seeds)
        raise UserError(f"noise_mix with {count} seeds for {n} images: expected one an image")
    check_shares("noise_mix", shares, n)
    for seed in seeds:
        seed_number("noise_mix seed", seed)


def _check_latents(request: Request, n: int, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` for latents of other shapes, not finite, or excluding each other."""
    noise, expected = request.noise, (n, *shape)
    if noise is not None and (_shape(noise) != expected or not all_finite(noise)):
        raise UserError(
            f"noise of shape {_shape(noise)}: expected finite numbers of shape {expected}"
        )
    if request.noisy_latent is not None and (request.init_latent is not None or noise is not None):
        raise UserError(
            "noisy_latent with init_latent or noise: "
            "expected one of them, a run begins with noisy_latent alone"
        )
    for name, z in (("noisy_latent", request.noisy_latent), ("init_latent", request.init_latent)):
        if z is not None and not (_is_batch(z, n, *shape) and all_finite(z)):
            raise UserError(
                f"{name} of shape {_shape(z)}: "
                f"expected finite numbers of shape {expected}, or one latent for all images"
            )
    region = request.known_region
    if region is not None:
        if not _is_pair_of_maps(region):
            raise UserError(
                "known_region: expected (z, mask), a latent (n, c, h, w) to keep "
                "and where to keep it (n or 1, 1 or c, h, w), 1 is known"
            )
        z, mask = (part.float() for part in region)
        check_region(z, mask)
        check_fits(expected, z, mask)


def _check_maps(request: Request, n: int, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` for maps, vectors and reference images of other shapes than the run's."""
    parts, vector = concat_parts(request), request.vector
    if not all(_is_batch(part, n, None, *shape[1:]) for part in parts):
        raise UserError(
            f"concat of shapes {list(dict.fromkeys(map(_shape, parts)))}: "
            f"expected maps of {shape[1]} x {shape[2]} latent cells, one or {n} of them"
        )
    if vector is not None and not _is_batch(vector, n, None):
        raise UserError(f"vector of shape {_shape(vector)}: expected (1 or {n}, V) numbers")
    for z in request.reference_images or ():
        if not _is_batch(z, n, None, None, None):
            raise UserError(
                f"reference_images of shape {_shape(z)}: expected latents (1 or {n}, C, h, w)"
            )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_batch(value: Any, n: int, *shape: int | None) -> bool:
    """True for a tensor of 1 or n rows of a shape, in which None is any number."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 1 + len(shape)
        and len(value) in (1, n)
        and all(
            expected in (None, size) for size, expected in zip(value.shape[1:], shape, strict=True)
        )
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_pair_of_maps(value: Any) -> bool:
    """True for two tensors of four axes."""
    return _is_pair(value) and all(isinstance(v, Tensor) and v.ndim == 4 for v in value)


def concat_parts(request: Request) -> tuple[Tensor, ...]:
    """The condition's map and those of guidance's references; none, or at least two."""
    parts = request.concat
    return () if parts is None else parts if isinstance(parts, tuple) else (parts, parts)


# ---- network, guidance, output -------------------------------------------------------------------


def _check_network(model: Model, request: Request, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` for inputs that the network lacks or ignores, and for sizes."""
    network, parts, vector = model.denoiser.network, concat_parts(request), request.vector
    fills = model.conditioner.vector_width is not None
    if vector is not None and fills:
        raise UserError("this model's conditioner fills the vector itself: expected vector=None")
    if not isinstance(network, Network):  # a network of another class checks its inputs itself
        return
    kind, channels = type(network).__name__, network.in_channels
    network.check_size(*shape[1:])
    for joined in [part.shape[1] for part in parts] or [0]:
        if shape[0] + joined != channels:
            raise UserError(
                f"{kind} takes {channels} channels and was given {shape[0] + joined}, "
                f"{joined} of them by concat: models that also take a mask, an image or "
                "a depth map need the task that gives it"
            )
    width = network.vector_width or network.classes
    if vector is None and width and not fills:
        raise UserError(
            f"{kind} needs a vector of {width} numbers, which this model's conditioner "
            "does not give: use the task that gives it"
        )
    if vector is not None and width and vector.shape[1] != width:
        raise UserError(f"a vector of {vector.shape[1]} numbers: {kind} expects {width}")
    images, most = request.reference_images or (), network.max_reference_images
    if len(images) > most:
        raise UserError(f"{len(images)} reference_images: {kind} reads at most {most}")
    if any(z.shape[1] != channels for z in images):
        raise UserError(
            f"reference_images of {sorted({z.shape[1] for z in images})} channels: "
            f"{kind} expects {channels}, latents of its autoencoder"
        )


def _check_guidance(model: Model, request: Request, guidance: Guidance) -> None:
    """Raise `UserError` for guidance, tiles and caches that this model's networks cannot run."""
    if request.guide_model is not None and "model" not in guidance.baseline:
        raise UserError(
            f"a weaker model with guidance {guidance}: "
            "expected the baseline model, as in '2 model:path=NAME'"
        )
    if request.tiles is not None:
        _check_tiles(request.tiles, guidance)
    denoisers: list[DenoiserLike] = [model.denoiser]
    baselines = () if guidance.off else guidance.parts()[2]
    conditions, parts = sum(b.takes_negative for b in baselines), concat_parts(request)
    supplied = len(parts) - 1 if parts else 1
    if conditions and supplied not in (1, conditions):
        raise UserError(
            f"{supplied} conditionings to move away from, for guidance {guidance}: "
            f"expected {conditions}"
        )
    weaker = guide_denoiser(request)
    for baseline in baselines:
        denoiser, _ = baseline.pair(model.denoiser, Conditioning(), Conditioning(), weaker)
        _check_same_latents(model.denoiser, denoiser)
        denoisers.append(denoiser)
    if request.cache is not None:
        check_cache(request.cache)
        for denoiser in denoisers:
            require_cuttable(denoiser)


def guide_denoiser(request: Request) -> DenoiserLike | None:
    """The denoiser of `guide_model`, which may be a model or a denoiser."""
    guide_model = request.guide_model
    return guide_model.denoiser if isinstance(guide_model, Model) else guide_model


def _check_same_latents(denoiser: Denoiser, other: DenoiserLike) -> None:
    """Raise `UserError` for a denoiser of other latents, or whose changed network cannot run."""
    if other is denoiser or not isinstance(other, Denoiser):
        return
    network, weaker = denoiser.network, other.network
    if not isinstance(network, Network) or not isinstance(weaker, Network):
        return
    weaker.check_blocks()
    own, channels = ((n.channels, n.in_channels) for n in (network, weaker))
    if own != channels:
        raise UserError(
            f"the weaker model predicts latents of {channels[0]} channels from {channels[1]}, "
            f"the model of {own[0]} from {own[1]}: expected the same"
        )


def _check_tiles(tiles: Any, guidance: Guidance) -> None:
    if not _is_pair(tiles) or not all(isinstance(n, int) and n > 0 for n in tiles):
        raise UserError(
            f"tiles={tiles!r}: expected (size, stride) of the windows in latent cells, as (32, 16)"
        )
    if guidance.parts()[1].stateful:
        raise UserError(
            f"guidance {guidance} on tiles: "
            "its momentum would pass from window to window; expected momentum=0"
        )
    check_windows(*tiles)


def _check_output(model: Model, request: Request, settings: Settings) -> None:
    """Raise `UserError` for a decoding, a composite or originals that do not fit the images."""
    if request.decoding == "exact" and not isinstance(model.autoencoder, SequentialAutoencoder):
        raise UserError(
            f"decoding='exact': {type(model.autoencoder).__name__} has no list of parts, "
            "and cannot be run in strips; use whole or tiled"
        )
    originals = request.originals
    if originals is not None:
        sizes = {image.size for image in originals}
        if sizes != {(settings.width, settings.height)} or len(originals) not in (1, settings.n):
            raise UserError(
                f"originals: {len(originals)} images for {settings.n} of {settings.width} x "
                f"{settings.height} pixels: expected as many, or one, of the same size"
            )
        if request.composite is None:
            raise UserError("originals without composite: its mask says which pixels stay")
    if request.composite is None:
        return
    if not _is_pair_of_maps(request.composite):
        raise UserError(
            "composite: expected (image, mask), pixels (n or 1, c, H, W) in [-1, 1] "
            "and a mask (n or 1, 1, H, W)"
        )
    n, channels, size = settings.n, model.autoencoder.channels, (settings.height, settings.width)
    image, mask = request.composite
    if not (_is_batch(image, n, channels, *size) and _is_batch(mask, n, 1, *size)):
        raise UserError(
            f"composite of an image of shape {_shape(image)} and a mask of shape {_shape(mask)} "
            f"for images of shape {(n, channels, *size)}: "
            "expected as many, or one, of the same size"
        )
