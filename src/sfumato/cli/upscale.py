"""`sfumato upscale`: a picture in, a larger one out.

A model trained for it (Stable Diffusion's x4 upscaler) sees the small picture beside the latent; any other begins with the picture, enlarged by a
filter and made a little noisy, and draws the details.
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
class Upscale(TaskOptions):
    """Makes a picture larger, with new details."""

    scale: float = 2.0
    """How many times larger; an upscaler has its own (4)."""
    strength: float = 0.4
    """How much is drawn anew, from above 0 to 1; not for upscalers."""
    noise_level: int = 20
    """For upscalers: the noise that the small picture is given, a timestep. More leaves more to be invented."""


def upscale(arguments: Sequence[str]) -> None:
    """Makes a picture larger, with new details: by an upscaler, or by any model in a second pass."""
    options = parse(Upscale, arguments, "upscale")

    def prepare(model: Any, picture: "Image", request: "Request") -> "Request":
        from sfumato.tasks.enlarge import enlarge
        from sfumato.tasks.upscale import upscale as by_upscaler

        if model.low_res is not None:
            return by_upscaler(model, picture, request, noise_level=options.noise_level)
        return enlarge(model, picture, request, scale=options.scale, strength=options.strength)

    own = {"scale": options.scale, "strength": options.strength, "noise_level": options.noise_level}
    run_task("upscale", options, own, prepare)
