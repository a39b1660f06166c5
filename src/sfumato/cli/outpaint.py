"""`sfumato outpaint`: an image in, a larger one with the same pixels inside out."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.cli._options import TaskOptions, parse
from sfumato.cli._run import run_task


@dataclass(frozen=True)
class Outpaint(TaskOptions):
    """Enlarge an image at any side."""

    task = "outpaint"

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
    """Share of the steps to run, in (0, 1]. Below 1 the start is the repeated edge."""

    @property
    def keeps_original(self) -> bool:
        """True where the image's pixels are copied into a PNG of their own."""
        return not self.grid


def outpaint(arguments: Sequence[str]) -> None:
    """Enlarge an image at any side; its own pixels stay as they are."""
    run_task(parse(Outpaint, arguments, "outpaint"))
