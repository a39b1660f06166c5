"""`sfumato generate`: words in, PNG files out, each with all that is needed to make it again, bit
for bit.

The parameters in the PNG (decode/image.py) become the defaults of the command when `--from` names
it; flags that are given win. Image k of a request is made from seed + k, but arithmetic may depend
on the batch it is part of: so one image of several is made again with its whole request, and taken
out of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sfumato.cli._common import (
    MODELS,
    Clock,
    Opening,
    Precision,
    at_least,
    parse,
    progress,
    readable_size,
    unset,
    weaker_for,
)
from sfumato.cli._files import provenance, set_threads, slug, target
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.diffuse.sample import Step
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Request


@dataclass(frozen=True)
class Generate:
    """Makes pictures and writes them as PNG, with their parameters inside."""

    prompt: tyro.conf.Positional[Annotated[str | None, unset("no words")]] = None
    """What to draw: words, or the name of a class (`sfumato info MODEL` lists them)."""
    model: str = "fashion"
    """A bundled name, a folder in the diffusers layout, a single file or a hub id."""
    transformer: Annotated[str | None, unset("the model's")] = None
    """A file with a diffusion transformer alone (original, GGUF, fp8), in place of the one in the
    model's folder."""
    n: int = 16
    """How many pictures. Picture k is drawn from seed + k."""
    steps: Annotated[int | None, unset(MODELS)] = None
    """Sampling steps. More is slower and closer to the model's own distribution."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """The sampler's name, with options if need be: ddim:eta=0.5 (docs/samplers.md lists them)."""
    spacing: Annotated[str | None, unset(MODELS)] = None
    """How the times are spaced: trailing, karras, karras:rho=5, tuned ..."""
    timesteps: tuple[float, ...] = ()
    """The times to visit themselves, falling from noise (1) to clean (0), instead of --steps and
    --spacing."""
    guidance: Annotated[str | None, unset(MODELS)] = None
    """How strongly to follow the prompt: a number, 1 is off; or more, as "3
    interval:low=0.2,high=0.8" (docs/guidance.md)."""
    learned_guidance: Annotated[float | None, unset(MODELS)] = None
    """The same, for models that are told it (FLUX.1 dev); for them --guidance with a lone number is
    this one."""
    negative_prompt: Annotated[str | None, unset("none")] = None
    """What to keep away from."""
    prompt_2: Annotated[str | None, unset("the prompt")] = None
    """What the second text encoder (of SDXL, SD 3, FLUX.1) reads instead."""
    negative_prompt_2: Annotated[str | None, unset("the negative prompt")] = None
    """What the second text encoder reads of what to keep away from."""
    height: Annotated[int | None, unset(MODELS)] = None
    """In pixels."""
    width: Annotated[int | None, unset(MODELS)] = None
    """In pixels."""
    seed: int = 0
    """The same seed gives the same picture."""
    variation_strength: Annotated[float | None, unset("off")] = None
    """Variations of the one picture of --seed: 0 is that picture, 1 others; 0.1 to 0.3 keeps what
    it shows."""
    variation_seed: Annotated[int | None, unset("seed + 1")] = None
    """The seed that they go towards: picture k to that of variation-seed + k."""
    refiner: Annotated[str | None, unset("none")] = None
    """A second model that finishes the pictures, such as SDXL's refiner, with the same steps,
    sampler, spacing and guidance."""
    handover: Annotated[float | None, unset("0.8")] = None
    """With --refiner: the share of the process that is the first model's."""
    out: Annotated[Path | None, unset("PROMPT.png in the current folder")] = None
    """The PNG to write, or a folder for it."""
    grid: bool = True
    """One PNG with all pictures, or one PNG a picture (NAME-0.png, NAME-1.png, ...)."""
    source: Annotated[
        Path | None, tyro.conf.arg(name="from", metavar="PNG", help_behavior_hint="")
    ] = None
    """Make the picture in this PNG again; flags that are given change what they name."""
    allow_other_model: bool = False
    """With --from: go on although the model is not the one that made the PNG."""
    threads: Annotated[int | None, unset("all cores")] = None
    """CPU threads."""
    dtype: Annotated[Precision | None, unset("fp32")] = None
    """What is computed in: bf16 takes half the memory, and less time where the processor knows
    it."""
    device: Annotated[str | None, unset("cpu")] = None
    """Where: cpu, cuda, cuda:1 ..."""
    memory: Annotated[str | None, unset("all weights in memory")] = None
    """What the program may take, as 3GB: weights come from the files layer by layer. Slower;
    `sfumato info MODEL` says what fits."""


HANDOVER = 0.8
"""The share of the process that the first model has, as SDXL's authors advise."""

# What a PNG carries of the request, and of which type.
RECORDED: dict[str, type | tuple[type, ...]] = {
    "prompt": (str, type(None)),
    "model": str,
    "n": int,
    "steps": int,
    "sampler": str,
    "spacing": (str, type(None)),
    "timesteps": (list, type(None)),
    "guidance": (int, float, dict),
    "negative_prompt": (str, type(None)),
    "height": int,
    "width": int,
    "seed": int,
    "grid": bool,
}
# The same, of what may be missing: a picture that was made without it.
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "transformer": str,
    "dtype": str,
    "device": str,
    "learned_guidance": (int, float),
    "prompt_2": str,
    "negative_prompt_2": str,
    "variation_strength": (int, float),
    "variation_seed": int,
    "refiner": str,
    "handover": (int, float),
}


def generate(arguments: Sequence[str]) -> None:
    """Makes pictures from words or a class name, or makes one again from its PNG."""
    clock = Clock()
    options = parse(Generate, arguments, "generate")
    recorded: dict[str, Any] = {}
    index: int | None = None
    same = True
    if options.source is not None:
        from sfumato.decode.image import read_parameters

        recorded = read_parameters(options.source)
        before = _recorded_options(recorded, options.source)
        options = _settled(parse(Generate, arguments, "generate", default=before), before)
        # in another dtype the same weights have another hash
        same = not options.allow_other_model and options.dtype == before.dtype
        # One picture of a request stays one picture, unless the request itself is changed.
        index = (
            recorded.get("index") if (options.n, options.grid) == (before.n, before.grid) else None
        )
    _check(options)
    options = _spelled_out(options)
    opening = _opening(options)
    base = target(
        options.out, f"{options.source.stem}-again" if options.source else slug(options.prompt)
    )

    import torch

    from sfumato.decode.image import grid, write_png

    set_threads(options.threads, recorded.get("threads"))
    clock.lap("import")
    steps = max(len(options.timesteps) - 1, 1) if options.timesteps else options.steps
    model = opening.ready(options.model, steps)
    if recorded and same:
        _same_model(model.hash, "model", options.model, options.source, recorded)
    refiner = None if options.refiner is None else opening.others().ready(options.refiner, steps)
    if recorded.get("refiner") and refiner is not None and same:
        _same_model(refiner.hash, "refiner", options.refiner, options.source, recorded)
    clock.lap("load")
    pictures, settings = _sample(model, refiner, options, opening, clock)

    parameters = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "index": None,
        "grid": options.grid,
        "seed": options.seed,
        **settings,
        **{name: value for name in OPTIONAL if (value := getattr(options, name)) is not None},
        **({} if refiner is None else {"refiner_hash": refiner.hash}),
        **provenance(options.model, model, torch.get_num_threads(), str(torch.__version__)),
    }
    if index is not None:
        written = [write_png(base, pictures[index], {**parameters, "index": index})]
    elif options.grid:
        written = [write_png(base, grid(pictures), parameters)]
    else:
        names = [base.with_name(f"{base.stem}-{k}.png") for k in range(len(pictures))]
        written = [
            write_png(name, picture, {**parameters, "index": k})
            for k, (name, picture) in enumerate(zip(names, pictures, strict=True))
        ]
    clock.lap("write")
    for path in written:
        print(path)
    print(f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''} in {clock}")
    if opening.memory is not None:
        print(f"at most {_peak(opening.device)} of memory")


def _opening(options: Generate) -> Opening:
    """How the options want models opened."""
    from sfumato.io.host_memory import parse_size

    memory = None if options.memory is None else parse_size(options.memory)
    return Opening(
        memory,
        options.dtype,
        options.device,
        None if options.transformer is None else Path(options.transformer),
    )


def _peak(device: str | None) -> str:
    """The most that was held where the model computes: by this process, or on its GPU."""
    import torch

    from sfumato.io.host_memory import resident_bytes

    peak = (
        torch.cuda.max_memory_reserved(device)
        if (device or "cpu").startswith("cuda")
        else resident_bytes(peak=True)
    )
    return "an unknown size" if peak is None else readable_size(peak)


def _same_model(
    found: str, role: str, name: str | None, source: Path | None, recorded: dict[str, Any]
) -> None:
    """Refuses a model that is not the one that made the PNG: the picture would be another."""
    made_with = str(recorded.get(f"{role}_hash"))
    if found != made_with:
        raise UserError(
            f"{source} was made by {role} {recorded[role]!r} with hash {made_with[:12]}, but {name!r} has hash "
            f"{found[:12]}: the picture would differ; name the right model with --{role}, or add --allow-other-model"
        )


def _sample(
    model: "LatentDiffusion",
    refiner: "LatentDiffusion | None",
    options: Generate,
    opening: Opening,
    clock: Clock,
) -> tuple[list["Image"], dict[str, Any]]:
    """The pictures and the settings that made them, the model's defaults filled in."""
    request, settings = _request(model, options, opening)
    with progress("sampling") as update:

        def on_step(step: "Step") -> None:
            clock.lap("sample")
            update(step.index + 1, step.count)

        if refiner is not None:
            from sfumato.tasks.refine import check_pair, first_part, last_part

            check_pair(model, refiner)
            at = HANDOVER if options.handover is None else options.handover
            x = model.run(first_part(model, request, at=at), output="latent", on_step=on_step)
            request = last_part(model, refiner, x, request, at=at)
            if options.memory is not None:
                model.release()
        pictures = (refiner or model).run(request, on_step=on_step)
    clock.lap("decode")
    return pictures, settings


def _request(
    model: "LatentDiffusion", options: Generate, opening: Opening
) -> tuple["Request", dict[str, Any]]:
    """What the options ask for, and the settings that a PNG remembers of it."""
    from sfumato.predict.guidance.settings import Guidance
    from sfumato.sampling import Request
    from sfumato.tasks.variations import vary

    guidance = None if options.guidance is None else Guidance.parse(options.guidance).to_json()
    times = list(options.timesteps) or None
    settings = model.settings(
        n=options.n,
        steps=options.steps,
        sampler=options.sampler,
        spacing=options.spacing,
        timesteps=times,
        guidance=guidance,
        learned_guidance=options.learned_guidance,
        height=options.height,
        width=options.width,
    )
    # the model may be tuned again: the picture remembers its own times
    if settings["spacing"] == "tuned":
        times = model.times(settings["steps"], settings["sampler"], "tuned")
    request = Request(
        options.prompt,
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        prompt_2=options.prompt_2,
        negative_prompt_2=options.negative_prompt_2,
        timesteps=times,
        weaker=weaker_for(settings["guidance"], opening),
        **settings,
    )
    if options.variation_strength is not None:
        request = vary(request, seed=options.variation_seed, strength=options.variation_strength)
    return request, {**settings, "timesteps": times}


def _recorded_options(recorded: dict[str, Any], source: Path) -> Generate:
    """The request that a PNG remembers, as defaults for the command."""
    if "task" in recorded:
        raise UserError(
            f"{source} was made by `sfumato {recorded['task']}` from {recorded.get('picture')!r}: run that command with the same picture and seed"
        )
    for name, kind in {**RECORDED, **OPTIONAL}.items():
        value = recorded.get(name)
        # pictures of before there was a choice
        if value is None and name in (*OPTIONAL, "spacing", "timesteps"):
            continue
        if (
            name not in recorded
            or not isinstance(value, kind)
            or (isinstance(value, bool) and kind is not bool)
        ):
            raise UserError(
                f"the parameters in {source} lack a usable {name!r} (got {value!r}): the file was changed after it was made"
            )
    index = recorded.get("index")
    if index is not None and (not isinstance(index, int) or not 0 <= index < recorded["n"]):
        raise UserError(
            f"the parameters in {source} name picture {index!r} of {recorded['n']}: the file was changed after it was made"
        )
    known = {name: recorded[name] for name in (*RECORDED, *OPTIONAL) if name in recorded}
    times = tuple(known.get("timesteps") or ())
    return replace(
        Generate(), **{**known, "guidance": json.dumps(known["guidance"]), "timesteps": times}
    )


def _settled(options: Generate, before: Generate) -> Generate:
    """A picture's own times hold as long as nobody asks for other steps, another sampler or another
    spacing.
    """
    asked = (options.steps, options.sampler, options.spacing) != (
        before.steps,
        before.sampler,
        before.spacing,
    )
    if options.timesteps == before.timesteps and asked:
        options = replace(options, timesteps=())
    if (
        not options.timesteps
        and options.spacing == before.spacing
        and options.spacing in ("given", "tuned")
        and asked
    ):
        # nobody asked for it: the times were the picture's, or the model's choice
        options = replace(options, spacing=None)
    if options.guidance != before.guidance and options.learned_guidance == before.learned_guidance:
        options = replace(options, learned_guidance=None)
    return options


def _spelled_out(options: Generate) -> Generate:
    """Defaults that depend on other options, for the PNG to remember."""
    if options.refiner is not None and options.handover is None:
        options = replace(options, handover=HANDOVER)
    if options.variation_strength is not None and options.variation_seed is None:
        options = replace(options, variation_seed=options.seed + 1)
    return options


def _check(options: Generate) -> None:
    """What can be refused before torch is imported."""
    at_least(
        1,
        n=options.n,
        steps=options.steps,
        height=options.height,
        width=options.width,
        threads=options.threads,
    )
    at_least(0, seed=options.seed)
    if options.allow_other_model and options.source is None:
        raise UserError("--allow-other-model says what to do with --from PNG, which was not given")
    if options.handover is not None and options.refiner is None:
        raise UserError(
            f"--handover {options.handover} without --refiner: name the model to hand over to"
        )
    if options.handover is not None and not 0 < options.handover < 1:
        raise UserError(
            f"--handover {options.handover}: expected a number above 0 and below 1, the share of the first model"
        )
    strength = options.variation_strength
    if options.variation_seed is not None and strength is None:
        raise UserError(
            f"--variation-seed {options.variation_seed} without --variation-strength: say how far to go there, 0.2 is a little"
        )
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(
            f"--variation-strength {strength}: expected a number from 0, the picture of --seed, to 1, others"
        )
