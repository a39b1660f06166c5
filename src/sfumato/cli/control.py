"""`sfumato control`: a map in (edges, depth, a pose), images that follow it out."""

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
class Control(TaskOptions):
    """Generate images that follow a map, by a model trained for such maps."""


def control(arguments: Sequence[str]) -> None:
    """Generate images that follow a map of edges, depth or the like."""

    def prepare(model: "LatentDiffusion", image: "Image", request: "Request") -> "Plan":
        from sfumato import tasks

        return tasks.control(model, image, request)

    run_task("control", parse(Control, arguments, "control"), {}, prepare)
