"""`sfumato upscale`: an image in, a larger one out.

A model trained for it (Stable Diffusion's x4 upscaler) reads the small image beside the latent. Any
other begins with the image, enlarged by a filter and made a little noisy, and draws the details.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from sfumato.cli._options import TaskOptions, parse, unset
from sfumato.cli._run import run_task
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Plan, Request


@dataclass(frozen=True)
class Upscale(TaskOptions):
    """Enlarge an image, with new details."""

    scale: Annotated[float | None, unset("2")] = None
    """Factor of the sides; not for upscalers, which have their own (4)."""
    strength: Annotated[float | None, unset("0.4")] = None
    """Share of the steps that are run, from above 0 to 1; not for upscalers."""
    noise_level: Annotated[int | None, unset("20")] = None
    """Upscalers: noise of the small image, a timestep. More leaves more to be invented."""


def upscale(arguments: Sequence[str]) -> None:
    """Enlarge an image, with new details: by an upscaler, or by any model in a second pass."""
    options = parse(Upscale, arguments, "upscale")
    scale = 2.0 if options.scale is None else options.scale
    strength = 0.4 if options.strength is None else options.strength
    level = 20 if options.noise_level is None else options.noise_level

    def prepare(model: "LatentDiffusion", image: "Image", request: "Request") -> "Plan":
        from sfumato import tasks

        if model.low_res is not None:
            for flag, value in (("--scale", options.scale), ("--strength", options.strength)):
                if value is not None:
                    raise UserError(
                        f"{flag} {value}: this model is an upscaler, which has its own scale and draws all anew; leave it away"
                    )
            return tasks.upscale(model, image, request, noise_level=level)
        if options.noise_level is not None:
            raise UserError(
                f"--noise-level {level}: this model is no upscaler; --strength sets how much is drawn anew"
            )
        return tasks.enlarge(model, image, request, scale=scale, strength=strength)

    run_task(
        "upscale", options, {"scale": scale, "strength": strength, "noise_level": level}, prepare
    )
