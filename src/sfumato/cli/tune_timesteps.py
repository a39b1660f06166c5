"""`sfumato tune-timesteps`: the best times for a number of steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sfumato.cli._names import check_names
from sfumato.cli._options import MODELS, ModelOptions, Seed, at_least, parse, unset
from sfumato.cli._output import Clock, progress
from sfumato.cli._run import set_threads
from sfumato.errors import UserError
from sfumato.io.paths import expand_user
from sfumato.validate import seed_number


@dataclass(frozen=True, kw_only=True)
class TuneTimesteps(ModelOptions):
    """Find the timesteps whose runs end nearest to a run of a thousand steps.

    Then `generate` uses them for that sampler and number of steps (spacing "tuned"). The table
    compares them with the fixed spacings, on images that the search did not use.
    """

    model: tyro.conf.Positional[str] = "fashion"
    """Bundled name, folder in the diffusers layout, single file or Hub id."""
    steps: tuple[int, ...] = (8,)
    """Number of steps, or several."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """Deterministic sampler, with options as in lms:order=3."""
    guidance: Annotated[str | None, unset(MODELS)] = None
    """Guidance scale; 0 to 1 is off."""
    prompts: Annotated[tuple[str, ...], unset("all classes in turn")] = ()
    """Prompts of the search."""
    images: int = 64
    """Number of images in the search; as many others judge the result."""
    reference_steps: int = 1000
    """Number of steps of the run that counts as exact."""
    iterations: int = 6
    """Rounds of the search: each costs about twice as many runs as there are steps."""
    seed: Seed = 0
    """Seed of the first image, or random."""
    out: Annotated[Path | None, unset("the model's own folder")] = None
    """New folder for a copy with the new timesteps; required unless MODEL is a folder."""
    overwrite: bool = False
    """Replace the model that --out names."""
    threads: Annotated[int | None, unset("all cores")] = None
    """Number of CPU threads."""


def tune_timesteps(arguments: Sequence[str]) -> None:
    """Find the best timesteps for a number of steps and store them with the model."""
    clock = Clock()
    options = parse(TuneTimesteps, arguments, "tune-timesteps")
    at_least(options, 2, "images", "steps")
    at_least(options, 0, "iterations")
    seed_number("--seed", options.seed, 2 * options.images)
    at_least(options, 1, "threads")
    at_least(options, 0, "clip_skip")
    check_names(options.sampler, None, options.guidance)
    if not options.steps:
        raise UserError("--steps is empty: expected one number of steps, or several")
    folder = expand_user(options.model)
    if options.out is None and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{options.model!r} is not a folder that can keep the times: "
            "add --out FOLDER for a copy of the model with them"
        )

    out = options.out
    taken = out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken and not options.overwrite:
        raise UserError(
            f"--out {out} exists and is left as it is: choose another name, "
            "or add --overwrite to replace the model there"
        )

    from rich.console import Console
    from rich.table import Table

    from sfumato.loading import bundled, load
    from sfumato.saving import check_target
    from sfumato.train.timestep_search import store_tuned, with_tuned
    from sfumato.train.timestep_search import tune_timesteps as search

    set_threads(options.threads)
    if options.out is None and options.model in bundled():
        raise UserError(
            f"{options.model!r} is the bundled model: write ./{options.model} for the folder of "
            "that name, or add --out FOLDER"
        )
    if options.out is not None:
        check_target(options.out)
    settings = {"sampler": options.sampler, "guidance": options.guidance}
    options.check_early(lambda model: model.settings(**settings), options.sampler)
    model = load(options.model, **options.reading(options.sampler))
    clock.lap("load")
    with progress("searching") as update:
        results = search(
            model,
            options.steps,
            sampler=options.sampler,
            guidance=options.guidance,
            prompts=options.prompts or None,
            images=options.images,
            seed=options.seed,
            reference_steps=options.reference_steps,
            iterations=options.iterations,
            progress=lambda stage, done, total: update(done, total),
        )
    clock.lap("search")
    run = f"{results[0].sampler}, guidance {results[0].guidance}"
    table = Table("spacing", title=f"distance to {options.reference_steps} steps, {run}")
    for tuned in results:
        table.add_column(f"{len(tuned.times) - 1} steps", justify="right")
    for name in results[0].errors:
        errors = (f"{tuned.errors[name]:.4f}" for tuned in results)
        table.add_row(name, *errors, style="bold" if name == "tuned" else None)
    Console().print(table)
    for tuned in results:
        print(f"{len(tuned.times) - 1} steps: {', '.join(f'{t:.4f}' for t in tuned.times)}")
    if options.out is not None:
        with_tuned(model, results).save(options.out)
    else:
        store_tuned(folder, results)
    print(options.out or folder)
    print(f"tuned in {clock}")
