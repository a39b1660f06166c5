"""`sfumato control`: a map in (edges, depth, a pose), images that follow it out."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.cli._options import TaskOptions, parse
from sfumato.cli._run import run_task


@dataclass(frozen=True)
class Control(TaskOptions):
    """Generate images that follow a map, with a model trained for such maps."""

    task = "control"


def control(arguments: Sequence[str]) -> None:
    """Generate images that follow a map of edges, depth or the like."""
    run_task(parse(Control, arguments, "control"))
