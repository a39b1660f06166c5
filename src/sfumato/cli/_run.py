"""The run of a task command: open the model, plan, sample, write PNG files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli._options import RunOptions, TaskOptions, at_least, recorded
from sfumato.cli._output import (
    Clock,
    provenance,
    read_image,
    sampling_progress,
    target,
    write_images,
)

if TYPE_CHECKING:
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


def run_task(options: TaskOptions) -> None:
    """Run a task on an image and write the result; the command is called as its class."""
    clock, name = Clock(), type(options).__name__.lower()
    base = check_options(options, f"{options.image.stem}-{name}")
    image, own = read_image(options.image), source_parameters(options.image)
    settings = options.settings()
    for key, value in settings.items():
        if isinstance(value, Path):
            own[key], settings[key] = str(value), read_image(value)
        elif isinstance(value, tuple):  # of paths
            own |= {key: list(map(str, value))} if value else {}
            settings[key] = [read_image(path) for path in value]
        else:
            own[key] = value
    run_request(
        name,
        options,
        base,
        own,
        lambda model, request: options.plan(model, image, request, settings),
        clock,
    )


def check_options(options: RunOptions, name: str) -> Path:
    """Check options before torch is imported.

    Returns:
        The PNG to write.

    Raises:
        UserError: For a number below the least, a memory limit that is no size, or a place that
            cannot be written to.
    """
    from sfumato.io.host_memory import parse_size

    at_least(options, 1, "n", "steps", "threads")
    at_least(options, 0, "seed")
    if options.memory is not None:
        parse_size(options.memory)
    return target(options.out, name)


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
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif isinstance(previous, int) and 0 < previous <= (os.cpu_count() or 1):
        torch.set_num_threads(previous)


def run_request(
    name: str,
    options: RunOptions,
    base: Path,
    own: dict[str, Any],
    prepare: Callable[["LatentDiffusion", "Request"], "Request | Plan"],
    clock: Clock,
    columns: int | None = None,
) -> None:
    """Run the plan that `prepare` makes of the options' plain request, and write its images.

    Args:
        name: Name of the command.
        options: Options of the command line.
        base: The PNG to write.
        own: The command's own settings, recorded in the PNG files.
        prepare: Model and plain request -> request or plan.
        clock: Started with the command, before images are read.
        columns: Columns of the grid; None: square.
    """
    set_threads(options.threads)
    clock.lap("import")
    model = options.load_for_sampling(options.model, options.steps, options.transformer)
    clock.lap("load")
    request = options.request(model)
    # The settings of the plain request: a task may run another sampler, or other guidance.
    names = ("n", "steps", "sampler", "spacing", "guidance", "distilled_guidance")
    settings = model.settings(**{name: getattr(request, name) for name in names})
    plan = prepare(model, request)
    with sampling_progress(name, clock) as on_step:
        images = model.run(plan, on_step=on_step)
    clock.lap("decode")
    optional = ("prompt_2", "negative_prompt_2", "transformer", "dtype", "device")
    parameters = {
        "task": name,
        "prompt": request.prompt,
        "negative_prompt": options.negative_prompt,
        **recorded(options, optional),
        "seed": options.seed,
        **settings,
        "height": images[0].height,
        "width": images[0].width,
        **own,
        **provenance(options.model, model),
    }
    report_written(write_images(base, images, parameters, options.grid, columns), images, clock)


def report_written(written: list[Path], images: list[Any], clock: Clock) -> None:
    """Print the files written and the time spent."""
    clock.lap("write")
    for path in written:
        print(path)
    print(f"{len(images)} image{'s' if len(images) > 1 else ''} in {clock}")
