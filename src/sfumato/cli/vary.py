"""`sfumato vary`: an image in, variations of it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.cli._options import TaskOptions, parse
from sfumato.cli._run import run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


@dataclass(frozen=True, kw_only=True)
class Vary(TaskOptions):
    """Generate variations of an image."""

    n: int = 4
    """Number of images. Image k differs by the noise of seed + k."""
    strength: float = 0.3
    """Difference from the image: small numbers keep nearly everything, 1 keeps nothing."""
    way: str = "noise"
    """noise: begin with the image made noisy; inversion: change the noise that ddim makes the image
    from."""
    grid: bool = True
    """One PNG with all images, instead of one PNG an image (NAME-0.png, NAME-1.png, ...)."""


def vary(arguments: Sequence[str]) -> None:
    """Generate variations of an image; one number sets the difference."""
    options = parse(Vary, arguments, "vary")

    def prepare(model: "LatentDiffusion", image: "Image", request: "Request") -> "Plan":
        from sfumato import tasks

        return tasks.variations(model, image, request, strength=options.strength, way=options.way)

    run_task("vary", options, {"strength": options.strength, "way": options.way}, prepare)
