"""`sfumato edit`: an image and a prompt in, the edited image out.

A model that takes images (InstructPix2Pix, FLUX.1 Kontext, FLUX.2) follows instructions ("make it
winter"). Any other starts from the image with noise, and follows a description ("a house in
winter", "an oil painting of a house"): style transfer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sfumato.cli._options import TaskOptions, parse, refuse, unset
from sfumato.cli._run import run_task
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


@dataclass(frozen=True)
class Edit(TaskOptions):
    """Edit an image by a prompt: image to image, or by instruction."""

    defaults: ClassVar[dict[str, Any]] = {"strength": 0.8, "image_guidance": 1.5}

    strength: Annotated[float | None, unset("0.8")] = None
    """Image to image: share of the steps to run, in (0, 1]; small numbers keep the image."""
    image_guidance: Annotated[float | None, unset("1.5")] = None
    """Instructions (InstructPix2Pix): guidance scale towards the image; 1 is off."""
    also: Annotated[tuple[Path, ...], unset("none")] = ()
    """More images, for models that take several (FLUX.2)."""

    def plan(
        self,
        model: "LatentDiffusion",
        image: "Image",
        request: "Request",
        settings: dict[str, Any],
    ) -> "Plan":
        """Plan by instruction where the model takes one, else image to image."""
        from sfumato import tasks
        from sfumato.tasks.edit import kind_of_edit

        kind, strength = kind_of_edit(model), settings.pop("strength")
        if kind is not None:
            reason = ": this model follows instructions, from pure noise"
            refuse(self, f"{reason}; --image-guidance keeps to the image", "strength")
            if kind == "reference":
                refuse(self, ": this model has one scale, --guidance", "image_guidance")
            return tasks.edit(model, image, request, **settings)
        if self.also:
            raise UserError(
                f"--also {self.also[0]}: this model takes no images beside the prompt; "
                "give one image, with which it begins"
            )
        reason = ": this model was not trained for instructions"
        refuse(self, f"{reason}; --strength sets how much is drawn anew", "image_guidance")
        return tasks.image_to_image(model, image, request, strength=strength)


def edit(arguments: Sequence[str]) -> None:
    """Edit an image by a prompt: image to image, or an instruction where the model takes them."""
    run_task(parse(Edit, arguments, "edit"))
