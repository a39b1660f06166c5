"""`sfumato generate`: a prompt in, PNG files with their parameters out.

With `--from`, the parameters in a PNG (images.py) become the defaults of the command, and flags
override them. Image k of a request is drawn from seed + k, but arithmetic may depend on its batch:
so one image of several is drawn again with its whole request, and taken out of it.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro

from sfumato.cli._names import check_words
from sfumato.cli._options import (
    MODELS,
    Decoding,
    RunOptions,
    Seed,
    at_least,
    parse,
    recorded,
    refuse,
    unset,
)
from sfumato.cli._output import (
    Clock,
    Target,
    free_files,
    provenance,
    readable_size,
    sampling_progress,
    short,
    slug,
    write_image,
    write_images,
)
from sfumato.cli._run import check_options, report_written, set_threads
from sfumato.errors import UserError
from sfumato.validate import seed_number

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Request


MANY, SMALL = 16, 64
"""Number of images that small models of classes draw, and their largest side in pixels."""


@dataclass(frozen=True, kw_only=True)
class Generate(RunOptions):
    """Generate images and write them as PNG, with their parameters inside."""

    prompt: tyro.conf.Positional[Annotated[str | None, unset("no prompt")]] = None
    """Prompt, or the name of a class (`sfumato info MODEL` lists them)."""
    n: Annotated[int | None, unset(f"1; {MANY} without text encoders, up to {SMALL} pixels")] = None
    """Number of images. Image k is drawn from seed + k."""
    timesteps: Annotated[tuple[float, ...], unset("of --steps and --spacing")] = ()
    """Timesteps to visit, falling from noise (1) to clean (0)."""
    height: Annotated[int | None, unset(MODELS)] = None
    """Height in pixels."""
    width: Annotated[int | None, unset(MODELS)] = None
    """Width in pixels."""
    variation_strength: Annotated[float | None, unset("off")] = None
    """Vary the image of --seed: 0 is that image, 1 others; 0.1 to 0.3 keeps its subject."""
    variation_seed: Annotated[Seed | None, unset("seed + 1")] = None
    """Seed of the variations: image k moves towards that of variation-seed + k."""
    refiner: Annotated[str | None, unset("none")] = None
    """Second model that finishes the images with the same settings, such as SDXL's refiner."""
    handover: Annotated[float | None, unset("0.8")] = None
    """With --refiner: share of the process that the first model runs, in (0, 1)."""
    out: Annotated[
        str | None, unset("PROMPT-seedSEED.png in the current folder", metavar="PATH")
    ] = None
    """New PNG to write, or a folder for it, which is made where the name ends in /."""
    grid: bool = True
    """One PNG with all images, instead of one an image (NAME-seed0.png, NAME-seed1.png, ...)."""
    source: Annotated[
        Path | None, tyro.conf.arg(name="from", metavar="PNG", help_behavior_hint="")
    ] = None
    """Draw the image in this PNG again; other flags change its parameters."""
    allow_other_model: bool = False
    """With --from: continue although another model made the PNG."""


HANDOVER = 0.8
"""Share of the process that the first model runs, as SDXL's authors advise."""

_WORD = 2**32
"""Seeds from here on lost their high bits, before PNG files recorded `packed`."""
_BREAK = re.compile(r"\bBREAK\b")
"""A word of prompts that was text in those files."""

Kind = type | tuple[type, ...]
_NUMBER = (int, float)
REQUIRED: dict[str, Kind] = {
    **dict.fromkeys(("n", "steps", "height", "width", "seed"), int),
    **dict.fromkeys(("model", "sampler"), str),
    **dict.fromkeys(("prompt", "negative_prompt"), (str, type(None))),
    "guidance": (*_NUMBER, dict),
    "grid": bool,
}
"""Parameters of a PNG that make its request, with their types."""
LATER: dict[str, Kind] = {"spacing": str, "timesteps": list, "decoding": str}
"""The same of parameters that the oldest PNG files lack, and that may be null."""
PATHS = ("transformer", "vae", "tokenizer")
OPTIONAL: dict[str, Kind] = {
    **dict.fromkeys((*PATHS, "variant", "revision", "truncation", "dtype", "device"), str),
    "clip_skip": int,
    "distilled_guidance": _NUMBER,
    **dict.fromkeys(("prompt_2", "negative_prompt_2", "prompt_weights"), str),
    "variation_strength": _NUMBER,
    "variation_seed": int,
    "refiner": str,
    "handover": _NUMBER,
    "batch": int,
}
"""The same of parameters that are written only if they are set."""
_OLD_PARAMETERS = {"learned_guidance": "distilled_guidance"}
"""Names in older PNG files, and today's."""


def generate(arguments: Sequence[str]) -> None:
    """Generate images from a prompt or a class name, or draw one again from its PNG."""
    clock = Clock()
    options = parse(Generate, arguments, "generate")
    previous: dict[str, Any] = {}
    index: int | None = None
    same = True
    if options.source is not None:
        from sfumato.images import read_parameters

        previous = read_parameters(options.source)
        before = _recorded_options(previous, options.source)
        options = _drop_derived(parse(Generate, arguments, "generate", default=before), before)
        # in another dtype the same weights have another hash
        same = not options.allow_other_model and options.dtype == before.dtype
        # One image of a request stays one image, unless the request itself is changed.
        if (options.n, options.grid) == (before.n, before.grid):
            index = previous.get("index")
    _check(options)
    options = _fill_dependent(options)
    again = options.source is not None
    name = f"{short(options.source.stem)}-again" if options.source else slug(options.prompt)
    base = check_options(options, name, numbered=index is None, by_seed=not again)

    check_words(options, options.timesteps)
    set_threads(options.threads, previous.get("threads"))
    clock.lap("import")
    options.check_early(lambda model: _check_plan(model, options, base), options.sampler)
    steps = max(len(options.timesteps) - 1, 1) if options.timesteps else options.steps
    pack = previous.get("packed")
    model, packed = options.load_for_sampling(steps, pack=pack if isinstance(pack, bool) else None)
    if options.n is None:
        options = replace(options, n=(n := _count(model, options)))
        base.files(n, several=not options.grid)
    if previous and same:
        _check_same_model(model, "model", options, previous)
    if previous and model.conditioner.prompt_weights == "lerp" and options.prompt_weights is None:
        # Older PNG files record no rule: it was this one.
        options = replace(options, prompt_weights="a1111")
    _note_changes(model, options, previous)
    refiner = None
    if options.refiner is not None:
        refiner, _ = options.load_for_sampling(steps, options.refiner, packed)
        if previous.get("refiner") and same:
            _check_same_model(refiner, "refiner", options, previous)
    request = _request(model, options)
    guide = _hash_of_guide(request)
    if guide is not None and same and previous.get("guide_model_hash", guide) != guide:
        raise UserError(
            f"the model that guidance {options.guidance} names is not the one that made "
            f"{options.source}: the image would differ; put that model there, "
            "or add --allow-other-model"
        )
    clock.lap("load")
    images, settings = _sample(model, refiner, request, options, clock)
    parameters = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "index": index,
        "grid": options.grid,
        "seed": options.seed,
        **settings,
        **recorded(options, list(OPTIONAL)),
        "packed": packed,
        **({} if refiner is None else {"refiner_hash": refiner.hash}),
        **({} if guide is None else {"guide_model_hash": guide}),
        **provenance(options.model, model),
    }
    if index is not None:
        (file,) = free_files(base, 1, several=False)
        written = [write_image(file, images[index], parameters, options.overwrite)]
    else:
        written = write_images(base, images, parameters, options.grid, numbered=True)
    report_written(written, len(images), options.seed, clock)
    if options.memory is not None:
        print(f"at most {_peak(options.device)} of memory")


def _peak(device: str | None) -> str:
    """Peak memory of this process, or on the model's GPU."""
    import torch

    from sfumato.io.host_memory import resident_bytes

    if device is not None and device.startswith("cuda"):
        return readable_size(torch.cuda.max_memory_reserved(device))
    peak = resident_bytes(peak=True)
    return "an unknown size" if peak is None else readable_size(peak)


def _count(model: "LatentDiffusion", options: Generate) -> int:
    """Number of images where --n is not set: as many as are drawn at a glance."""
    sides = (model.sample_size if s is None else s for s in (options.height, options.width))
    return 1 if model.conditioner.encoders or max(sides) > SMALL else MANY


def _check_plan(model: "LatentDiffusion", options: Generate, base: Target) -> None:
    """Plan the run of a model's outline: raises every `UserError` of the request."""
    if options.n is None:
        options = replace(options, n=(n := _count(model, options)))
        base.files(n, several=not options.grid)
    plan = model.plan(_request(model, options, early=True))
    if options.refiner is not None:
        from sfumato.loading import outline
        from sfumato.tasks.refine import handover

        refiner = outline(options.refiner, options.variant)
        if refiner is not None:
            assert options.handover is not None
            same = replace(plan, request=plan.explicit_request())
            handover(model, refiner, same, at=options.handover)


def _check_same_model(
    model: "LatentDiffusion", role: str, options: Generate, previous: dict[str, Any]
) -> None:
    """Raise `UserError` for another model than that of the PNG: the image would differ."""
    made_with = str(previous.get(f"{role}_hash"))
    if model.hash != made_with:
        raise UserError(
            f"{options.source} was made by {role} {previous[role]!r} with hash {made_with[:12]}, "
            f"but {getattr(options, role)!r} has hash {model.hash[:12]}: the image would differ; "
            f"name the right model with --{role}, or add --allow-other-model"
        )


def _note_changes(model: "LatentDiffusion", options: Generate, previous: dict[str, Any]) -> None:
    """Print on stderr the settings of an older PNG that draw another image today."""
    if not previous or "packed" in previous:
        return
    for name in ("seed", "variation_seed"):
        seed = getattr(options, name)
        if seed is not None and seed == previous.get(name) and seed >= _WORD:
            flag = f"--{name.replace('_', '-')}"
            print(
                f"sfumato: {options.source} is older than seeds of 64 bits: {flag} {seed} draws "
                f"another image now, {flag} {seed % _WORD} the one in the file",
                file=sys.stderr,
            )
    weights = options.prompt_weights or model.conditioner.prompt_weights
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        text = getattr(options, name)
        read = text is not None and text == previous.get(name) and _BREAK.search(text)
        if read and weights not in (None, "none", "comfyui"):
            print(
                f"sfumato: {options.source} is older than BREAK, a word of its {name} that begins "
                "a chunk and another image now: --prompt-weights none reads it, and brackets, "
                "as text",
                file=sys.stderr,
            )


def _sample(
    model: "LatentDiffusion",
    refiner: "LatentDiffusion | None",
    request: "Request",
    options: Generate,
    clock: Clock,
) -> tuple[list["Image"], dict[str, Any]]:
    """The images, and the settings that made them, the model's defaults filled in."""
    with sampling_progress("sampling", clock) as on_step:
        plan = first = model.plan(request)
        if refiner is not None:
            from sfumato.tasks.refine import handover

            # the refiner runs with the first model's settings
            same = replace(first, request=first.explicit_request())
            assert options.handover is not None
            plans = handover(model, refiner, same, at=options.handover)
            latents = model.run(plans.first, output="latent", on_step=on_step, batch=options.batch)
            plan = plans.resume(latents)
            if options.memory is not None:
                model.release()
        last = refiner or model
        plan = last.fitted(plan)
        images = last.run(plan, on_step=on_step, batch=options.batch)
    clock.lap("decode")
    # The model may be tuned again: the PNG records its own times.
    times = first.explicit_request().timesteps
    return images, {**first.to_json(), "timesteps": times, "decoding": plan.request.decoding}


def _hash_of_guide(request: "Request") -> str | None:
    """Hash of the weaker model that guidance moves away from; None: there is none."""
    from sfumato.model import LatentDiffusion

    guide = request.guide_model
    return guide.hash if isinstance(guide, LatentDiffusion) else None


def _request(model: "LatentDiffusion", options: Generate, early: bool = False) -> "Request":
    """The request of the options; `early` as in `RunOptions.request`."""
    from sfumato.tasks.variations import vary

    request = replace(options.request(model, early), timesteps=list(options.timesteps) or None)
    if options.variation_strength is None:
        return request
    return vary(request, seed=options.variation_seed, strength=options.variation_strength)


def _recorded_options(previous: dict[str, Any], source: Path) -> Generate:
    """The request that a PNG records, as defaults for the command."""
    previous = {_OLD_PARAMETERS.get(name, name): value for name, value in previous.items()}
    changed = "the file was changed after it was made"
    if "task" in previous:
        raise UserError(
            f"{source} was made by `sfumato {previous['task']}` from {previous.get('picture')!r}: "
            "run that command with the same image and seed"
        )
    for name, kind in {**REQUIRED, **LATER, **OPTIONAL}.items():
        value = previous.get(name)
        if value is None and name not in REQUIRED:
            continue
        odd = isinstance(value, bool) and kind is not bool
        if name not in previous or odd or not isinstance(value, kind):
            raise UserError(
                f"the parameters in {source} lack a usable {name!r} (got {value!r}): {changed}"
            )
    index, n = previous.get("index"), previous["n"]
    if index is not None and (not isinstance(index, int) or not 0 <= index < n):
        raise UserError(f"the parameters in {source} name image {index!r} of {n}: {changed}")
    values = {k: previous[k] for k in (*REQUIRED, *LATER, *OPTIONAL) if k in previous}
    values["guidance"] = json.dumps(values["guidance"])
    if values.setdefault("decoding", "whole") not in get_args(Decoding):
        raise UserError(
            f"the parameters in {source} name decoding {values['decoding']!r}: {changed}"
        )
    values["timesteps"] = tuple(values.get("timesteps") or ())
    values |= {name: Path(values[name]) for name in PATHS if values.get(name) is not None}
    return Generate(**values)


def _drop_derived(options: Generate, before: Generate) -> Generate:
    """Drop recorded times and scales that other flags of the command line replace."""
    changed = any(
        getattr(options, name) != getattr(before, name) for name in ("steps", "sampler", "spacing")
    )
    if options.timesteps == before.timesteps and changed:
        options = replace(options, timesteps=())
    # never chosen: the times were the image's, or the model's
    derived = options.spacing in ("given", "tuned") and options.spacing == before.spacing
    if changed and derived and not options.timesteps:
        options = replace(options, spacing=None)
    guided = options.guidance != before.guidance
    if guided and options.distilled_guidance == before.distilled_guidance:
        options = replace(options, distilled_guidance=None)
    return options


def _fill_dependent(options: Generate) -> Generate:
    """Fill in defaults that depend on other options, for the PNG to record."""
    if options.refiner is not None and options.handover is None:
        options = replace(options, handover=HANDOVER)
    if options.variation_strength is not None and options.variation_seed is None:
        options = replace(options, variation_seed=options.seed + 1)
    return options


def _check(options: Generate) -> None:
    """Check options of this command alone before torch is imported."""
    at_least(options, 1, "height", "width")
    if options.allow_other_model and options.source is None:
        raise UserError("--allow-other-model without --from PNG: there is no model to compare with")
    if options.refiner is None:
        refuse(options, " without --refiner: name the model to hand over to", "handover")
    if options.handover is not None and not 0 < options.handover < 1:
        raise UserError(
            f"--handover {options.handover}: expected a number above 0 and below 1, "
            "the share of the first model"
        )
    if options.variation_seed is not None:
        seed_number("--variation-seed", options.variation_seed, options.n or 1)
    strength = options.variation_strength
    if strength is None:
        reason = " without --variation-strength: say how far to go there, 0.2 is a little"
        refuse(options, reason, "variation_seed")
    elif not 0 <= strength <= 1:
        raise UserError(
            f"--variation-strength {strength}: expected a number from 0, the image of --seed, "
            "to 1, others"
        )
