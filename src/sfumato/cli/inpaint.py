"""`sfumato inpaint`: an image and a mask in; the white part of the mask is drawn anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sfumato.cli._options import TaskOptions, parse, unset
from sfumato.cli._output import read_picture
from sfumato.cli._run import run_task
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


@dataclass(frozen=True)
class Inpaint(TaskOptions):
    """Draw a part of an image anew."""

    mask: Annotated[Path | None, unset("required")] = None
    """Image of the same size: white is drawn anew, black stays, grey is blended."""
    strength: float = 1.0
    """Share of the steps that are run. Below 1 the run begins with the image under the mask,
    too."""
    paste: bool = True
    """Put the pixels outside of the mask back as they were; otherwise they go through the
    autoencoder."""


def inpaint(arguments: Sequence[str]) -> None:
    """Draw the white part of a mask anew; the other pixels of the image stay as they are."""
    options = parse(Inpaint, arguments, "inpaint")
    if options.mask is None:
        raise UserError("inpaint needs --mask PICTURE: white is drawn anew, black stays")
    mask = read_picture(options.mask)

    def prepare(model: "LatentDiffusion", image: "Image", request: "Request") -> "Plan":
        from sfumato import tasks

        return tasks.inpaint(
            model, image, mask, request, strength=options.strength, paste=options.paste
        )

    run_task(
        "inpaint",
        options,
        {"mask": str(options.mask), "strength": options.strength, "paste": options.paste},
        prepare,
    )
