"""`sfumato edit`: a picture and words in, the picture changed by them out.

A model that reads pictures (InstructPix2Pix, FLUX.1 Kontext, FLUX.2) follows instructions ("make it
winter"); any other begins with the picture, made noisy, and follows a description ("a house in
winter", "an oil painting of a house"): what style transfer is.
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
class Edit(TaskOptions):
    """Changes a picture by words: image to image, or by instruction where the model was trained for
    it.
    """

    strength: Annotated[float | None, unset("0.8")] = None
    """Image to image: how much is made anew, from above 0 (the picture) to 1 (next to nothing of
    it)."""
    picture_guidance: Annotated[float | None, unset("1.5")] = None
    """By instruction (InstructPix2Pix): how strongly to keep to the picture; 1 is off."""
    also: tuple[Path, ...] = ()
    """More pictures to read, for models that read several (FLUX.2)."""


def edit(arguments: Sequence[str]) -> None:
    """Changes a picture by words: image to image, or an instruction where the model takes them."""
    options = parse(Edit, arguments, "edit")
    strength = 0.8 if options.strength is None else options.strength
    scale = 1.5 if options.picture_guidance is None else options.picture_guidance

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.edit import edit as by_instruction
        from sfumato.tasks.edit import kind_of_edit
        from sfumato.tasks.image_to_image import image_to_image

        kind, also = kind_of_edit(model), [read_picture(path) for path in options.also]
        if kind is not None:
            if options.strength is not None:
                raise UserError(
                    f"--strength {strength}: this model follows instructions, from pure noise; --picture-guidance keeps to the picture"
                )
            if options.picture_guidance is not None and kind == "reference":
                raise UserError(f"--picture-guidance {scale}: this model has one scale, --guidance")
            return by_instruction(model, picture, request, picture_guidance=scale, also=also)
        if also:
            raise UserError(
                f"--also {options.also[0]}: this model does not read pictures; give one picture, which it begins with"
            )
        if options.picture_guidance is not None:
            raise UserError(
                f"--picture-guidance {scale}: this model was not trained for instructions; --strength says how much is made anew"
            )
        return image_to_image(model, picture, request, strength=strength)

    own = {"strength": strength, "picture_guidance": scale} | (
        {"also": [str(path) for path in options.also]} if options.also else {}
    )
    run_task("edit", options, own, prepare)
