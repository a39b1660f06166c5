"""From a request to a run: defaults filled in, wrong settings refused, and the run as a string of
questions to the denoiser.

`model` in this file is a `LatentDiffusion`, or anything with its autoencoder, denoiser,
conditioner, defaults, sample_size and device.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from sfumato.diffuse.samplers import traits_of
from sfumato.diffuse.timesteps import SPACINGS, check_times, timesteps
from sfumato.errors import UserError, unknown
from sfumato.predict.guidance.settings import Guidance
from sfumato.registry import choice, find, names
from sfumato.types import ImageSpec

Prompt = str | None | Sequence[str | None]
DECODINGS = ("whole", "exact", "tiled")


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where the caller says nothing. They travel with the model.

    guidance: a number, or what else `Guidance.parse` reads; kept as a number or a JSON object.
    learned_guidance: how strongly to follow the prompt, told to networks that learned guidance from
    a teacher (FLUX.1 dev; Meng et al. 2023, arXiv:2210.03142); others have no use for it.
    references: how many pictures the model was trained to read beside x (FLUX.1 Kontext: 1);
    `tasks/edit.py` asks. size: height and width in pixels; None: what the network's config says.
    For networks whose config says none (FLUX). tuned: times found for this model by `sfumato
    tune-timesteps`, as {sampler: [times, ...]}; used where sampler and steps agree.
    """

    steps: int = 20
    sampler: str = "ddim"
    guidance: Any = 1.0
    spacing: str = "trailing"
    learned_guidance: float = 3.5
    references: int = 0
    size: int | None = None
    tuned: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sampler_of(self.sampler)
        spacing_of(self.spacing)
        _check_steps(self.steps)
        _check_learned(self.learned_guidance)
        if not isinstance(self.references, int) or self.references < 0:
            raise UserError(
                f"references={self.references!r}: expected how many pictures the model reads, 0 or more"
            )
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise UserError(f"size={self.size!r}: expected a whole number of pixels, at least 1")
        # one form, which JSON can hold
        object.__setattr__(self, "guidance", Guidance.parse(self.guidance).to_json())
        for sampler, tables in self.tuned.items():
            sampler_of(sampler)
            for times in tables:
                check_times(times)

    @cached_property
    def guided(self) -> Guidance:
        """The guidance as an object."""
        return Guidance.parse(self.guidance)

    def tuned_for(self, sampler: str, steps: int) -> list[float] | None:
        """The tuned times of a sampler, however it is spelled, for so many steps, if there are
        any.
        """
        asked = _canonical(sampler)
        tables = (tables for name, tables in self.tuned.items() if _canonical(name) == asked)
        return next(
            (list(times) for known in tables for times in known if len(times) == steps + 1), None
        )


@dataclass(frozen=True)
class Request:
    """What is asked for. None: the model decides. `LatentDiffusion.generate` says what most fields
    mean; these are for tasks:

    begin   a latent (n or 1, c, h, w) that the run begins with, made as noisy as its first time
            says (image-to-image)
    resume  a noisy latent (n or 1, c, h, w) as it is at the first time: the run goes on with it,
            whoever made it
    concat  joins x along channels (n or 1, k, h, w): masks and pictures, for networks that take
            them; a tuple where the condition and each of its references have their own
    references  latents of other pictures (n or 1, c, k, l) that the network reads beside x, for
                networks that were trained so
    vector  joins the time embedding (n or 1, V), for networks that are told a number, such as how
            much noise a small picture has
    paste   (image, mask): pixels (n or 1, c, H, W) in [-1, 1] to be put back where the mask (n or
            1, 1, H, W) is below 1, by what is missing to 1
    blind_start   the first look of the network is at noise alone, where `known` is known too, as in
                  diffusers' inpainting
    prompt_2, negative_prompt_2   what SDXL's second text encoder reads instead; None: the same as
                                  the first
    other_prompt  (prompt, shares): image k is told what lies between the request's prompt (share 0)
                  and this one (1), at shares[k]
    other_noise   (seeds, shares): all that image k draws lies on the arc from `seed`'s noise (share
                  0) to that of seeds[k] (1), at shares[k]; image k's own seed is then `seed` too,
                  not seed + k
    drawn   how many draws of each image's noise were used before the run: it goes on with the next
    learned_guidance  what networks with learned guidance are told. Where only `guidance` is given,
                      and as a number, it is that which they are told, and guidance by two passes is
                      off: a network that learned it needs no second pass
    decoding  "whole" (all at once), "exact" (the same in strips: about an eighth of the memory,
              more time), "tiled" (approximate)
    """

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
    picture: ImageSpec | None = None
    begin: Tensor | None = None
    resume: Tensor | None = None
    concat: Tensor | tuple[Tensor, ...] | None = None
    vector: Tensor | None = None
    paste: tuple[Tensor, Tensor] | None = None
    blind_start: bool = False
    prompt_2: Prompt = None
    negative_prompt_2: Prompt = None
    other_prompt: tuple[str | None, Sequence[float]] | None = None
    other_noise: tuple[Sequence[int], Sequence[float]] | None = None
    drawn: int = 0
    decoding: str = "whole"
    learned_guidance: float | None = None
    references: tuple[Tensor, ...] | None = None

    @property
    def count(self) -> int:
        """How many images: n, or as many as there are prompts."""
        if (
            self.prompt is None
            or isinstance(self.prompt, str)
            or not isinstance(self.prompt, Sequence)
        ):
            return self.n
        if self.n not in (1, len(self.prompt)):
            raise UserError(
                f"n={self.n} with {len(self.prompt)} prompts: expected one image a prompt"
            )
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
    """The sampler that "name" or "name:option=value,..." means, and its options; `UserError` for
    one that there is not.
    """
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
    return choice(spec)[0], tuple(
        sorted((key, value) for key, value in options.items() if value != defaults[key])
    )


def _check_learned(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"learned_guidance={value!r}: expected a number of at least 0")


def _guided(model: Any, request: Request) -> tuple[Guidance, float | None]:
    """Guidance by two passes, and what the network is told of it: None for those that learned
    none.
    """
    defaults, learned = model.defaults, request.learned_guidance
    if not getattr(model.denoiser.network, "learned_guidance", False):
        if learned is not None:
            raise UserError(
                f"learned_guidance={learned}: this model has not learned guidance; expected guidance={learned}"
            )
        return defaults.guided if request.guidance is None else Guidance.parse(
            request.guidance
        ), None
    guidance = defaults.guided if request.guidance is None else Guidance.parse(request.guidance)
    if (
        learned is None
        and request.guidance is not None
        and isinstance(guidance.to_json(), int | float)
    ):
        return Guidance(), guidance.scale
    _check_learned(defaults.learned_guidance if learned is None else learned)
    return guidance, float(defaults.learned_guidance if learned is None else learned)


def _check_steps(steps: Any) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r}: expected a whole number of at least 1")


def _check_options(
    what: str, function: Callable[..., Any], skip: int, options: Mapping[str, Any]
) -> None:
    """`UserError` for an option that a sampler or spacing does not have (after its first `skip`
    parameters), or words for a number.
    """
    allowed = list(inspect.signature(function).parameters.values())[skip:]
    for option, value in options.items():
        found = next((p for p in allowed if p.name == option), None)
        if found is None:
            raise unknown(f"option of {what}", option, [p.name for p in allowed])
        wanted = type(found.default) if found.default is not None else float
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if (
            not fits
            or (isinstance(value, bool) and wanted is not bool)
            or (isinstance(value, float) and math.isnan(value))
        ):
            kinds = {str: "a word", int: "a whole number", float: "a number", bool: "true or false"}
            raise UserError(f"{what}: {option}={value!r}: expected {kinds[wanted]}")


def settings(model: Any, request: Request) -> dict[str, Any]:
    """n, steps, sampler, spacing ("given" where its times are), guidance, height and width of a
    request's run, and learned_guidance where that is.

    `UserError` for impossible ones.
    """
    chosen = chosen_settings(model, request)
    return {**chosen, "guidance": chosen["guidance"].to_json()}


def chosen_settings(model: Any, request: Request) -> dict[str, Any]:
    """The same with the guidance as an object."""
    defaults, n = model.defaults, request.count
    if request.decoding not in DECODINGS:
        raise unknown("way to decode", request.decoding, DECODINGS)
    if not isinstance(n, int) or n < 1:
        raise UserError(f"n={n!r}: expected a whole number of at least 1 image")
    steps = defaults.steps if request.steps is None else request.steps
    if request.timesteps is not None:
        steps = len(check_times(request.timesteps)) - 1
    guidance, learned = _guided(model, request)
    sampler = defaults.sampler if request.sampler is None else request.sampler
    _check_steps(steps)
    promised = traits_of(sampler_of(sampler)[0])
    if not (guidance.consistent or promised.both):
        able = ", ".join(
            name
            for name in names("diffuse.samplers")
            if traits_of(find("diffuse.samplers", name)).both
        )
        raise UserError(
            f"guidance {guidance} with sampler {sampler!r}: its x0 and eps do not add up to x; expected one of {able}"
        )
    if promised.upward:
        raise UserError(
            f"sampler {sampler!r} goes from an image to noise: expected one that draws; `invert` is what it is for"
        )
    spacing = request.spacing
    if request.timesteps is not None:
        spacing = "given"
    elif spacing is None:
        spacing = defaults.spacing if defaults.tuned_for(sampler, steps) is None else "tuned"
    elif spacing == "tuned" and defaults.tuned_for(sampler, steps) is None:
        there = (
            ", ".join(
                f"{name} in {len(times) - 1} steps"
                for name, tables in defaults.tuned.items()
                for times in tables
            )
            or "none"
        )
        raise UserError(
            f"spacing 'tuned' for {sampler} in {steps} steps: this model has tuned times for {there}; `sfumato tune-timesteps` finds more"
        )
    elif spacing != "tuned":
        spacing_of(spacing)
    height, width = (
        model.sample_size if side is None else side for side in (request.height, request.width)
    )
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise UserError(
            f"height={height!r}, width={width!r}: expected whole numbers of pixels, at least 1"
        )
    return {
        "n": n,
        "steps": steps,
        "sampler": sampler,
        "spacing": spacing,
        "guidance": guidance,
        "height": height,
        "width": width,
        **({} if learned is None else {"learned_guidance": learned}),
    }


def times_of(model: Any, request: Request, chosen: Mapping[str, Any] | None = None) -> list[float]:
    """The times that a request's run visits; `chosen` are its settings, if they are at hand."""
    if request.timesteps is not None:
        return check_times(request.timesteps)
    chosen = chosen_settings(model, request) if chosen is None else chosen
    if chosen["spacing"] == "tuned":
        tuned = model.defaults.tuned_for(chosen["sampler"], chosen["steps"])
        assert tuned is not None
        return tuned
    name, options = spacing_of(chosen["spacing"])
    if name == "dynamic" and "tokens" not in options:
        options = {**options, "tokens": tokens_of(model, chosen["height"], chosen["width"])}
    return timesteps(name, chosen["steps"], model.denoiser.process.schedule, **options)


def tokens_of(model: Any, height: int, width: int) -> int:
    """How many tokens the network makes of an image."""
    patch = getattr(model.denoiser.network, "patch", 1)
    return math.prod(-(-cells // patch) for cells in latent_shape(model, height, width)[1:])


def latent_shape(model: Any, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of an image's latent: as many cells as cover it, of which what is too much is cut
    off again after decoding.
    """
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
        raise UserError(
            f"seed={seed!r}: expected a whole number from -2^63 to 2^63 - {n}, for {n} image{'s' if n > 1 else ''}"
        )
    return [seed + k for k in range(n)]
