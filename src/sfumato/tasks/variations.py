"""Variations of an image: strength 0 is the same image, 1 has nothing of it.

    vary         of an image that was drawn from a seed: all noise lies at `strength` on the arc to
                 another seed's ("variation seed" of AUTOMATIC1111's web UI)
    variations   of any image. way "noise": image to image from other seeds (SDEdit,
                 arXiv:2108.01073); colours and positions stay. way "inversion": the noise that DDIM
                 makes the image from (Song et al. 2021, arXiv:2010.02502, section 4.3) moves
                 towards other noise; the result stays an image that the model could have drawn from
                 noise.

The arc (`diffuse/slerp.py`) keeps the variance of the noise.
"""

from dataclasses import replace

from sfumato.diffuse.slerp import slerp
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.sampling.plan import without_guidance
from sfumato.sampling.run import condition_of
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    channels_error,
    extra_channels,
    resize_request,
)
from sfumato.tasks.image_to_image import image_to_image
from sfumato.validate import number_in, one_of, seed_number

WAYS = ("noise", "inversion")


def vary(request: Request, *, seed: int | None = None, strength: float = 0.2) -> Request:
    """Vary the image that a request's seed draws: image k moves towards that of `seed` + k.

    Args:
        request: Request of n variations of its first image.
        seed: Seed of the others; None: the one after the request's.
        strength: 0 is n times the request's first image, 1 the images of `seed`, seed + 1 ..., both
            bit for bit.

    Raises:
        UserError: For a strength outside of [0, 1].
    """
    _check_strength(strength)
    if request.noise_mix is not None:
        raise UserError(
            "this request's noise lies between two seeds already: expected noise_mix=None"
        )
    n = request.count
    other = seed_number("seed", request.seed + 1 if seed is None else seed, n)
    return replace(request, noise_mix=([other + k for k in range(n)], [strength] * n))


def variations(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    strength: float = 0.3,
    way: str = "noise",
) -> Plan:
    """Plan variations of an image: image k differs by the noise of seed + k.

    Args:
        model: As for `image_to_image`; for "inversion" one that takes the latent alone.
        image: One for all images or one an image.
        request: Everything else.
        strength: "noise": share of the steps that are run, in (0, 1]; "inversion": in [0, 1].
        way: "noise", or "inversion": five network calls a step for the noise, then a run of ddim,
            without guidance if the request leaves it open.

    Raises:
        UserError: For a way, a strength or a network that does not fit.
    """
    if one_of("way to vary an image", way, WAYS) == "noise":
        return image_to_image(model, image, request, strength=strength)
    _check_strength(strength)
    pixels, request = resize_request(model, image, request)
    plan = model.plan(invertible_request(model, request))
    condition, z = condition_of(model, plan), model.encode(pixels)
    # as many prompts as images: each its own noise
    if len(z) < plan.n and not isinstance(request.prompt, str | None):
        z = z.expand(plan.n, -1, -1, -1)
    noise = model.invert(z, condition[: len(z)], timesteps=plan.timesteps)
    noise = noise.expand(plan.n, -1, -1, -1)
    return plan.edit(noise=slerp(noise, NoiseDraws(model, plan)(), [strength] * plan.n))


def invertible_request(model: LatentDiffusion, request: Request) -> Request:
    """The request as a run of ddim, without guidance if it leaves it open.

    Raises:
        UserError: For another sampler, timesteps of its own, or a network that takes more than the
            latent.
    """
    if extra_channels(model):
        raise channels_error(model, "inversion needs one that takes the latent alone")
    if request.sampler not in (None, "ddim") or request.timesteps is not None:
        raise UserError(
            f"sampler {request.sampler!r} or timesteps with way 'inversion': "
            "expected ddim, by steps and spacing"
        )
    return without_guidance(model, replace(request, sampler="ddim"))


def _check_strength(strength: float) -> None:
    number_in("strength", strength, 0, 1, hint="0 is the same image, 1 another one")
