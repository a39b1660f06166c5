"""`sfumato inpaint`: a picture and a mask in; what is white in the mask is drawn anew, every other
pixel stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.cli._common import parse, unset
from sfumato.cli._task import TaskOptions, read_picture, run_task
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.sampling import Request


@dataclass(frozen=True)
class Inpaint(TaskOptions):
    """Draws a part of a picture anew."""

    mask: Annotated[Path | None, unset("required")] = None
    """A picture of the same size: white is drawn anew, black stays, grey is blended."""
    strength: float = 1.0
    """Below 1 the run begins with what is under the mask, too."""
    paste: bool = True
    """Put the pixels outside of the mask back as they were; otherwise they go through the
    autoencoder."""


def inpaint(arguments: Sequence[str]) -> None:
    """Draws the white part of a mask anew; the other pixels of the picture stay as they are."""
    options = parse(Inpaint, arguments, "inpaint")
    if options.mask is None:
        raise UserError("inpaint needs --mask PICTURE: white is drawn anew, black stays")
    mask = read_picture(options.mask)

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.inpaint import inpaint as task

        return task(model, picture, mask, request, strength=options.strength, paste=options.paste)

    run_task(
        "inpaint",
        options,
        {"mask": str(options.mask), "strength": options.strength, "paste": options.paste},
        prepare,
    )
