"""What the commands that make pictures of pictures, or series of them, share: options, the run, the
PNG files and what they remember.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sfumato.cli._common import (
    MODELS,
    Clock,
    Opening,
    Precision,
    at_least,
    progress,
    unset,
    weaker_for,
)
from sfumato.cli._files import provenance, set_threads, target
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.diffuse.sample import Step
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Request


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes, and where its pictures go."""

    model: str = "fashion"
    """A bundled name, a folder in the diffusers layout, a single file or a hub id."""
    transformer: Annotated[Path | None, unset("the model's")] = None
    """A file with a diffusion transformer alone (original, GGUF, fp8), in place of the one in the
    model's folder."""
    n: int = 1
    """How many pictures. Picture k is drawn from seed + k."""
    steps: Annotated[int | None, unset(MODELS)] = None
    """Sampling steps of a whole run; a strength below 1 makes the last part of them."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """The sampler's name, with options if need be: ddim:eta=0.5 (docs/samplers.md lists them)."""
    spacing: Annotated[str | None, unset(MODELS)] = None
    """How the times are spaced: trailing, karras, karras:rho=5, tuned ..."""
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
    seed: int = 0
    """The same seed gives the same picture."""
    out: Annotated[Path | None, unset("NAME-COMMAND.png in the current folder")] = None
    """The PNG to write, or a folder for it."""
    grid: bool = False
    """One PNG with all pictures, instead of one PNG a picture (NAME-0.png, NAME-1.png, ...)."""
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


@dataclass(frozen=True)
class TaskOptions(RunOptions):
    """A picture, words, and how the run goes."""

    picture: tyro.conf.Positional[Path]
    """The picture to begin with (PNG, JPEG, WebP ...)."""
    prompt: tyro.conf.Positional[Annotated[str | None, unset("no words")]] = None
    """What to draw: words, or the name of a class."""


def read_picture(path: Path) -> "Image":
    """A picture from a file; `UserError` for one that is missing or none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected a picture there") from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path} could not be read as a picture ({error}): it may be truncated; copy or download it again"
        ) from error


def run_task(
    name: str,
    options: TaskOptions,
    own: dict[str, Any],
    prepare: Callable[["LatentDiffusion", "Image", "Request"], "Request"],
) -> None:
    """Makes the pictures of a task and writes them. own: the task's own settings, which the PNG
    files remember beside the usual ones.
    """
    base = checked(options, f"{options.picture.stem}-{name}")
    picture = read_picture(options.picture)
    make(
        name,
        options,
        base,
        remembered(options.picture) | own,
        options.prompt,
        lambda model, request: prepare(model, picture, request),
    )


def checked(options: RunOptions, name: str) -> Path:
    """Where the pictures are to be written; `UserError` for what can be refused before torch is
    imported.
    """
    at_least(1, n=options.n, steps=options.steps, threads=options.threads)
    at_least(0, seed=options.seed)
    return target(options.out, name)


def remembered(picture: Path) -> dict[str, Any]:
    """What a PNG remembers of a picture that it was made from."""
    from sfumato.io.atomic import hash_bytes

    return {"picture": str(picture), "picture_hash": hash_bytes(picture.read_bytes())}


def make(
    name: str,
    options: RunOptions,
    base: Path,
    own: dict[str, Any],
    prompt: str | None,
    prepare: Callable[["LatentDiffusion", "Request"], "Request"],
    columns: int | None = None,
) -> None:
    """Runs the request that `prepare` makes of the options' plain one, and writes its pictures;
    columns: of the grid, if not square.
    """
    clock = Clock()
    import torch

    from sfumato.decode.image import grid, write_png
    from sfumato.io.host_memory import parse_size

    memory = None if options.memory is None else parse_size(options.memory)
    opening = Opening(memory, options.dtype, options.device, options.transformer)
    set_threads(options.threads, None)
    clock.lap("import")
    model = opening.ready(options.model, options.steps)
    clock.lap("load")
    request, settings = _request(model, options, opening, prompt)
    request = prepare(model, request)
    with progress(name) as update:

        def on_step(step: "Step") -> None:
            clock.lap("sample")
            update(step.index + 1, step.count)

        pictures = model.run(request, on_step=on_step)
    clock.lap("decode")
    second = {
        key: value
        for key in ("prompt_2", "negative_prompt_2")
        if (value := getattr(options, key)) is not None
    }
    parameters = {
        "task": name,
        "prompt": prompt,
        "negative_prompt": options.negative_prompt,
        **second,
        **({} if options.transformer is None else {"transformer": str(options.transformer)}),
        **opening.recorded(),
        "seed": options.seed,
        **settings,
        "height": pictures[0].height,
        "width": pictures[0].width,
        **own,
        **provenance(options.model, model, torch.get_num_threads(), str(torch.__version__)),
    }
    if options.grid:
        written = [write_png(base, grid(pictures, columns), parameters)]
    else:
        names = (
            [base]
            if len(pictures) == 1
            else [base.with_name(f"{base.stem}-{k}.png") for k in range(len(pictures))]
        )
        written = [
            write_png(path, one, {**parameters, "index": k})
            for k, (path, one) in enumerate(zip(names, pictures, strict=True))
        ]
    clock.lap("write")
    for path in written:
        print(path)
    print(f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''} in {clock}")


def _request(
    model: "LatentDiffusion", options: RunOptions, opening: Opening, prompt: str | None
) -> tuple["Request", dict[str, Any]]:
    """What the options ask for, and the settings that a PNG remembers of it."""
    from sfumato.predict.guidance.settings import Guidance
    from sfumato.sampling import Request

    guidance = None if options.guidance is None else Guidance.parse(options.guidance).to_json()
    asked = {
        "n": options.n,
        "steps": options.steps,
        "sampler": options.sampler,
        "spacing": options.spacing,
        "guidance": guidance,
    }
    asked["learned_guidance"] = options.learned_guidance
    settings = model.settings(**asked)
    request = Request(
        prompt,
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        prompt_2=options.prompt_2,
        negative_prompt_2=options.negative_prompt_2,
        weaker=weaker_for(settings["guidance"], opening),
        **asked,
    )
    return request, settings
