"""`sfumato interpolate`: a series of pictures from one prompt, seed or picture to another, in one
PNG, a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sfumato.cli._common import MODELS, at_least, parse, unset
from sfumato.cli._files import slug
from sfumato.cli._task import RunOptions, checked, make, read_picture, remembered
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.sampling import Request

COLUMNS = 10
"""Series up to this long are one row."""


@dataclass(frozen=True, kw_only=True)
class Interpolate(RunOptions):
    """Draws a series of pictures from one prompt, seed or picture to another, or several of these
    at once.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, unset("no words")]] = None
    """What the series begins with: words, or the name of a class."""
    to_prompt: tyro.conf.Positional[Annotated[str | None, unset("the same")]] = None
    """What it ends with."""
    to_seed: Annotated[int | None, unset("the same")] = None
    """The seed that it ends with; it begins with --seed."""
    pictures: Annotated[tuple[Path, Path] | None, unset("none")] = None
    """Two pictures of one size, to go from the first to the second."""
    strength: Annotated[float | None, unset("0.6")] = None
    """With --pictures: how much of each is made anew, from above 0 to 1."""
    way: Annotated[str | None, unset("noise")] = None
    """With --pictures: noise, begin between both made noisy; inversion, between the noises that
    ddim makes them from."""
    n: int = 8
    """How many pictures, with both ends."""
    height: Annotated[int | None, unset(MODELS)] = None
    """In pixels."""
    width: Annotated[int | None, unset(MODELS)] = None
    """In pixels."""
    grid: bool = True
    """One PNG with all pictures, instead of one PNG a picture (NAME-0.png, NAME-1.png, ...)."""


def interpolate(arguments: Sequence[str]) -> None:
    """Draws a series of pictures from one prompt, seed or picture to another."""
    options = parse(Interpolate, arguments, "interpolate")
    base = checked(
        options,
        f"{options.pictures[0].stem if options.pictures else slug(options.prompt)}-interpolate",
    )
    _check(options)
    ends = {
        name: value
        for name in ("to_prompt", "to_seed")
        if (value := getattr(options, name)) is not None
    }
    own: dict[str, Any] = dict(ends)
    pictures = [read_picture(path) for path in options.pictures or ()]
    way, strength = options.way or "noise", 0.6 if options.strength is None else options.strength
    if options.pictures:
        first, second = (remembered(path) for path in options.pictures)
        own |= {**first, **{f"to_{name}": value for name, value in second.items()}, "way": way}
        own |= {} if way == "inversion" else {"strength": strength}

    def prepare(model: Any, request: "Request") -> "Request":
        from dataclasses import replace

        from sfumato.tasks import interpolate as tasks

        if pictures:
            return tasks.interpolate_pictures(
                model, pictures[0], pictures[1], request, strength=strength, way=way, **ends
            )
        return tasks.interpolate(
            replace(request, height=options.height, width=options.width), **ends
        )

    make(
        "interpolate",
        options,
        base,
        own,
        options.prompt,
        prepare,
        columns=options.n if options.n <= COLUMNS else None,
    )


def _check(options: Interpolate) -> None:
    """What can be refused before torch is imported."""
    at_least(2, n=options.n)
    at_least(1, height=options.height, width=options.width)
    at_least(0, to_seed=options.to_seed)
    if options.pictures is None:
        for flag, value in (("--strength", options.strength), ("--way", options.way)):
            if value is not None:
                raise UserError(
                    f"{flag} {value} without --pictures: it says how a series between pictures is drawn"
                )
        if options.to_prompt is None and options.to_seed is None:
            raise UserError(
                "nothing to go to: give a second prompt, --to-seed or --pictures FIRST SECOND"
            )
        return
    for flag, value in (("--height", options.height), ("--width", options.width)):
        if value is not None:
            raise UserError(f"{flag} {value} with --pictures: the series has their size")
    if options.way == "inversion" and options.strength is not None:
        raise UserError(
            f"--strength {options.strength} with --way inversion: all steps are run; leave it away"
        )
