"""`sfumato data SET`: build a set of images from public packages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sfumato.cli._options import at_least, parse, unset
from sfumato.cli._output import Clock, log_to_stderr
from sfumato.errors import UserError, unknown
from sfumato.registry import find, names

SETS = "data.sets"


@dataclass(frozen=True)
class Data:
    """Build a set of images from public packages, ready for `sfumato train`.

    `icons` is some 7,100 colour drawings with captions: emoji, 3-D emoji and clip art, under
    Apache-2.0, MIT, and in the public domain. Their licence is recorded with each.
    """

    set: tyro.conf.Positional[str]
    """Name of the set: icons."""
    out: Annotated[Path | None, unset("data/SET")] = None
    """Folder of the set, with train.parquet and test.parquet."""
    size: int = 128
    """Side of the images in pixels, 32 to 512."""
    packages: Annotated[Path | None, unset("~/.cache/sfumato/packages")] = None
    """Folder of the packages, downloaded or brought by hand."""
    limit: Annotated[int | None, unset("all")] = None
    """Take so many images of each source."""
    overwrite: bool = False
    """Replace a set that is there."""


def data(arguments: Sequence[str]) -> None:
    """Build a set of images with captions from public packages."""
    clock = Clock()
    options = parse(Data, arguments, "data")
    if options.set not in names(SETS):
        raise unknown("set", options.set, names(SETS))
    at_least(options, 1, "limit")
    out = options.out or Path("data") / options.set
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} exists: choose another place with --out, or add --overwrite")

    from sfumato.train.bars import Bars

    log_to_stderr()
    with Bars():
        counts = find(SETS, options.set)(out, options.size, options.packages, options.limit)
    for name, count in counts.items():
        print(f"{count:6d}  {name}")
    clock.lap("build")
    print(f"{out} in {clock}")
