"""`sfumato outpaint`: a picture in, a larger one out, with every pixel of the first as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.cli._common import parse
from sfumato.cli._task import TaskOptions, run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.sampling import Request


@dataclass(frozen=True)
class Outpaint(TaskOptions):
    """Makes a picture larger at any side."""

    left: int = 0
    """Pixels to add at the left."""
    right: int = 0
    """Pixels to add at the right."""
    top: int = 0
    """Pixels to add above."""
    bottom: int = 0
    """Pixels to add below."""
    overlap: int = 0
    """Pixels of the picture beside what is added that may change too, blended in."""
    strength: float = 1.0
    """Below 1 the run begins with the picture's edge drawn out."""


def outpaint(arguments: Sequence[str]) -> None:
    """Makes a picture larger at any side; its own pixels stay as they are."""
    options = parse(Outpaint, arguments, "outpaint")
    own = {
        name: getattr(options, name)
        for name in ("left", "right", "top", "bottom", "overlap", "strength")
    }

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.outpaint import outpaint as task

        return task(model, picture, request, **own)

    run_task("outpaint", options, own, prepare)
