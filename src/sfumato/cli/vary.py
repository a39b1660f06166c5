"""`sfumato vary`: an image in, variations of it out."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.cli._options import TaskOptions, parse
from sfumato.cli._run import run_task


@dataclass(frozen=True, kw_only=True)
class Vary(TaskOptions):
    """Generate variations of an image."""

    task = "variations"

    n: int = 4
    """Number of images. Image k differs by the noise of seed + k."""
    strength: float = 0.3
    """Difference from the image, up to 1: small numbers keep nearly everything."""
    way: str = "noise"
    """noise: add noise to the image; inversion: change the noise from which ddim draws it."""
    grid: bool = True
    """One PNG with all images, instead of one an image (NAME-seed0.png, NAME-seed1.png, ...)."""


def vary(arguments: Sequence[str]) -> None:
    """Generate variations of an image; one number sets the difference."""
    run_task(parse(Vary, arguments, "vary"))
