"""The run of a task command: open the model, plan, sample, write PNG files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli._options import RunOptions, TaskOptions, at_least, load_guide_model
from sfumato.cli._output import Clock, progress, provenance, read_picture, target, write_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.diffuse.run import Step
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


def run_task(
    name: str,
    options: TaskOptions,
    own: dict[str, Any],
    prepare: Callable[["LatentDiffusion", "Image", "Request"], "Plan"],
) -> None:
    """Run a task on an image and write the result.

    Args:
        name: of the command
        options: of the command line
        own: the task's own settings, recorded in the PNG files
        prepare: model, image and plain request -> plan
    """
    base = check_options(options, f"{options.picture.stem}-{name}")
    image = read_picture(options.picture)
    parameters = source_parameters(options.picture) | own
    run_request(
        name,
        options,
        base,
        parameters,
        options.prompt,
        lambda model, request: prepare(model, image, request),
    )


def check_options(options: RunOptions, name: str) -> Path:
    """Check options before torch is imported.

    Returns:
        the PNG to write

    Raises:
        UserError: a number below the least
    """
    at_least(1, n=options.n, steps=options.steps, threads=options.threads)
    at_least(0, seed=options.seed)
    return target(options.out, name)


def source_parameters(picture: Path) -> dict[str, Any]:
    """Parameters of a PNG about the image that it was made from."""
    from sfumato.io.atomic import hash_bytes

    return {"picture": str(picture), "picture_hash": hash_bytes(picture.read_bytes())}


def set_threads(threads: int | None, recorded: Any = None) -> None:
    """Set the number of CPU threads.

    Args:
        threads: value of --threads
        recorded: number that a PNG was made with, used where this machine has as many: sums may be
            split by threads
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif isinstance(recorded, int) and 0 < recorded <= (os.cpu_count() or 1):
        torch.set_num_threads(recorded)


def run_request(
    name: str,
    options: RunOptions,
    base: Path,
    own: dict[str, Any],
    prompt: str | None,
    prepare: Callable[["LatentDiffusion", "Request"], "Request | Plan"],
    columns: int | None = None,
) -> None:
    """Run the plan that `prepare` makes of the options' plain request, and write its images.

    Args:
        name: of the command
        options: of the command line
        base: the PNG to write
        own: the command's own settings, recorded in the PNG files
        prompt: of the request
        prepare: model and plain request -> request or plan
        columns: of the grid; None: square
    """
    clock = Clock()
    from sfumato.sampling import Request

    opening = options.load_options()
    set_threads(options.threads)
    clock.lap("import")
    model = opening.ready(options.model, options.steps)
    clock.lap("load")
    values = options.request_fields()
    # The settings as they are asked for: a task may run another sampler, or other guidance.
    names = ("n", "steps", "sampler", "spacing", "guidance", "distilled_guidance")
    settings = model.settings(**{key: values[key] for key in names})
    plan = prepare(
        model,
        Request(prompt, guide_model=load_guide_model(settings["guidance"], opening), **values),
    )
    with progress(name) as update:

        def on_step(step: "Step") -> None:
            clock.lap("sample")
            update(step.index + 1, step.count)

        images = model.run(plan, on_step=on_step)
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
        "height": images[0].height,
        "width": images[0].width,
        **own,
        **provenance(options.model, model),
    }
    written = write_images(base, images, parameters, options.grid, columns)
    clock.lap("write")
    report_written(written, len(images), clock)


def report_written(written: list[Path], count: int, clock: Clock) -> None:
    """Print the files written and the time spent."""
    for path in written:
        print(path)
    print(f"{count} picture{'s' if count > 1 else ''} in {clock}")
