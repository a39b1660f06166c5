"""Settings of a run: the caller's (`Request`) and the model's own (`Defaults`).

Both check what can be checked without a model. `plan.py` checks the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Protocol, Self, TypedDict, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from sfumato.compress.base import Autoencoder
from sfumato.diffuse.process import Process
from sfumato.diffuse.samplers import Sampler, get_sampler
from sfumato.diffuse.timesteps import SPACINGS, check_times
from sfumato.errors import UserError, unknown
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance.settings import Guidance
from sfumato.spec import Spec, options_of
from sfumato.types import ImageSpec
from sfumato.validate import number_in, one_of, positive_int, whole_number

Prompt = str | None | Sequence[str | None]
DECODINGS = ("auto", "whole", "exact", "tiled")

_OLD_DEFAULTS = {
    "learned_guidance": "distilled_guidance",
    "references": "max_reference_images",
    "tuned": "tuned_timesteps",
}
"""Names that files written before the renaming have, and today's."""


@dataclass(frozen=True)
class Defaults:
    """Settings that apply where a request leaves them open. They are saved with the model.

    Attributes:
        steps: Sampling steps, at least 1.
        sampler: "name" or "name:option=value,...".
        guidance: A number, or anything that `Guidance.parse` reads; kept as a number or JSON.
        spacing: "name" or "name:option=value,...".
        distilled_guidance: Guidance scale passed to guidance-distilled networks (FLUX.1 dev; Meng
            et al. 2023, arXiv:2210.03142); other networks ignore it.
        max_reference_images: Number of reference images that the model was trained to read beside
            x (FLUX.1 Kontext: 1); read by `tasks.edit`.
        size: Height and width in pixels; None: the network config's, where it has one.
        tuned_timesteps: Times found by `sfumato tune-timesteps`, as {sampler: [times, ...]}; used
            where sampler and number of steps agree.
    """

    steps: int = 20
    sampler: str = "ddim"
    guidance: Any = 1.0
    spacing: str = "trailing"
    distilled_guidance: float = 3.5
    max_reference_images: int = 0
    size: int | None = None
    tuned_timesteps: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sampler_of(self.sampler)
        spacing_of(self.spacing)
        positive_int("steps", self.steps)
        number_in("distilled_guidance", self.distilled_guidance, 0)
        whole_number("max_reference_images", self.max_reference_images, 0)
        if self.size is not None:
            positive_int("size", self.size, unit="pixels")
        # one form, which JSON can hold
        object.__setattr__(self, "guidance", Guidance.parse(self.guidance).to_json())
        for sampler, tables in self.tuned_timesteps.items():
            sampler_of(sampler)
            for times in tables:
                check_times(times)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read defaults from a file's JSON object.

        Keys of older files are read under their new names. Unknown keys are ignored, so that a
        newer file opens.

        Raises:
            UserError: For an impossible value.
        """
        names = {f.name for f in fields(cls)}
        # a field's own name goes before its earlier one
        ordered = sorted(values.items(), key=lambda item: item[0] in names)
        renamed = {_OLD_DEFAULTS.get(key, key): value for key, value in ordered}
        return cls(**{key: value for key, value in renamed.items() if key in names})

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON object: the inverse of `from_json`."""
        return asdict(self)

    @cached_property
    def guidance_settings(self) -> Guidance:
        """`guidance` as an object."""
        return Guidance.parse(self.guidance)

    def tuned_for(self, sampler: str, steps: int) -> list[float] | None:
        """Tuned times of a sampler, however it is spelled; None: none for these steps."""
        name = _canonical(sampler)
        tables = (tables for key, tables in self.tuned_timesteps.items() if _canonical(key) == name)
        runs = (list(times) for table in tables for times in table if len(times) == steps + 1)
        return next(runs, None)


@runtime_checkable
class Model(Protocol):
    """The parts of a `LatentDiffusion` that sampling, saving and offload read."""

    @property
    def autoencoder(self) -> Autoencoder:
        """Image <-> latent."""
        ...

    @property
    def denoiser(self) -> Denoiser:
        """Network and process."""
        ...

    @property
    def conditioner(self) -> Conditioner:
        """Prompts -> `Conditioning`."""
        ...

    @property
    def defaults(self) -> Defaults:
        """Settings that apply where a request leaves them open."""
        ...

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def training_data(self) -> Mapping[str, Any]:
        """Record of the images that it was trained on."""
        ...

    @property
    def low_res(self) -> Process | None:
        """Process that noises small images, for networks that upscale them; else None."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        ...

    @property
    def sample_size(self) -> int:
        """The default height and width of images, in pixels."""
        ...


@dataclass(frozen=True)
class Request:
    """Everything that a caller may set for a run. None: the model's default.

    Shapes: n images, latents of C channels and h x w cells, pixels of c channels and H x W. A first
    axis of 1 stands for all images.

    Attributes:
        prompt: One text for all images, or one an image (n is their number then); None: no prompt.
        n: Number of images.
        steps: Sampling steps.
        sampler: "name" or "name:option=value,...", as "ddim:eta=0.5".
        spacing: "name" or "name:option=value,...", as "karras:rho=5"; "tuned" for tuned times.
        guidance: a number (0 to 1 is off), or anything that `Guidance.parse` reads, as
            "3 interval:low=0.2,high=0.8".
        seed: From 0 to 2^64 - 1; image k uses seed + k. `random_seed()` draws one.
        negative_prompt: Prompt(s) that guidance moves away from.
        height: In pixels.
        width: In pixels.
        timesteps: Times to visit, strictly falling, 1 is noise; the last is where the run ends (0:
            clean). Overrides `steps` and `spacing`.
        noise: (n, C, h, w) start noise instead of the seeds' own; noise drawn later is the seeds'.
        known_region: (z, mask): latents (n or 1, C, h, w) to keep where the mask (n or 1, 1 or C,
            h, w) is 1.
        tiles: (size, stride) in latent cells: the denoiser runs on overlapping windows, for images
            larger than the model's.
        cache: Recompute the network's deep features at every so-many-th call, or at these calls.
        guide_model: The model, or its denoiser, that guidance by "model" (autoguidance) moves from.
        image_spec: Size, crop and score for SDXL-class models; default: an uncropped image of this
            height and width.
        init_latent: (n or 1, C, h, w) clean latent that is noised to the first time and sampled
            from there (image to image).
        noisy_latent: (n or 1, C, h, w) noisy latent at the first time; the run continues from it.
        concat: (n or 1, k, h, w), concatenated to x along channels: masks, images, maps. A tuple
            holds one for the condition and one for each of guidance's references.
        vector: (n or 1, V) that joins the time embedding, for networks whose conditioner has none.
        composite: (image, mask): pixels (n or 1, c, H, W) in [-1, 1] put back where the mask
            (n or 1, 1, H, W) is 0, blended where it is between 0 and 1.
        originals: With `composite`, n or 1 PIL images whose transparency and ICC profile the PIL
            images of the result get, and whose pixels are put back as they are in the file.
        noise_only_start: The first network call gets noise alone in the known region too, as in
            diffusers' inpainting.
        prompt_2: Text for the second text encoder (SDXL, SD 3, FLUX.1); None: the prompt.
        negative_prompt_2: The same for the negative prompt.
        prompt_mix: (prompt, shares): image k's conditioning lies at shares[k] in [0, 1] between
            the request's prompt (0) and this one (1).
        noise_mix: (seeds, shares): image k's noise lies at shares[k] on the arc between the noise
            of `seed` (0) and of seeds[k] (1); image k's own seed is then `seed`, not seed + k.
        noise_offset: Number of draws of each image's noise to skip.
        decoding: "whole", "exact" (row by row: the same to rounding, about an eighth of the memory,
            slower), "tiled" (approximate), or "auto": whole, or exact where a streamed model's
            memory has no room for it.
        distilled_guidance: Guidance scale of guidance-distilled models. For them a `guidance` that
            is given alone, as a number, sets this, and there is no second pass.
        reference_images: Latents (n or 1, C, k, l) of images that the network reads beside x.
        prompt_weights: Rule by which brackets weigh words, "(word:1.3)": one of `PROMPT_WEIGHTS`,
            see `ClipTextConfig.weighting`; "none": brackets are text.
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
    known_region: tuple[Tensor, Tensor] | None = None
    tiles: tuple[int, int] | None = None
    cache: int | Sequence[int] | None = None
    guide_model: Model | Denoiser | None = None
    image_spec: ImageSpec | None = None
    init_latent: Tensor | None = None
    noisy_latent: Tensor | None = None
    concat: Tensor | tuple[Tensor, ...] | None = None
    vector: Tensor | None = None
    composite: tuple[Tensor, Tensor] | None = None
    originals: Sequence[Image.Image] | None = None
    noise_only_start: bool = False
    prompt_2: Prompt = None
    negative_prompt_2: Prompt = None
    prompt_mix: tuple[str | None, Sequence[float]] | None = None
    noise_mix: tuple[Sequence[int], Sequence[float]] | None = None
    noise_offset: int = 0
    decoding: str = "auto"
    distilled_guidance: float | None = None
    reference_images: tuple[Tensor, ...] | None = None
    prompt_weights: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a request from its fields.

        Raises:
            UserError: For a field that does not exist.
        """
        names = [f.name for f in fields(cls)]
        for name in values:
            one_of("field of a request", name, names)
        return cls(**values)

    @property
    def count(self) -> int:
        """Number of images: n, or the number of prompts."""
        if isinstance(self.prompt, str) or not isinstance(self.prompt, Sequence):
            return self.n
        if self.n not in (1, len(self.prompt)):
            raise UserError(
                f"n={self.n} with {len(self.prompt)} prompts: expected one image a prompt"
            )
        return len(self.prompt)


class RequestFields(TypedDict, total=False):
    """The fields of `Request` but the prompt, as keywords of `LatentDiffusion.generate`."""

    n: int
    steps: int | None
    sampler: str | None
    spacing: str | None
    guidance: Any
    seed: int
    negative_prompt: Prompt
    height: int | None
    width: int | None
    timesteps: Sequence[float] | None
    noise: Tensor | None
    known_region: tuple[Tensor, Tensor] | None
    tiles: tuple[int, int] | None
    cache: int | Sequence[int] | None
    guide_model: Model | Denoiser | None
    image_spec: ImageSpec | None
    init_latent: Tensor | None
    noisy_latent: Tensor | None
    concat: Tensor | tuple[Tensor, ...] | None
    vector: Tensor | None
    composite: tuple[Tensor, Tensor] | None
    originals: Sequence[Image.Image] | None
    noise_only_start: bool
    prompt_2: Prompt
    negative_prompt_2: Prompt
    prompt_mix: tuple[str | None, Sequence[float]] | None
    noise_mix: tuple[Sequence[int], Sequence[float]] | None
    noise_offset: int
    decoding: str
    distilled_guidance: float | None
    reference_images: tuple[Tensor, ...] | None
    prompt_weights: str | None


@lru_cache(maxsize=256)
def sampler_of(spec: str) -> tuple[Sampler, dict[str, Any]]:
    """Parse "name" or "name:option=value,..." into a sampler and its options.

    Raises:
        UserError: For an unknown sampler or option, or a value of another type.
    """
    parsed = Spec.parse(spec)
    sampler = get_sampler(parsed.name)
    return sampler, parsed.values("sampler", options_of(sampler))


@lru_cache(maxsize=256)
def spacing_of(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse "name" or "name:option=value,..." into a spacing's name and its options.

    Raises:
        UserError: For an unknown spacing or option, or a value of another type.
    """
    parsed = Spec.parse(spec)
    if parsed.name not in SPACINGS:
        raise unknown("timestep spacing", parsed.name, [*SPACINGS, "tuned"])
    options = options_of(SPACINGS[parsed.name], without=("start",))
    return parsed.name, parsed.values("spacing", options)


@lru_cache(maxsize=256)
def _canonical(spec: str) -> Spec:
    """Return a sampler's name and those of its options that differ from the defaults."""
    return Spec.parse(spec).canonical("sampler", options_of(sampler_of(spec)[0]))
