"""`sfumato upscale`: an image in, a larger one out.

A model trained for it (Stable Diffusion's x4 upscaler) takes the small image beside the latent. Any
other starts from the image, enlarged by a filter and with some noise, and draws the details.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sfumato.cli._options import TaskOptions, parse, refuse, unset
from sfumato.cli._run import run_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


@dataclass(frozen=True)
class Upscale(TaskOptions):
    """Enlarge an image, with new details."""

    defaults: ClassVar[dict[str, Any]] = {"scale": 2.0, "strength": 0.4, "noise_level": 20}

    scale: Annotated[float | None, unset("2")] = None
    """Factor of the sides, at least 1; upscalers have their own (4)."""
    strength: Annotated[float | None, unset("0.4")] = None
    """Share of the steps to run, in (0, 1]; not for upscalers."""
    noise_level: Annotated[int | None, unset("20")] = None
    """Upscalers: noise of the small image, a timestep. More leaves more to invent."""

    def plan(
        self,
        model: "LatentDiffusion",
        image: "Image",
        request: "Request",
        settings: dict[str, Any],
    ) -> "Plan":
        """Plan by the upscaler, or by any other model in a second pass."""
        from sfumato import tasks

        level = settings.pop("noise_level")
        if model.low_res is None:
            reason = ": this model is no upscaler; --strength sets how much is drawn anew"
            refuse(self, reason, "noise_level")
            return tasks.enlarge(model, image, request, **settings)
        reason = ": this model is an upscaler, which has its own scale and draws all anew"
        refuse(self, f"{reason}; leave it away", "scale", "strength")
        return tasks.upscale(model, image, request, noise_level=level)


def upscale(arguments: Sequence[str]) -> None:
    """Enlarge an image, with new details: by an upscaler, or by any model in a second pass."""
    run_task(parse(Upscale, arguments, "upscale"))
