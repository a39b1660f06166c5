"""Pictures like another one, and how different said by one number, `strength`: 0 is the same
picture, 1 one that has nothing of it.

    vary         of a picture that was drawn from a seed: all noise lies at `strength` on the arc to
                 another seed's ("variation seed" of AUTOMATIC1111's web UI)
    variations   of any picture. way "noise": image to image from other seeds (SDEdit,
                 arXiv:2108.01073); colours and places stay. way "inversion": the noise that DDIM
                 makes the picture from (Song et al. 2021, arXiv:2010.02502, section 4.3) goes
                 towards other noise; what is drawn stays a picture that the model could have drawn
                 from noise.

The arc (`diffuse/blend.py`) keeps the noise as strong as noise is.
"""

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.blend import slerp
from sfumato.errors import UserError, unknown
from sfumato.running import told, told_guidance
from sfumato.sampling import Request, settings
from sfumato.tasks._pictures import Draws, Picture, extra_channels, sized
from sfumato.tasks.image_to_image import image_to_image
from sfumato.types import Conditioning
from sfumato.types import ImageSpec as Told

WAYS = ("noise", "inversion")


def vary(request: Request, *, seed: int | None = None, strength: float = 0.2) -> Request:
    """n variations of the one picture that the request's seed draws: image k goes towards that of
    seed + k.

    seed: by default the one after the request's. strength: 0 is n times the request's first
    picture, 1 the pictures of `seed`, seed + 1 ..., both to the last bit. `UserError` for a
    strength outside [0, 1].
    """
    if (
        isinstance(strength, bool)
        or not isinstance(strength, int | float)
        or not 0 <= strength <= 1
    ):
        raise UserError(
            f"strength={strength!r}: expected a number from 0, the same picture, to 1, another one"
        )
    if request.other_noise is not None:
        raise UserError(
            "this request's noise lies between two seeds already: expected other_noise=None"
        )
    other = request.seed + 1 if seed is None else seed
    if isinstance(other, bool) or not isinstance(other, int):
        raise UserError(f"seed={seed!r}: expected a whole number")
    return replace(
        request, other_noise=([other + k for k in range(request.count)], [strength] * request.count)
    )


def variations(
    model: Any,
    picture: Picture,
    request: Request | None = None,
    *,
    strength: float = 0.3,
    way: str = "noise",
) -> Request:
    """picture: one for all images, or one an image; image k differs by the noise of seed + k.

    way: "noise" (strength above 0 to 1, the share of the steps that are run) or "inversion" (from
    0; five network calls a step to find the noise, then a run of ddim, without guidance if the
    request asks for none). `UserError` for what does not fit.
    """
    if way not in WAYS:
        raise unknown("way to vary a picture", way, WAYS)
    if way == "noise":
        return image_to_image(model, picture, request, strength=strength)
    if (
        isinstance(strength, bool)
        or not isinstance(strength, int | float)
        or not 0 <= strength <= 1
    ):
        raise UserError(
            f"strength={strength!r}: expected a number from 0, the same picture, to 1, another one"
        )
    pixels, request = sized(model, picture, request or Request())
    request, count = invertible(model, request), request.count
    words = words_of(model, request)
    z = model.encode(pixels)
    # as many words as images: each its own noise
    if len(z) < count and not isinstance(request.prompt, str | None):
        z = z.expand(count, -1, -1, -1)
    noise = inverted(model, z, words[: len(z)], request).expand(count, -1, -1, -1)
    return replace(request, noise=slerp(noise, Draws(model, request)(), [strength] * count))


def invertible(model: Any, request: Request) -> Request:
    """The request as a run of ddim, which can be inverted; without guidance, if it asks for none.
    `UserError` where it cannot be one.
    """
    if extra_channels(model):
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: inversion needs one that takes the latent alone"
        )
    if request.sampler not in (None, "ddim") or request.timesteps is not None:
        raise UserError(
            f"sampler {request.sampler!r} or given times with way 'inversion': expected ddim, by steps and spacing"
        )
    request = replace(request, sampler="ddim")
    chosen = settings(model, request)
    # by two passes: a lone number is what learned guidance is told
    guidance = 1.0 if request.guidance is None else chosen["guidance"]
    learned = chosen.get("learned_guidance")
    return replace(
        request,
        steps=chosen["steps"],
        spacing=chosen["spacing"],
        guidance=guidance,
        learned_guidance=learned,
    )


def words_of(model: Any, request: Request) -> Conditioning:
    """What the network is told, a row an image, of a request that knows its size."""
    assert request.height is not None and request.width is not None
    words = told(
        model, request, request.count, request.picture or Told(request.height, request.width)
    )
    return told_guidance(words, request.count, request.learned_guidance, model.device)


def inverted(
    model: Any, z: Float[Tensor, "N c h w"], words: Conditioning, request: Request
) -> Float[Tensor, "N c h w"]:
    """The noise from which an `invertible` request draws these latents, as far as guidance lets
    it.
    """
    return model.invert(z, words, steps=request.steps, spacing=request.spacing)
