"""From a request to a run: defaults filled in, wrong settings refused, and the run as a string of questions to the denoiser.

`model` in this file is a `LatentDiffusion`, or anything with its autoencoder, denoiser, conditioner, defaults, sample_size and device.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.diffuse.sample import SeededNoise, Step, all_finite, conduct
from sfumato.diffuse.samplers import calls, traits_of
from sfumato.diffuse.timesteps import SPACINGS, check_times, timesteps
from sfumato.errors import UserError, unknown
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.wrappers.feature_cache import feature_cache
from sfumato.predict.wrappers.known_region import finish as finish_known
from sfumato.predict.wrappers.known_region import known_region
from sfumato.predict.wrappers.known_region import start as begin_known
from sfumato.predict.wrappers.large_canvas import large_canvas
from sfumato.registry import choice, find, names
from sfumato.types import Asking, Picture

Prompt = str | None | Sequence[str | None]


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where the caller says nothing. They travel with the model.

    guidance: a number, or what else `Guidance.parse` reads; kept as a number or a JSON object.
    tuned: times found for this model by `sfumato tune-timesteps`, as {sampler: [times, ...]}; used where sampler and steps agree.
    """

    steps: int = 20
    sampler: str = "ddim"
    guidance: Any = 1.0
    spacing: str = "trailing"
    tuned: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sampler_of(self.sampler)
        spacing_of(self.spacing)
        _check_steps(self.steps)
        object.__setattr__(self, "guidance", Guidance.parse(self.guidance).to_json())  # one form, which JSON can hold
        for sampler, tables in self.tuned.items():
            sampler_of(sampler)
            for times in tables:
                check_times(times)

    @cached_property
    def guided(self) -> Guidance:
        """The guidance as an object."""
        return Guidance.parse(self.guidance)

    def tuned_for(self, sampler: str, steps: int) -> list[float] | None:
        """The tuned times of a sampler, however it is spelled, for so many steps, if there are any."""
        asked = _canonical(sampler)
        tables = (tables for name, tables in self.tuned.items() if _canonical(name) == asked)
        return next((list(times) for known in tables for times in known if len(times) == steps + 1), None)


@dataclass(frozen=True)
class Request:
    """What is asked for. None: the model decides. `LatentDiffusion.generate` says what each field means."""

    prompt: Prompt = None
    n: int = 1
    steps: int | None = None
    sampler: str | None = None
    spacing: str | None = None
    guidance: Any = None
    seed: int = 0
    negative_prompt: Prompt = None
    height: int | None = None
    width: int | None = None
    timesteps: Sequence[float] | None = None
    noise: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None
    canvas: tuple[int, int] | None = None
    cache: int | Sequence[int] | None = None
    weaker: Any = None
    picture: Picture | None = None

    @property
    def count(self) -> int:
        """How many images: n, or as many as there are prompts."""
        if self.prompt is None or isinstance(self.prompt, str) or not isinstance(self.prompt, Sequence):
            return self.n
        if self.n not in (1, len(self.prompt)):
            raise UserError(f"n={self.n} with {len(self.prompt)} prompts: expected one image a prompt")
        return len(self.prompt)


def request_from(values: Mapping[str, Any]) -> Request:
    """A request from its fields; `UserError` for a field that there is not."""
    known = [f.name for f in fields(Request)]
    for name in values:
        if name not in known:
            raise unknown("field of a request", name, known)
    return Request(**values)


@lru_cache(maxsize=256)
def sampler_of(spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The sampler that "name" or "name:option=value,..." means, and its options; `UserError` for one that there is not."""
    name, options = choice(spec)
    sampler = find("diffuse.samplers", name)
    _check_options(f"sampler {name}", sampler, 4, options)
    return sampler, options


@lru_cache(maxsize=256)
def spacing_of(spec: str) -> tuple[str, dict[str, Any]]:
    """The spacing that "name" or "name:option=value,..." means, and its options."""
    name, options = choice(spec)
    if name not in SPACINGS:
        raise unknown("timestep spacing", name, [*SPACINGS, "tuned"])
    _check_options(f"spacing {name}", SPACINGS[name], 3, options)
    return name, options


@lru_cache(maxsize=256)
def _canonical(spec: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A sampler's name and those of its options that are not the defaults."""
    sampler, options = sampler_of(spec)
    defaults = {name: p.default for name, p in inspect.signature(sampler).parameters.items()}
    return choice(spec)[0], tuple(sorted((key, value) for key, value in options.items() if value != defaults[key]))


def _check_steps(steps: Any) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r}: expected a whole number of at least 1")


def _check_options(what: str, function: Callable[..., Any], skip: int, options: Mapping[str, Any]) -> None:
    """`UserError` for an option that a sampler or spacing does not have (after its first `skip` parameters), or words for a number."""
    allowed = list(inspect.signature(function).parameters.values())[skip:]
    for option, value in options.items():
        found = next((p for p in allowed if p.name == option), None)
        if found is None:
            raise unknown(f"option of {what}", option, [p.name for p in allowed])
        wanted = type(found.default) if found.default is not None else float
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool) or (isinstance(value, float) and math.isnan(value)):
            kinds = {str: "a word", int: "a whole number", float: "a number", bool: "true or false"}
            raise UserError(f"{what}: {option}={value!r}: expected {kinds[wanted]}")


def settings(model: Any, request: Request) -> dict[str, Any]:
    """n, steps, sampler, spacing ("given" where its times are), guidance, height and width of a request's run.

    `UserError` for impossible ones.
    """
    chosen = _chosen(model, request)
    return {**chosen, "guidance": chosen["guidance"].to_json()}


def _chosen(model: Any, request: Request) -> dict[str, Any]:
    """The same with the guidance as an object."""
    defaults, n = model.defaults, request.count
    if not isinstance(n, int) or n < 1:
        raise UserError(f"n={n!r}: expected a whole number of at least 1 image")
    steps = defaults.steps if request.steps is None else request.steps
    if request.timesteps is not None:
        steps = len(check_times(request.timesteps)) - 1
    guidance = defaults.guided if request.guidance is None else Guidance.parse(request.guidance)
    sampler = defaults.sampler if request.sampler is None else request.sampler
    _check_steps(steps)
    promised = traits_of(sampler_of(sampler)[0])
    if not (guidance.consistent or promised.both):
        able = ", ".join(name for name in names("diffuse.samplers") if traits_of(find("diffuse.samplers", name)).both)
        raise UserError(f"guidance {guidance} with sampler {sampler!r}: its x0 and eps do not add up to x; expected one of {able}")
    if promised.upward:
        raise UserError(f"sampler {sampler!r} goes from an image to noise: expected one that draws; `invert` is what it is for")
    spacing = request.spacing
    if request.timesteps is not None:
        spacing = "given"
    elif spacing is None:
        spacing = defaults.spacing if defaults.tuned_for(sampler, steps) is None else "tuned"
    elif spacing == "tuned" and defaults.tuned_for(sampler, steps) is None:
        there = ", ".join(f"{name} in {len(times) - 1} steps" for name, tables in defaults.tuned.items() for times in tables) or "none"
        raise UserError(
            f"spacing 'tuned' for {sampler} in {steps} steps: this model has tuned times for {there}; `sfumato tune-timesteps` finds more"
        )
    elif spacing != "tuned":
        spacing_of(spacing)
    height, width = (model.sample_size if side is None else side for side in (request.height, request.width))
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise UserError(f"height={height!r}, width={width!r}: expected whole numbers of pixels, at least 1")
    return {
        "n": n,
        "steps": steps,
        "sampler": sampler,
        "spacing": spacing,
        "guidance": guidance,
        "height": height,
        "width": width,
    }


def times_of(model: Any, request: Request, chosen: Mapping[str, Any] | None = None) -> list[float]:
    """The times that a request's run visits; `chosen` are its settings, if they are at hand."""
    if request.timesteps is not None:
        return check_times(request.timesteps)
    chosen = _chosen(model, request) if chosen is None else chosen
    if chosen["spacing"] == "tuned":
        tuned = model.defaults.tuned_for(chosen["sampler"], chosen["steps"])
        assert tuned is not None
        return tuned
    name, options = spacing_of(chosen["spacing"])
    return timesteps(name, chosen["steps"], model.denoiser.process.schedule, **options)


def questions(model: Any, request: Request, on_step: Callable[[Step], bool | None] | None = None) -> Asking[Tensor | None]:
    """A request's run: a string of questions that ends with the latents (None: cancelled). What is wrong shows at the first question."""
    chosen = _chosen(model, request)
    times = times_of(model, request, chosen)
    n, guidance, schedule = chosen["n"], chosen["guidance"], model.denoiser.process.schedule
    draw = SeededNoise(latent_shape(model, chosen["height"], chosen["width"]), seeds_of(request.seed, n), model.device)
    start = draw()  # drawn also where `noise` takes its place: what is drawn next is then the same
    if request.noise is not None:
        if request.noise.shape != start.shape or not all_finite(request.noise):
            raise UserError(f"noise of shape {tuple(request.noise.shape)}: expected finite numbers of shape {tuple(start.shape)}")
        start = request.noise.to(model.device, torch.float32)
    picture = request.picture or Picture(chosen["height"], chosen["width"])
    given = model.conditioner(prompts(request.prompt, n), picture).to(model.device)
    reference = model.conditioner(prompts(request.negative_prompt, n), picture.negative).to(model.device)
    weaker = getattr(request.weaker, "denoiser", request.weaker)
    if request.negative_prompt is not None and guidance.off:
        raise UserError(
            f"negative prompt {request.negative_prompt!r} with guidance {guidance}: nothing is moved away from it; raise the guidance"
        )
    if weaker is not None and "model" not in guidance.reference:
        raise UserError(f"a weaker model with guidance {guidance}: expected the reference model, as in '2 model:path=NAME'")
    if request.canvas is not None and not (
        isinstance(request.canvas, tuple | list) and len(request.canvas) == 2 and all(isinstance(n, int) and n > 0 for n in request.canvas)
    ):
        raise UserError(f"canvas={request.canvas!r}: expected (size, stride) of the windows in latent cells, as (32, 16)")
    if request.canvas is not None and getattr(guidance.parts()[1], "momentum", 0):
        raise UserError(f"guidance {guidance} on a canvas: its momentum would pass from window to window; expected momentum=0")
    ask = build(guidance, model.denoiser, given, reference, schedule.point, weaker)
    if request.canvas is not None:
        ask = large_canvas(ask, *request.canvas)
    if request.cache is not None:
        ask = feature_cache(ask, request.cache)
    # x_t of standardised latents has variance alpha^2 + sigma^2, at full noise and where a run begins later.
    x = math.hypot(*schedule.point(times[0])) * start
    if request.known is not None:
        pair = isinstance(request.known, tuple | list) and len(request.known) == 2
        if not pair or not all(isinstance(part, Tensor) and part.ndim == 4 for part in request.known):
            raise UserError(
                "known: expected (z, mask), a latent (n, c, h, w) to keep and where to keep it (n or 1, 1 or c, h, w), 1 is known"
            )
        z, mask = (part.to(model.device, torch.float32) for part in request.known)
        ask, x = known_region(ask, z, mask, schedule.point), begin_known(start, z, mask, schedule.point, times[0])
    sampler, options = sampler_of(chosen["sampler"])
    found = yield from conduct(sampler(x, times, schedule, draw, **options), ask, calls(sampler, times, schedule, **options), on_step)
    if found is not None and request.known is not None and times[-1] == 0:
        found = finish_known(found, z, mask)
    return found


def latent_shape(model: Any, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of an image's latent: as many cells as cover it, of which what is too much is cut off again after decoding."""
    space = model.autoencoder.space
    return space.channels, -(-height // space.factor), -(-width // space.factor)


def prompts(prompt: Prompt, n: int) -> list[str | None]:
    """One prompt an image."""
    if prompt is None or isinstance(prompt, str):
        return [prompt] * n
    if not isinstance(prompt, Sequence) or not all(p is None or isinstance(p, str) for p in prompt):
        raise UserError(f"prompt {prompt!r}: expected text, a list of texts, or None")
    if len(prompt) != n:
        raise UserError(f"{len(prompt)} prompts for {n} images: expected one, or one an image")
    return list(prompt)


def seeds_of(seed: int, n: int) -> list[int]:
    """Image k's seed is seed + k; all of them must be numbers that torch's generators take."""
    if not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - n:
        raise UserError(f"seed={seed!r}: expected a whole number from -2^63 to 2^63 - {n}, for {n} image{'s' if n > 1 else ''}")
    return [seed + k for k in range(n)]
