"""`sfumato interpolate`: a series of images between two prompts, seeds or images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sfumato.cli._options import (
    MODELS,
    RunOptions,
    Seed,
    at_least,
    parse,
    recorded,
    refuse,
    unset,
)
from sfumato.cli._output import Clock, note_losses, read_image, short, slug
from sfumato.cli._run import check_options, run_request, source_parameters
from sfumato.errors import UserError
from sfumato.validate import seed_number

if TYPE_CHECKING:
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request

COLUMNS = 10
"""Series up to this long are one row."""


@dataclass(frozen=True, kw_only=True)
class Interpolate(RunOptions):
    """Generate a series of images from one prompt, seed or image to another."""

    prompt: tyro.conf.Positional[Annotated[str | None, unset("no prompt")]] = None
    """Prompt of the first image, or the name of a class."""
    to_prompt: tyro.conf.Positional[Annotated[str | None, unset("the same")]] = None
    """Prompt of the last image."""
    to_seed: Annotated[Seed | None, unset("the same")] = None
    """Seed of the last image; that of the first is --seed."""
    images: Annotated[tuple[Path, Path] | None, unset("none")] = None
    """Two images of one size, the ends of the series."""
    strength: Annotated[float | None, unset("0.6")] = None
    """With --images: share of the steps to run, in (0, 1]."""
    way: Annotated[str | None, unset("noise")] = None
    """With --images: noise (added to both) or inversion (the noise of both by ddim)."""
    n: int = 8
    """Number of images, with both ends."""
    height: Annotated[int | None, unset(MODELS)] = None
    """Height in pixels."""
    width: Annotated[int | None, unset(MODELS)] = None
    """Width in pixels."""
    grid: bool = True
    """One PNG with all images, instead of NAME-seedSEED-0.png, NAME-seedSEED-1.png, ..."""


def interpolate(arguments: Sequence[str]) -> None:
    """Generate a series of images from one prompt, seed or image to another."""
    clock, options = Clock(), parse(Interpolate, arguments, "interpolate")
    stem = short(options.images[0].stem) if options.images else slug(options.prompt)
    base = check_options(options, f"{stem}-interpolate-seed{options.seed}", by_seed=False)
    _check(options)
    ends = recorded(options, ("to_prompt", "to_seed"))
    own: dict[str, Any] = dict(ends)
    images = [read_image(path) for path in options.images or ()]
    way, strength = options.way or "noise", 0.6 if options.strength is None else options.strength
    if options.images:
        first, second = (source_parameters(path) for path in options.images)
        own |= {**first, **{f"to_{name}": value for name, value in second.items()}, "way": way}
        own |= {} if way == "inversion" else {"strength": strength}

    def prepare(model: "LatentDiffusion", request: "Request") -> "Request | Plan":
        from sfumato import tasks

        if not images:
            return tasks.interpolate(request, **ends)
        first, last = images
        settings = {"strength": strength, "way": way, **ends}
        plan = tasks.interpolate_images(model, first, last, request, **settings)
        for path, image in zip(options.images or (), images, strict=True):
            note_losses(path, image, grey=model.autoencoder.channels == 1)
        return plan

    columns = options.n if options.n <= COLUMNS else None
    run_request("interpolate", options, base, own, prepare, clock, columns)


def _check(options: Interpolate) -> None:
    """Check options before torch is imported."""
    at_least(options, 2, "n")
    at_least(options, 1, "height", "width")
    if options.to_seed is not None:
        seed_number("--to-seed", options.to_seed)
    if options.images is None:
        reason = " without --images: it is for a series between images"
        refuse(options, reason, "strength", "way")
        if options.to_prompt is None and options.to_seed is None:
            raise UserError(
                "nothing to go to: give a second prompt, --to-seed or --images FIRST SECOND"
            )
        return
    refuse(options, " with --images: the series has their size", "height", "width")
    if options.way == "inversion":
        refuse(options, " with --way inversion: all steps are run; leave it away", "strength")
