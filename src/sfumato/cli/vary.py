"""`sfumato vary`: a picture in, pictures like it out; one number says how different. (Of a seed's
picture: `generate --variation-strength`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.cli._common import parse
from sfumato.cli._task import TaskOptions, run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.sampling import Request


@dataclass(frozen=True, kw_only=True)
class Vary(TaskOptions):
    """Makes pictures like a given one."""

    n: int = 4
    """How many pictures. Picture k differs by the noise of seed + k."""
    strength: float = 0.3
    """How different: small numbers keep nearly everything, 1 keeps nothing."""
    way: str = "noise"
    """noise: begin with the picture made noisy; inversion: change the noise that ddim makes the
    picture from."""
    grid: bool = True
    """One PNG with all pictures, instead of one PNG a picture (NAME-0.png, NAME-1.png, ...)."""


def vary(arguments: Sequence[str]) -> None:
    """Makes pictures like a given one; one number says how different."""
    options = parse(Vary, arguments, "vary")

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.variations import variations

        return variations(model, picture, request, strength=options.strength, way=options.way)

    run_task("vary", options, {"strength": options.strength, "way": options.way}, prepare)
