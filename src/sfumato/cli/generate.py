"""`sfumato generate`: a prompt in, PNG files with their parameters out.

The parameters in the PNG (images.py) become the defaults of the command when `--from` names it;
flags that are given win. Image k of a request is drawn from seed + k, but arithmetic may depend on
its batch: so one image of several is drawn again with its whole request, and taken out of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sfumato.cli._options import (
    MODELS,
    LoadOptions,
    RunOptions,
    at_least,
    load_guide_model,
    parse,
    unset,
)
from sfumato.cli._output import (
    Clock,
    progress,
    provenance,
    readable_size,
    slug,
    target,
    write_images,
)
from sfumato.cli._run import report_written, set_threads
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.diffuse.run import Step
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Request


@dataclass(frozen=True, kw_only=True)
class Generate(RunOptions):
    """Generate images and write them as PNG, with their parameters inside."""

    prompt: tyro.conf.Positional[Annotated[str | None, unset("no prompt")]] = None
    """Prompt, or the name of a class (`sfumato info MODEL` lists them)."""
    n: int = 16
    """Number of images. Image k is drawn from seed + k."""
    timesteps: tuple[float, ...] = ()
    """Times to visit, falling from noise (1) to clean (0), instead of --steps and --spacing."""
    height: Annotated[int | None, unset(MODELS)] = None
    """Height in pixels."""
    width: Annotated[int | None, unset(MODELS)] = None
    """Width in pixels."""
    variation_strength: Annotated[float | None, unset("off")] = None
    """Variations of the one image of --seed: 0 is that image, 1 others; 0.1 to 0.3 keeps its
    subject."""
    variation_seed: Annotated[int | None, unset("seed + 1")] = None
    """Seed of the variations: image k moves towards that of variation-seed + k."""
    refiner: Annotated[str | None, unset("none")] = None
    """Second model that finishes the images, such as SDXL's refiner, with the same steps, sampler,
    spacing and guidance."""
    handover: Annotated[float | None, unset("0.8")] = None
    """With --refiner: share of the process that the first model runs."""
    out: Annotated[Path | None, unset("PROMPT.png in the current folder")] = None
    """PNG to write, or a folder for it."""
    grid: bool = True
    """One PNG with all images, or one PNG an image (NAME-0.png, NAME-1.png, ...)."""
    source: Annotated[
        Path | None, tyro.conf.arg(name="from", metavar="PNG", help_behavior_hint="")
    ] = None
    """Draw the image in this PNG again; flags that are given change its parameters."""
    allow_other_model: bool = False
    """With --from: continue although another model made the PNG."""


HANDOVER = 0.8
"""Share of the process that the first model runs, as SDXL's authors advise."""

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
"""Parameters of a PNG that make its request, with their types."""
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "transformer": str,
    "dtype": str,
    "device": str,
    "distilled_guidance": (int, float),
    "prompt_2": str,
    "negative_prompt_2": str,
    "variation_strength": (int, float),
    "variation_seed": int,
    "refiner": str,
    "handover": (int, float),
}
"""The same of parameters that a PNG may lack."""
_OLD_PARAMETERS = {"learned_guidance": "distilled_guidance"}
"""Names in older PNG files, and today's."""


def generate(arguments: Sequence[str]) -> None:
    """Generate images from a prompt or a class name, or draw one again from its PNG."""
    clock = Clock()
    options = parse(Generate, arguments, "generate")
    recorded: dict[str, Any] = {}
    index: int | None = None
    same = True
    if options.source is not None:
        from sfumato.images import read_parameters

        recorded = read_parameters(options.source)
        before = _recorded_options(recorded, options.source)
        options = _drop_derived(parse(Generate, arguments, "generate", default=before), before)
        # in another dtype the same weights have another hash
        same = not options.allow_other_model and options.dtype == before.dtype
        # One image of a request stays one image, unless the request itself is changed.
        index = (
            recorded.get("index") if (options.n, options.grid) == (before.n, before.grid) else None
        )
    _check(options)
    options = _fill_dependent(options)
    opening = options.load_options()
    base = target(
        options.out, f"{options.source.stem}-again" if options.source else slug(options.prompt)
    )

    from sfumato.images import write_png

    set_threads(options.threads, recorded.get("threads"))
    clock.lap("import")
    steps = max(len(options.timesteps) - 1, 1) if options.timesteps else options.steps
    model = opening.ready(options.model, steps)
    if recorded and same:
        _check_same_model(model.hash, "model", options.model, options.source, recorded)
    refiner = None if options.refiner is None else opening.others().ready(options.refiner, steps)
    if recorded.get("refiner") and refiner is not None and same:
        _check_same_model(refiner.hash, "refiner", options.refiner, options.source, recorded)
    clock.lap("load")
    images, settings = _sample(model, refiner, options, opening, clock)

    optional = {name: value for name in OPTIONAL if (value := getattr(options, name)) is not None}
    parameters = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "index": None,
        "grid": options.grid,
        "seed": options.seed,
        **settings,
        **{
            name: str(value) if isinstance(value, Path) else value
            for name, value in optional.items()
        },
        **({} if refiner is None else {"refiner_hash": refiner.hash}),
        **provenance(options.model, model),
    }
    if index is not None:
        written = [write_png(base, images[index], {**parameters, "index": index})]
    else:
        written = write_images(base, images, parameters, options.grid, numbered=True)
    clock.lap("write")
    report_written(written, len(images), clock)
    if opening.memory is not None:
        print(f"at most {_peak(opening.device)} of memory")


def _peak(device: str | None) -> str:
    """Peak memory of this process, or on the model's GPU."""
    import torch

    from sfumato.io.host_memory import resident_bytes

    peak = (
        torch.cuda.max_memory_reserved(device)
        if (device or "cpu").startswith("cuda")
        else resident_bytes(peak=True)
    )
    return "an unknown size" if peak is None else readable_size(peak)


def _check_same_model(
    model_hash: str, role: str, name: str | None, source: Path | None, recorded: dict[str, Any]
) -> None:
    """Raise `UserError` for another model than that of the PNG: the image would differ."""
    made_with = str(recorded.get(f"{role}_hash"))
    if model_hash != made_with:
        raise UserError(
            f"{source} was made by {role} {recorded[role]!r} with hash {made_with[:12]}, but {name!r} has hash "
            f"{model_hash[:12]}: the picture would differ; name the right model with --{role}, or add --allow-other-model"
        )


def _sample(
    model: "LatentDiffusion",
    refiner: "LatentDiffusion | None",
    options: Generate,
    opening: LoadOptions,
    clock: Clock,
) -> tuple[list["Image"], dict[str, Any]]:
    """The images, and the settings that made them, the model's defaults filled in."""
    request = _request(model, options, opening)
    with progress("sampling") as update:

        def on_step(step: "Step") -> None:
            clock.lap("sample")
            update(step.index + 1, step.count)

        plan = first = model.plan(request)
        if refiner is not None:
            from sfumato.tasks.refine import handover

            # the refiner runs with the first model's settings
            same = replace(first, request=first.explicit_request())
            plans = handover(
                model, refiner, same, at=HANDOVER if options.handover is None else options.handover
            )
            plan = plans.resume(model.run(plans.first, output="latent", on_step=on_step))
            if options.memory is not None:
                model.release()
        images = (refiner or model).run(plan, on_step=on_step)
    clock.lap("decode")
    # The model may be tuned again: the PNG records its own times.
    return images, {**first.to_json(), "timesteps": first.explicit_request().timesteps}


def _request(model: "LatentDiffusion", options: Generate, opening: LoadOptions) -> "Request":
    """The request of the options."""
    from sfumato.sampling import Request
    from sfumato.tasks.variations import vary

    values = options.request_fields()
    request = Request(
        options.prompt,
        height=options.height,
        width=options.width,
        timesteps=list(options.timesteps) or None,
        guide_model=load_guide_model(
            model.defaults.guidance if options.guidance is None else options.guidance, opening
        ),
        **values,
    )
    if options.variation_strength is not None:
        return vary(request, seed=options.variation_seed, strength=options.variation_strength)
    return request


def _recorded_options(recorded: dict[str, Any], source: Path) -> Generate:
    """The request that a PNG records, as defaults for the command."""
    recorded = {_OLD_PARAMETERS.get(name, name): value for name, value in recorded.items()}
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
    values = {name: recorded[name] for name in (*RECORDED, *OPTIONAL) if name in recorded}
    times = tuple(values.get("timesteps") or ())
    transformer = None if values.get("transformer") is None else Path(values["transformer"])
    return replace(
        Generate(),
        **{
            **values,
            "guidance": json.dumps(values["guidance"]),
            "timesteps": times,
            "transformer": transformer,
        },
    )


def _drop_derived(options: Generate, before: Generate) -> Generate:
    """Drop recorded times and scales that other flags of the command line replace."""
    changed = (options.steps, options.sampler, options.spacing) != (
        before.steps,
        before.sampler,
        before.spacing,
    )
    if options.timesteps == before.timesteps and changed:
        options = replace(options, timesteps=())
    if (
        not options.timesteps
        and options.spacing == before.spacing
        and options.spacing in ("given", "tuned")
        and changed
    ):
        # it was never chosen: the times were the image's, or the model's
        options = replace(options, spacing=None)
    if (
        options.guidance != before.guidance
        and options.distilled_guidance == before.distilled_guidance
    ):
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
    """Check options before torch is imported."""
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
