"""`sfumato control`: a map in (edges, depth, a pose), pictures that follow it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.cli._common import parse
from sfumato.cli._task import TaskOptions, run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.sampling import Request


@dataclass(frozen=True)
class Control(TaskOptions):
    """Draws pictures that follow a map of edges, depth or the like; for models that were trained
    for such maps.
    """


def control(arguments: Sequence[str]) -> None:
    """Draws pictures that follow a map of edges, depth or the like."""

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.control import control as task

        return task(model, picture, request)

    run_task("control", parse(Control, arguments, "control"), {}, prepare)
