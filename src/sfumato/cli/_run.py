"""The run of a task command: open the model, plan, sample, write PNG files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli._names import check_names, check_words
from sfumato.cli._options import READING, RunOptions, TaskOptions, at_least, recorded
from sfumato.cli._output import (
    Clock,
    Target,
    note_losses,
    provenance,
    read_image,
    sampling_progress,
    short,
    target,
    write_images,
)
from sfumato.errors import UserError
from sfumato.validate import image_count, number_in, one_of, seed_number, step_count

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request

MOST_THREADS = 4096


def run_task(options: TaskOptions) -> None:
    """Run a task on an image and write the result; the command is called as its class."""
    clock, name = Clock(), type(options).__name__.lower()
    base = check_options(options, f"{short(options.image.stem)}-{name}")
    image, own = read_image(options.image), source_parameters(options.image)
    settings, inputs = options.settings(), [(options.image, image)]
    masks: "list[tuple[Path, Image]]" = []
    for key, value in settings.items():
        if isinstance(value, Path):
            own[key], settings[key] = str(value), read_image(value)
            masks.append((value, settings[key]))
        elif isinstance(value, tuple):  # of paths
            own |= {key: list(map(str, value))} if value else {}
            settings[key] = [read_image(path) for path in value]
            inputs += zip(value, settings[key], strict=True)
        else:
            own[key] = value

    def prepare(model: "LatentDiffusion", request: "Request") -> "Plan":
        plan = options.plan(model, image, request, dict(settings))
        for path, opened in inputs:
            note_losses(path, opened, options.keeps_original, model.autoencoder.channels == 1)
        for path, opened in masks:
            note_losses(path, opened, mask=True)
        return plan

    run_request(name, options, base, own, prepare, clock)


def check_options(
    options: RunOptions, name: str, numbered: bool = False, by_seed: bool = True
) -> Target:
    """Check options before torch is imported.

    Args:
        options: The options.
        name: Name of the files that --out does not name.
        numbered: Whether a single file of --out gets a number too.
        by_seed: Whether images have the seeds seed, seed + 1, ..., for the names of their files.

    Returns:
        The names of the PNG files to write.

    Raises:
        UserError: For a number below the least, a memory limit that is no size, a name of --out
            that is taken, or a place that cannot be written to.
    """
    from sfumato.io.host_memory import parse_size

    at_least(options, 1, "n", "steps", "threads", "batch")
    at_least(options, 0, "clip_skip")
    check_names(options.sampler, options.spacing, options.guidance)
    if (way := vars(options).get("way")) is not None:
        one_of("way", way, ("noise", "inversion"))
    if (strength := vars(options).get("strength")) is not None:
        if way == "inversion":  # 0 is the image again
            number_in("strength", strength, 0, 1)
        else:
            number_in("strength", strength, at_most=1, above=0)
    n = options.n if isinstance(options.n, int) else 1
    image_count("--n", n)
    if isinstance(steps := vars(options).get("steps"), int):
        step_count("--steps", steps)
    seed_number("--seed", options.seed, n if by_seed else 1)
    if options.memory is not None:
        parse_size(options.memory)
    several = not options.grid and (numbered or n > 1)
    base = target(options.out, name, options.overwrite, options.seed if by_seed else None)
    base.files(n, several)
    return base


def check_prompts(model: "LatentDiffusion", request: "Request") -> None:
    """Raise `UserError` for a prompt that the model's conditioner cannot read."""
    from sfumato.sampling.plan import check_second_encoder
    from sfumato.types import ImageSpec

    size = ImageSpec(model.sample_size, model.sample_size)
    conditioner = model.conditioner.with_prompt_weights(request.prompt_weights)
    for name, text, second in (
        ("prompt", request.prompt, request.prompt_2),
        ("negative_prompt", request.negative_prompt, request.negative_prompt_2),
    ):
        if second is not None:
            check_second_encoder(model, name, second)
        if isinstance(text, str):
            conditioner.check([text], size, [second] if isinstance(second, str) else None)


def source_parameters(image: Path) -> dict[str, Any]:
    """Parameters of a PNG about the image that it was made from."""
    from sfumato.io.atomic import hash_bytes

    return {"picture": str(image), "picture_hash": hash_bytes(image.read_bytes())}


def set_threads(threads: int | None, previous: Any = None) -> None:
    """Set the number of CPU threads.

    Args:
        threads: Value of --threads.
        previous: Number that a PNG was made with, used if this machine has as many: sums may be
            split by threads.

    Raises:
        UserError: For more threads than any machine has.
    """
    if threads is not None and threads > MOST_THREADS:
        raise UserError(f"--threads {threads} is too large: expected at most {MOST_THREADS}")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif isinstance(previous, int) and 0 < previous <= (os.cpu_count() or 1):
        torch.set_num_threads(previous)


def run_request(
    name: str,
    options: RunOptions,
    base: Target,
    own: dict[str, Any],
    prepare: Callable[["LatentDiffusion", "Request"], "Request | Plan"],
    clock: Clock,
    columns: int | None = None,
) -> None:
    """Run the plan that `prepare` makes of the options' plain request, and write its images.

    Args:
        name: Name of the command.
        options: Options of the command line.
        base: The names of the PNG files to write.
        own: The command's own settings, recorded in the PNG files.
        prepare: Model and plain request -> request or plan.
        clock: Started with the command, before images are read.
        columns: Columns of the grid; None: square.
    """
    from sfumato.sampling import Plan

    # The settings of the plain request: a task may run another sampler, or other guidance.
    names = ("n", "steps", "sampler", "spacing", "guidance", "distilled_guidance", "prompt_weights")

    def check(model: "LatentDiffusion") -> None:
        request = options.request(model, early=True)
        model.settings(**{name: getattr(request, name) for name in names})
        check_prompts(model, request)

    check_words(options)
    set_threads(options.threads)
    clock.lap("import")
    options.check_early(check, options.sampler)
    model, packed = options.load_for_sampling(options.steps)
    clock.lap("load")
    request = options.request(model)
    settings = model.settings(**{name: getattr(request, name) for name in names})
    plan = prepare(model, request)
    plan = model.fitted(plan if isinstance(plan, Plan) else model.plan(plan))
    with sampling_progress(name, clock) as on_step:
        images = model.run(plan, on_step=on_step, batch=options.batch)
    clock.lap("decode")
    optional = ("prompt_2", "negative_prompt_2", *READING, "dtype", "device", "batch")
    parameters = {
        "task": name,
        "prompt": request.prompt,
        "negative_prompt": options.negative_prompt,
        **recorded(options, optional),
        "seed": options.seed,
        **settings,
        "height": images[0].height,
        "width": images[0].width,
        "decoding": plan.request.decoding,
        "packed": packed,
        **own,
        **provenance(options.model, model),
    }
    written = write_images(base, images, parameters, options.grid, columns)
    report_written(written, len(images), options.seed, clock)


def report_written(written: list[Path], count: int, seed: int, clock: Clock) -> None:
    """Print the files written, the seed of the first image and the time spent."""
    clock.lap("write")
    for path in written:
        print(path)
    print(f"{count} image{'s' if count > 1 else ''} from seed {seed} in {clock}")
