"""`sfumato outpaint`: an image in, a larger one with the same pixels inside out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.cli._options import TaskOptions, parse
from sfumato.cli._run import run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


@dataclass(frozen=True)
class Outpaint(TaskOptions):
    """Enlarge an image at any side."""

    left: int = 0
    """Pixels to add at the left."""
    right: int = 0
    """Pixels to add at the right."""
    top: int = 0
    """Pixels to add above."""
    bottom: int = 0
    """Pixels to add below."""
    overlap: int = 0
    """Pixels of the image beside the added ones that may change too, blended in."""
    strength: float = 1.0
    """Share of the steps that are run. Below 1 the run begins with the image's edge, repeated."""


def outpaint(arguments: Sequence[str]) -> None:
    """Enlarge an image at any side; its own pixels stay as they are."""
    options = parse(Outpaint, arguments, "outpaint")
    own = {
        name: getattr(options, name)
        for name in ("left", "right", "top", "bottom", "overlap", "strength")
    }

    def prepare(model: "LatentDiffusion", image: "Image", request: "Request") -> "Plan":
        from sfumato import tasks

        return tasks.outpaint(model, image, request, **own)

    run_task("outpaint", options, own, prepare)
