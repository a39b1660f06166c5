"""`sfumato edit`: an image and a prompt in, the edited image out.

A model that reads images (InstructPix2Pix, FLUX.1 Kontext, FLUX.2) follows instructions ("make it
winter"). Any other begins with the image, made noisy, and follows a description ("a house in
winter", "an oil painting of a house"): style transfer.
"""

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
class Edit(TaskOptions):
    """Edit an image by a prompt: image to image, or by instruction."""

    strength: Annotated[float | None, unset("0.8")] = None
    """Image to image: share of the steps that are run, from above 0 (the image) to 1 (next to
    nothing of it)."""
    image_guidance: Annotated[float | None, unset("1.5")] = None
    """Instructions (InstructPix2Pix): guidance scale towards the image; 1 is off."""
    also: tuple[Path, ...] = ()
    """More images to read, for models that read several (FLUX.2)."""


def edit(arguments: Sequence[str]) -> None:
    """Edit an image by a prompt: image to image, or an instruction where the model takes them."""
    options = parse(Edit, arguments, "edit")
    strength = 0.8 if options.strength is None else options.strength
    scale = 1.5 if options.image_guidance is None else options.image_guidance

    def prepare(model: "LatentDiffusion", image: "Image", request: "Request") -> "Plan":
        from sfumato import tasks
        from sfumato.tasks.edit import kind_of_edit

        kind, also = kind_of_edit(model), [read_picture(path) for path in options.also]
        if kind is not None:
            if options.strength is not None:
                raise UserError(
                    f"--strength {strength}: this model follows instructions, from pure noise; --image-guidance keeps to the picture"
                )
            if options.image_guidance is not None and kind == "reference":
                raise UserError(f"--image-guidance {scale}: this model has one scale, --guidance")
            return tasks.edit(model, image, request, image_guidance=scale, also=also)
        if also:
            raise UserError(
                f"--also {options.also[0]}: this model does not read pictures; give one picture, which it begins with"
            )
        if options.image_guidance is not None:
            raise UserError(
                f"--image-guidance {scale}: this model was not trained for instructions; --strength sets how much is drawn anew"
            )
        return tasks.image_to_image(model, image, request, strength=strength)

    own = {"strength": strength, "image_guidance": scale} | (
        {"also": [str(path) for path in options.also]} if options.also else {}
    )
    run_task("edit", options, own, prepare)
