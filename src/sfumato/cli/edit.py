"""`sfumato edit`: a picture and words in, the picture changed by them out.

A model that takes a picture beside the latent follows instructions ("make it winter"); any other begins with the picture, made noisy, and
follows a description ("a house in winter", "an oil painting of a house"): what style transfer is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.cli._common import parse, unset
from sfumato.cli._task import TaskOptions, run_task
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.sampling import Request


@dataclass(frozen=True)
class Edit(TaskOptions):
    """Changes a picture by words: image to image, or by instruction where the model was trained for it."""

    strength: Annotated[float | None, unset("0.8")] = None
    """Image to image: how much is made anew, from above 0 (the picture) to 1 (next to nothing of it)."""
    picture_guidance: Annotated[float | None, unset("1.5")] = None
    """By instruction: how strongly to keep to the picture; 1 is off."""


def edit(arguments: Sequence[str]) -> None:
    """Changes a picture by words: image to image, or an instruction where the model takes them."""
    options = parse(Edit, arguments, "edit")
    strength = 0.8 if options.strength is None else options.strength
    scale = 1.5 if options.picture_guidance is None else options.picture_guidance

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks._pictures import extra_channels
        from sfumato.tasks.edit import edit as by_instruction
        from sfumato.tasks.image_to_image import image_to_image

        if extra_channels(model) == model.autoencoder.space.channels:
            if options.strength is not None:
                raise UserError(
                    f"--strength {strength}: this model follows instructions, from pure noise; --picture-guidance keeps to the picture"
                )
            return by_instruction(model, picture, request, picture_guidance=scale)
        if options.picture_guidance is not None:
            raise UserError(
                f"--picture-guidance {scale}: this model was not trained for instructions; --strength says how much is made anew"
            )
        return image_to_image(model, picture, request, strength=strength)

    run_task("edit", options, {"strength": strength, "picture_guidance": scale}, prepare)
