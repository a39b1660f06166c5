"""`sfumato edit`: a picture and words in, the picture changed by them out.

A model that takes a picture beside the latent follows instructions ("make it winter"); any other begins with the picture, made noisy, and
follows a description ("a house in winter").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.cli._common import parse
from sfumato.cli._task import TaskOptions, run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.sampling import Request


@dataclass(frozen=True)
class Edit(TaskOptions):
    """Changes a picture by words: image to image, or by instruction where the model was trained for it."""

    strength: float = 0.8
    """Image to image: how much is made anew, from above 0 (the picture) to 1 (next to nothing of it)."""
    picture_guidance: float = 1.5
    """By instruction: how strongly to keep to the picture; 1 is off."""


def edit(arguments: Sequence[str]) -> None:
    """Changes a picture by words: image to image, or an instruction where the model takes them."""
    options = parse(Edit, arguments, "edit")

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks._pictures import extra_channels
        from sfumato.tasks.edit import edit as by_instruction
        from sfumato.tasks.image_to_image import image_to_image

        if extra_channels(model) == model.autoencoder.space.channels:
            return by_instruction(model, picture, request, picture_guidance=options.picture_guidance)
        return image_to_image(model, picture, request, strength=options.strength)

    run_task("edit", options, {"strength": options.strength, "picture_guidance": options.picture_guidance}, prepare)
