"""A request resolved against a model, once: `resolve(model, request) -> Plan`.

Every `UserError` of a request is raised here, without touching a weight, so that a server may
refuse a request before it is queued. What reads a `Plan` later can fail with `NumericalError`, or
for want of memory, and for no other reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import Tensor, nn

from sfumato.compress.base import SequentialAutoencoder
from sfumato.diffuse.run import all_finite
from sfumato.diffuse.samplers import check_run, traits_of
from sfumato.diffuse.timesteps import check_times, timesteps
from sfumato.errors import UserError, unknown
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance.settings import Guidance
from sfumato.predict.networks.base import Network
from sfumato.predict.wrappers.feature_cache import check_cache, require_cuttable
from sfumato.predict.wrappers.known_region import check_fits, check_region
from sfumato.predict.wrappers.multidiffusion import check_windows
from sfumato.registry import find, names
from sfumato.sampling.request import (
    DECODINGS,
    Model,
    Prompt,
    Request,
    check_distilled,
    check_steps,
    sampler_of,
    spacing_of,
)
from sfumato.types import Conditioning, ImageSpec, LatentSpace

Prompts = tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run with the model's defaults filled in.

    Attributes:
        n: number of images
        steps: sampling steps of the whole run
        sampler: "name" or "name:option=value,..."
        spacing: the same; "given" where the request has its timesteps, "tuned" for tuned ones
        guidance: guidance by two passes
        distilled_guidance: guidance scale passed to a guidance-distilled network; None: it is none
        height: in pixels
        width: in pixels
    """

    n: int
    steps: int
    sampler: str
    spacing: str
    guidance: Guidance
    distilled_guidance: float | None
    height: int
    width: int

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object; `distilled_guidance` only where it has a value."""
        values = {f.name: getattr(self, f.name) for f in fields(Settings)}
        values["guidance"] = self.guidance.to_json()
        return (
            values
            if self.distilled_guidance is not None
            else {k: v for k, v in values.items() if k != "distilled_guidance"}
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Settings):
    """A request resolved against a model: everything a run needs, checked once.

    Attributes:
        request: the request; its latents, maps and regions are used as they are
        latent_shape: (C, h, w)
        timesteps: times to visit, strictly falling
        sampler_function: the sampler of `diffuse.samplers`
        options: its options
        seeds: each image's seed
        image_spec: size, crop and score that the conditioner passes to the network
        prompts: one an image
        prompts_2: what the second text encoder reads instead; None: the same
        negative_prompts: one an image
        negative_prompts_2: as `prompts_2`
    """

    request: Request
    latent_shape: tuple[int, int, int]
    timesteps: tuple[float, ...]
    sampler_function: Callable[..., Any]
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    image_spec: ImageSpec
    prompts: Prompts
    prompts_2: Prompts | None
    negative_prompts: Prompts
    negative_prompts_2: Prompts | None

    def explicit_request(self) -> Request:
        """The request with its settings filled in: another model runs it with the same ones."""
        names = ("steps", "sampler", "spacing", "guidance", "distilled_guidance", "height", "width")
        times = list(self.timesteps) if self.spacing in ("given", "tuned") else None
        return replace(
            self.request, timesteps=times, **{name: getattr(self, name) for name in names}
        )

    def edit(self, timesteps: Sequence[float] | None = None, **values: Any) -> Self:
        """Change the run without resolving the request again: what tasks do.

        Args:
            timesteps: other times to visit
            values: fields of the request that hold a latent, a map or a region, or `noise_offset`

        Raises:
            UserError: a latent or map of another shape than the run's, or that is not finite
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
        UserError: impossible ones
    """
    defaults, n = model.defaults, request.count
    if request.decoding not in DECODINGS:
        raise unknown("way to decode", request.decoding, DECODINGS)
    if not isinstance(n, int) or n < 1:
        raise UserError(f"n={n!r}: expected a whole number of at least 1 image")
    steps = defaults.steps if request.steps is None else request.steps
    if request.timesteps is not None:
        steps = len(check_times(request.timesteps)) - 1
    guidance, distilled = _guidance(model, request)
    sampler = defaults.sampler if request.sampler is None else request.sampler
    check_steps(steps)
    _check_sampler(sampler, guidance)
    height, width = (
        model.sample_size if side is None else side for side in (request.height, request.width)
    )
    spacing = _spacing(model, request, sampler, steps)
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise UserError(
            f"height={height!r}, width={width!r}: expected whole numbers of pixels, at least 1"
        )
    return Settings(
        n=n,
        steps=steps,
        sampler=sampler,
        spacing=spacing,
        guidance=guidance,
        distilled_guidance=distilled,
        height=height,
        width=width,
    )


def resolve(model: Model, request: Request) -> Plan:
    """Resolve a request against a model: defaults filled in, all checks made.

    No weight is read: the model's networks may lie on the meta device.

    Args:
        model: a `LatentDiffusion`
        request: what is asked for

    Returns:
        the plan that `LatentDiffusion.sample` and `finish` carry out

    Raises:
        UserError: for whatever in the request cannot be carried out
    """
    settings = resolve_settings(model, request)
    n, shape = settings.n, latent_shape(model.autoencoder.space, settings.height, settings.width)
    times = times_of(model, request, settings)
    sampler, options = sampler_of(settings.sampler)
    seeds = seeds_of(request.seed, n)
    spec = request.image_spec or ImageSpec(settings.height, settings.width)
    if not isinstance(spec, ImageSpec):
        raise UserError(f"image_spec={spec!r}: expected an ImageSpec(height, width, ...)")
    check_run(
        sampler,
        times,
        model.denoiser.process.schedule,
        options,
        getattr(model.denoiser.network, "learned_variance", True),
    )
    _check_noise(request, n)
    _check_latents(request, n, shape)
    _check_negative_prompt(request, settings)
    prompts, prompts_2, negative, negative_2 = _read_prompts(model, request, settings, spec)
    _check_maps(request, n, shape)
    _check_network(model, request, settings, shape)
    _check_guidance(model, request, settings.guidance)
    _check_output(model, request, settings)
    return Plan(
        **{f.name: getattr(settings, f.name) for f in fields(Settings)},
        request=request,
        latent_shape=shape,
        timesteps=tuple(times),
        sampler_function=sampler,
        options=options,
        seeds=tuple(seeds),
        image_spec=spec,
        prompts=prompts,
        prompts_2=prompts_2,
        negative_prompts=negative,
        negative_prompts_2=negative_2,
    )


# ---- settings ------------------------------------------------------------------------------------


def _guidance(model: Model, request: Request) -> tuple[Guidance, float | None]:
    """Guidance by two passes, and the scale of distilled guidance (None: there is none)."""
    defaults, distilled = model.defaults, request.distilled_guidance
    guidance = (
        defaults.guidance_settings if request.guidance is None else Guidance.parse(request.guidance)
    )
    if not getattr(model.denoiser.network, "guidance_embeds", False):
        if distilled is not None:
            raise UserError(
                f"distilled_guidance={distilled}: this model is not guidance-distilled; expected guidance={distilled}"
            )
        return guidance, None
    if (
        distilled is None
        and request.guidance is not None
        and isinstance(guidance.to_json(), int | float)
    ):
        return Guidance(), guidance.scale
    distilled = defaults.distilled_guidance if distilled is None else distilled
    check_distilled(distilled)
    return guidance, float(distilled)


def _check_sampler(sampler: str, guidance: Guidance) -> None:
    """Raise `UserError` for a sampler that does not draw, or cannot use the guidance."""
    promised = traits_of(sampler_of(sampler)[0])
    if not (guidance.consistent or promised.uses_x0_and_eps):
        able = ", ".join(
            name
            for name in names("diffuse.samplers")
            if traits_of(find("diffuse.samplers", name)).uses_x0_and_eps
        )
        raise UserError(
            f"guidance {guidance} with sampler {sampler!r}: its x0 and eps do not add up to x; expected one of {able}"
        )
    if promised.inverts:
        raise UserError(
            f"sampler {sampler!r} goes from an image to noise: expected one that draws; `invert` is what it is for"
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
        listed = (
            ", ".join(
                f"{name} in {len(times) - 1} steps" for name, table in tables for times in table
            )
            or "none"
        )
        raise UserError(
            f"spacing 'tuned' for {sampler} in {steps} steps: this model has tuned times for {listed}; `sfumato tune-timesteps` finds more"
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
    patch = getattr(model.denoiser.network, "patch", 1)
    return math.prod(
        -(-cells // patch) for cells in latent_shape(model.autoencoder.space, height, width)[1:]
    )


def latent_shape(space: LatentSpace, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of an image's latent: the cells that cover it."""
    return space.channels, -(-height // space.factor), -(-width // space.factor)


def seeds_of(seed: int, n: int) -> list[int]:
    """Image k's seed, seed + k, in the range of torch's generators.

    Raises:
        UserError: a seed that is none
    """
    if not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - n:
        raise UserError(
            f"seed={seed!r}: expected a whole number from -2^63 to 2^63 - {n}, for {n} image{'s' if n > 1 else ''}"
        )
    return [seed + k for k in range(n)]


def without_guidance(model: Model, request: Request) -> Request:
    """The request with guidance by two passes off, where it leaves the guidance open."""
    if request.guidance is not None:
        return request
    distilled = request.distilled_guidance
    if distilled is None and getattr(model.denoiser.network, "guidance_embeds", False):
        distilled = model.defaults.distilled_guidance
    return replace(request, guidance=1.0, distilled_guidance=distilled)


# ---- prompts -------------------------------------------------------------------------------------


def prompt_list(prompt: Prompt, n: int) -> list[str | None]:
    """One prompt an image.

    Raises:
        UserError: something else than text, or another number of prompts
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
) -> tuple[Prompts, Prompts | None, Prompts, Prompts | None]:
    """Prompts and negative prompts of each image, for both text encoders."""
    n = settings.n

    def pair(
        name: str, prompt: Prompt, second: Prompt, image_spec: ImageSpec
    ) -> tuple[Prompts, Prompts | None]:
        if second is not None:
            if len(model.conditioner.encoders) < 2:
                raise UserError(
                    f"{name}_2 {second!r}: this model has no second text encoder to read it, put everything into {name}"
                )
            if prompt is None:
                raise UserError(
                    f"{name}_2 {second!r} without {name}: say what the first text encoder reads too; '' is no words"
                )
        first, other = prompt_list(prompt, n), None if second is None else prompt_list(second, n)
        model.conditioner.check(first, image_spec, other)
        return tuple(first), None if other is None else tuple(other)

    prompts, prompts_2 = pair("prompt", request.prompt, request.prompt_2, spec)
    if request.prompt_mix is not None:
        prompt, shares = _mix("prompt_mix", "prompt", request.prompt_mix)
        check_shares("prompt_mix", shares, n)
        if not all(
            text is None or isinstance(text, str)
            for text in (request.prompt, request.prompt_2, prompt)
        ):
            raise UserError(
                f"prompt_mix with a list of prompts ({request.prompt!r}): expected one text for all images at each end"
            )
        if model.conditioner.masks_padding:
            raise UserError(
                "conditions with masks (of padded words, as PixArt's) or pictures have nothing between them: expected one prompt for all images; "
                "between two seeds or pictures there is a way"
            )
        pair("prompt", prompt, request.prompt_2, spec)
    if settings.guidance.off:
        return prompts, prompts_2, (None,) * n, None
    return (
        prompts,
        prompts_2,
        *pair("negative_prompt", request.negative_prompt, request.negative_prompt_2, spec.negative),
    )


def _check_negative_prompt(request: Request, settings: Settings) -> None:
    """Raise `UserError` for a negative prompt that no guidance would obey."""
    negative = (
        request.negative_prompt
        if request.negative_prompt is not None
        else request.negative_prompt_2
    )
    if negative is None or not settings.guidance.off:
        return
    distilled = settings.distilled_guidance
    if distilled is not None:
        raise UserError(
            f"negative prompt {negative!r} with distilled guidance {distilled:g} alone, in which nothing is moved away from it: give guidance "
            f"above 1 for a second pass, and distilled_guidance={distilled:g} beside it"
        )
    raise UserError(
        f"negative prompt {negative!r} with guidance {settings.guidance}: nothing is moved away from it; raise the guidance"
    )


def _mix(name: str, end: str, value: Any) -> tuple[Any, Any]:
    """The pair of a mix: its other end, and the shares."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[1], Sequence):
        raise UserError(
            f"{name}={value!r}: expected ({end}, shares), with a share from 0 to 1 for each image"
        )
    return value[0], value[1]


def check_shares(name: str, shares: Sequence[float], n: int) -> None:
    """Raise `UserError` unless there is a number in [0, 1] for each image."""
    if len(shares) != n or not all(
        isinstance(share, int | float) and 0 <= share <= 1 for share in shares
    ):
        raise UserError(
            f"{name} with shares {list(shares)}: expected a number from 0 to 1 for each of {n} images"
        )


# ---- noise, latents, maps ------------------------------------------------------------------------


def _check_noise(request: Request, n: int) -> None:
    if not isinstance(request.noise_offset, int) or request.noise_offset < 0:
        raise UserError(
            f"noise_offset={request.noise_offset!r}: expected a whole number of draws, at least 0"
        )
    if request.noise_mix is None:
        return
    seeds, shares = _mix("noise_mix", "seeds", request.noise_mix)
    if not isinstance(seeds, Sequence) or len(seeds) != n:
        count = len(seeds) if isinstance(seeds, Sequence) else repr(seeds)
        raise UserError(f"noise_mix with {count} seeds for {n} images: expected one an image")
    check_shares("noise_mix", shares, n)
    for seed in seeds:
        seeds_of(seed, 1)


def _check_latents(request: Request, n: int, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` for latents of other shapes, not finite, or excluding each other."""
    noise, expected = request.noise, (n, *shape)
    if noise is not None and (
        not isinstance(noise, Tensor) or noise.shape != expected or not all_finite(noise)
    ):
        raise UserError(
            f"noise of shape {tuple(getattr(noise, 'shape', ()))}: expected finite numbers of shape {expected}"
        )
    if request.noisy_latent is not None and (request.init_latent is not None or noise is not None):
        raise UserError(
            "noisy_latent with init_latent or noise: expected one of them, noisy_latent is all that a run begins with"
        )
    for name in ("noisy_latent", "init_latent"):
        z = getattr(request, name)
        if z is None:
            continue
        if (
            not isinstance(z, Tensor)
            or z.ndim != 4
            or z.shape[1:] != shape
            or len(z) not in (1, n)
            or not all_finite(z)
        ):
            raise UserError(
                f"{name} of shape {tuple(getattr(z, 'shape', ()))}: expected finite numbers of shape {expected}, or one latent for all images"
            )
    region = request.known_region
    if region is not None:
        pair = isinstance(region, tuple | list) and len(region) == 2
        if not pair or not all(isinstance(part, Tensor) and part.ndim == 4 for part in region):
            raise UserError(
                "known_region: expected (z, mask), a latent (n, c, h, w) to keep and where to keep it (n or 1, 1 or c, h, w), 1 is known"
            )
        z, mask = (part.float() for part in region)
        check_region(z, mask)
        check_fits(expected, z, mask)


def _check_maps(request: Request, n: int, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` for maps, vectors and reference images of other shapes than the run's."""
    cells = shape[1:]
    parts = concat_parts(request)
    if any(
        not isinstance(part, Tensor)
        or part.ndim != 4
        or part.shape[2:] != cells
        or len(part) not in (1, n)
        for part in parts
    ):
        shapes = list(dict.fromkeys(tuple(getattr(part, "shape", ())) for part in parts))
        raise UserError(
            f"concat of shapes {shapes}: expected maps of {cells[0]} x {cells[1]} latent cells, one or {n} of them"
        )
    vector = request.vector
    if vector is not None and (
        not isinstance(vector, Tensor) or vector.ndim != 2 or len(vector) not in (1, n)
    ):
        raise UserError(
            f"vector of shape {tuple(getattr(vector, 'shape', ()))}: expected (1 or {n}, V) numbers"
        )
    for z in request.reference_images or ():
        if not isinstance(z, Tensor) or z.ndim != 4 or len(z) not in (1, n):
            raise UserError(
                f"reference_images of shape {tuple(getattr(z, 'shape', ()))}: expected latents (1 or {n}, C, h, w)"
            )


def concat_parts(request: Request) -> tuple[Tensor, ...]:
    """The condition's map and those of guidance's references; none, or at least two."""
    if request.concat is None:
        return ()
    return request.concat if isinstance(request.concat, tuple) else (request.concat, request.concat)


# ---- network, guidance, output -------------------------------------------------------------------


def _check_network(
    model: Model, request: Request, settings: Settings, shape: tuple[int, int, int]
) -> None:
    """Raise `UserError` for inputs that the network lacks or ignores, and for sizes."""
    network, parts, vector = model.denoiser.network, concat_parts(request), request.vector
    fills = model.conditioner.vector_width is not None
    if vector is not None and fills:
        raise UserError("this model's conditioner fills the vector itself: expected vector=None")
    if not isinstance(network, Network):  # another's: it checks its inputs itself
        return
    kind = type(network).__name__
    network.check_size(*shape[1:])
    for joined in [part.shape[1] for part in parts] or [0]:
        if shape[0] + joined != network.in_channels:
            raise UserError(
                f"{kind} takes {network.in_channels} channels and was given {shape[0] + joined}, {joined} of them by concat: models that also "
                "take a mask, a picture or a depth map need the task that gives it"
            )
    width = network.vector_width or network.classes
    if vector is None and width and not fills:
        raise UserError(
            f"{kind} needs a vector of {width} numbers, which this model's conditioner does not give: use the task that gives it"
        )
    if vector is not None and width and vector.shape[1] != width:
        raise UserError(f"a vector of {vector.shape[1]} numbers: {kind} expects {width}")
    images = request.reference_images or ()
    if len(images) > network.max_reference_images:
        raise UserError(
            f"{len(images)} reference_images: {kind} reads at most {network.max_reference_images}"
        )
    if any(z.shape[1] != network.in_channels for z in images):
        raise UserError(
            f"reference_images of {sorted({z.shape[1] for z in images})} channels: {kind} expects {network.in_channels}, latents of its autoencoder"
        )


def _check_guidance(model: Model, request: Request, guidance: Guidance) -> None:
    """Raise `UserError` for guidance, tiles and caches that this model's networks cannot run."""
    if request.guide_model is not None and "model" not in guidance.baseline:
        raise UserError(
            f"a weaker model with guidance {guidance}: expected the baseline model, as in '2 model:path=NAME'"
        )
    if request.tiles is not None:
        _check_tiles(request.tiles, guidance)
    denoisers: list[Any] = [model.denoiser]
    baselines = [] if guidance.off else guidance.parts()[2]
    conditions, parts = sum(b.takes_negative for b in baselines), concat_parts(request)
    supplied = len(parts) - 1 if parts else 1
    if conditions and supplied not in (1, conditions):
        raise UserError(
            f"{supplied} conditionings to move away from, for guidance {guidance}: expected {conditions}"
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


def guide_denoiser(request: Request) -> Any:
    """The denoiser of `guide_model`, which may be a model or a denoiser."""
    return getattr(request.guide_model, "denoiser", request.guide_model)


def _check_same_latents(denoiser: Denoiser, other: Any) -> None:
    """Raise `UserError` for a denoiser of other latents, or whose changed network cannot run."""
    network: nn.Module | None = getattr(other, "network", None)
    if (
        other is denoiser
        or not isinstance(network, Network)
        or not isinstance(denoiser.network, Network)
    ):
        return
    network.check_blocks()
    own, channels = ((n.channels, n.in_channels) for n in (denoiser.network, network))
    if own != channels:
        raise UserError(
            f"the weaker model predicts latents of {channels[0]} channels from {channels[1]}, the model of {own[0]} from {own[1]}: expected the same"
        )


def _check_tiles(tiles: Any, guidance: Guidance) -> None:
    if not (
        isinstance(tiles, tuple | list)
        and len(tiles) == 2
        and all(isinstance(n, int) and n > 0 for n in tiles)
    ):
        raise UserError(
            f"tiles={tiles!r}: expected (size, stride) of the windows in latent cells, as (32, 16)"
        )
    if getattr(guidance.parts()[1], "momentum", 0):
        raise UserError(
            f"guidance {guidance} on tiles: its momentum would pass from window to window; expected momentum=0"
        )
    check_windows(*tiles)


def _check_output(model: Model, request: Request, settings: Settings) -> None:
    """Raise `UserError` for a decoding or a composite that does not fit the images."""
    if request.decoding == "exact" and not isinstance(model.autoencoder, SequentialAutoencoder):
        raise UserError(
            f"decoding='exact': {type(model.autoencoder).__name__} does not say what its parts are, and cannot be run in strips: use whole or tiled"
        )
    if request.composite is None:
        return
    size = (settings.height, settings.width)
    pair = isinstance(request.composite, tuple | list) and len(request.composite) == 2
    if not pair or not all(
        isinstance(part, Tensor) and part.ndim == 4 for part in request.composite
    ):
        raise UserError(
            "composite: expected (image, mask), pixels (n or 1, c, H, W) in [-1, 1] and a mask (n or 1, 1, H, W)"
        )
    image, mask = request.composite
    batches = {len(image), len(mask)} - {1, settings.n}
    if (
        image.shape[1:] != (model.autoencoder.channels, *size)
        or mask.shape[1:] != (1, *size)
        or batches
    ):
        expected = (settings.n, model.autoencoder.channels, *size)
        raise UserError(
            f"composite of an image of shape {tuple(image.shape)} and a mask of shape {tuple(mask.shape)} for images of shape {expected}: "
            "expected as many, or one, of the same size"
        )
