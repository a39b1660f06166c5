"""`sfumato upscale`: a picture in, a larger one out.

A model trained for it (Stable Diffusion's x4 upscaler) sees the small picture beside the latent;
any other begins with the picture, enlarged by a filter and made a little noisy, and draws the
details.
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
class Upscale(TaskOptions):
    """Makes a picture larger, with new details."""

    scale: Annotated[float | None, unset("2")] = None
    """How many times larger; not for upscalers, which have their own (4)."""
    strength: Annotated[float | None, unset("0.4")] = None
    """How much is drawn anew, from above 0 to 1; not for upscalers."""
    noise_level: Annotated[int | None, unset("20")] = None
    """For upscalers: the noise that the small picture is given, a timestep. More leaves more to be
    invented."""


def upscale(arguments: Sequence[str]) -> None:
    """Makes a picture larger, with new details: by an upscaler, or by any model in a second
    pass.
    """
    options = parse(Upscale, arguments, "upscale")
    scale = 2.0 if options.scale is None else options.scale
    strength = 0.4 if options.strength is None else options.strength
    level = 20 if options.noise_level is None else options.noise_level

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.enlarge import enlarge
        from sfumato.tasks.upscale import upscale as by_upscaler

        if model.low_res is not None:
            for flag, value in (("--scale", options.scale), ("--strength", options.strength)):
                if value is not None:
                    raise UserError(
                        f"{flag} {value}: this model is an upscaler, which has its own scale and draws all anew; leave it away"
                    )
            return by_upscaler(model, picture, request, noise_level=level)
        if options.noise_level is not None:
            raise UserError(
                f"--noise-level {level}: this model is no upscaler; --strength says how much is drawn anew"
            )
        return enlarge(model, picture, request, scale=scale, strength=strength)

    run_task(
        "upscale", options, {"scale": scale, "strength": strength, "noise_level": level}, prepare
    )
