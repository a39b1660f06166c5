"""A series of images between two prompts, seeds or images, or several of these.

Prompts: the conditioning goes straight from one to the other (`predict/conditioners/_interpolate.py`).
Seeds: all noise goes along the arc from one seed's to the other's (`diffuse/slerp.py`). Images:
their latents, then noised to the run's first time, or the noise that DDIM inversion gives for them,
go along the arc. The first and the last image are those of the plain requests at both ends.
"""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.slerp import slerp
from sfumato.errors import UserError, unknown
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request
from sfumato.sampling.run import condition_of
from sfumato.tasks._images import ImageInput, extra_channels, last_steps, resize_request
from sfumato.tasks.variations import WAYS, invertible_request


def interpolate(
    request: Request, *, to_prompt: str | None = None, to_seed: int | None = None
) -> Request:
    """Interpolate between two prompts or seeds.

    All images have the noise of `seed`, not of seed + k. `prompt_2` and `negative_prompt` stay.

    Args:
        request: n images, the first of its prompt and seed
        to_prompt: prompt of the last image; "" is no words; None: the same
        to_seed: seed of the last image; None: the same

    Returns:
        the request, at even steps between both ends

    Raises:
        UserError: both ends are the same, fewer than two images, or a list of prompts
    """
    if to_prompt is None and to_seed is None:
        raise UserError("nothing to go to: expected to_prompt, to_seed or both")
    return _mix_ends(request, to_prompt, to_seed)


def interpolate_images(
    model: LatentDiffusion,
    first: ImageInput,
    second: ImageInput,
    request: Request | None = None,
    *,
    strength: float = 0.6,
    way: str = "noise",
    to_prompt: str | None = None,
    to_seed: int | None = None,
) -> Plan:
    """Plan n images between two images of one size.

    Args:
        model: any that takes the latent alone
        first: one image
        second: one image
        request: its n is the number of images
        strength: with "noise": the share of the steps that are run, in (0, 1]
        way: "noise": image to image at both ends; "inversion": all steps, and five network calls a
            step for the noise of each end
        to_prompt: as for `interpolate`
        to_seed: as for `interpolate`, with "noise"

    Raises:
        UserError: for images, a way, a strength or a network that does not fit
    """
    if way not in WAYS:
        raise unknown("way between pictures", way, WAYS)
    ends = [resize_request(model, image, request or Request()) for image in (first, second)]
    pixels, request = [pixels for pixels, _ in ends], ends[0][1]
    if pixels[0].shape != pixels[1].shape or len(pixels[0]) != 1:
        shapes = [tuple(p.shape) for p in pixels]
        raise UserError(
            f"pictures of shapes {shapes[0]} and {shapes[1]}: expected one at each end, of the same size"
        )
    mixed = _mix_ends(request, to_prompt, to_seed)
    # noise and latents each on an arc of their own: together, shared noise would come out too
    # strong between the ends
    if way == "noise":
        if extra_channels(model):
            raise UserError(
                f"this model takes {extra_channels(model)} channels beside the latent: expected one that takes the latent alone"
            )
        plan = model.plan(mixed)
        times = last_steps(plan.timesteps, strength)
        return plan.edit(
            timesteps=times, init_latent=_arc([model.encode(p) for p in pixels], _shares(plan.n))
        )
    if to_seed is not None:
        raise UserError(
            f"to_seed={to_seed} with way 'inversion': the noise is that of the pictures; expected None"
        )
    plan = model.plan(invertible_request(model, mixed))
    z, condition = [model.encode(p) for p in pixels], condition_of(model, plan)
    ends = zip(z, (condition[:1], condition[-1:]), strict=True)
    return plan.edit(
        noise=_arc([model.invert(*end, timesteps=plan.timesteps) for end in ends], _shares(plan.n))
    )


def _mix_ends(request: Request, to_prompt: str | None, to_seed: int | None) -> Request:
    """The request with prompts and noise of each image of the series."""
    if (
        not isinstance(request.n, int)
        or request.n < 2
        or not isinstance(request.prompt, str | None)
    ):
        raise UserError(
            f"n={request.n!r}, prompt={request.prompt!r}: expected at least 2 pictures, and one text for the first"
        )
    if request.noise_mix is not None or request.prompt_mix is not None:
        raise UserError(
            "this request lies between two prompts or seeds already: expected noise_mix=None and prompt_mix=None"
        )
    if isinstance(to_seed, bool) or not isinstance(to_seed, int | None):
        raise UserError(f"to_seed={to_seed!r}: expected a whole number")
    shares = _shares(request.n)
    noise = (
        ([request.seed] * request.n, [0.0] * request.n)
        if to_seed is None
        else ([to_seed] * request.n, shares)
    )
    return replace(
        request, noise_mix=noise, prompt_mix=None if to_prompt is None else (to_prompt, shares)
    )


def _shares(n: int) -> list[float]:
    """Even steps from 0 to 1."""
    return [k / (n - 1) for k in range(n)]


def _arc(
    ends: Sequence[Float[Tensor, "_ c h w"]], shares: Sequence[float]
) -> Float[Tensor, "B c h w"]:
    """From the one to the other, a row a share."""
    a, b = (end.expand(len(shares), -1, -1, -1) for end in ends)
    return slerp(a, b, shares)
