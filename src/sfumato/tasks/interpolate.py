"""A series of images between two prompts, seeds or images, or several of these.

Prompts: the conditioning is interpolated linearly (`predict/conditioners/_interpolate.py`). Seeds:
all noise is interpolated along the arc between both seeds' (`diffuse/slerp.py`). Images: their
latents, which are then noised to the run's first time, or the noise that DDIM inversion gives for
them, are interpolated along the arc. The first and the last image are those of the plain requests
at both ends.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.slerp import slerp
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.sampling.run import condition_of
from sfumato.tasks._images import (
    ImageInput,
    channels_error,
    extra_channels,
    last_steps,
    resize_request,
)
from sfumato.tasks.variations import WAYS, invertible_request
from sfumato.validate import one_of, seed_number


def interpolate(
    request: Request, *, to_prompt: str | None = None, to_seed: int | None = None
) -> Request:
    """Interpolate between two prompts or seeds.

    All images have the noise of `seed`, not of seed + k. `prompt_2` and `negative_prompt` stay.

    Args:
        request: Request of n images, the first of its prompt and seed.
        to_prompt: Prompt of the last image; "" is no words; None: the same.
        to_seed: Seed of the last image; None: the same.

    Returns:
        The request, at even steps between both ends.

    Raises:
        UserError: For equal ends, fewer than two images, or a list of prompts.
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
        model: Any model that takes the latent alone.
        first: One image.
        second: One image.
        request: Its n is the number of images.
        strength: With "noise": the share of the steps that are run, in (0, 1].
        way: "noise": image to image at both ends; "inversion": all steps, and five network calls a
            step for the noise of each end.
        to_prompt: As for `interpolate`.
        to_seed: As for `interpolate`, with "noise".

    Raises:
        UserError: For images, a way, a strength or a network that does not fit.
    """
    one_of("way between images", way, WAYS)
    (start, sized), (end, _) = (resize_request(model, image, request) for image in (first, second))
    if start.shape != end.shape or len(start) != 1:
        raise UserError(
            f"images of shapes {tuple(start.shape)} and {tuple(end.shape)}: "
            "expected one at each end, of the same size"
        )
    mixed = _mix_ends(sized, to_prompt, to_seed)
    # noise and latents each on an arc of their own: together, shared noise would come out too
    # strong between the ends
    if way == "noise":
        if extra_channels(model):
            raise channels_error(model, "expected one that takes the latent alone")
        plan = model.plan(mixed)
        times = last_steps(plan.timesteps, strength)
        return plan.edit(
            timesteps=times, init_latent=_arc(model.encode(start), model.encode(end), plan.n)
        )
    if to_seed is not None:
        raise UserError(
            f"to_seed={to_seed} with way 'inversion': the noise is that of the images; "
            "expected None"
        )
    plan = model.plan(invertible_request(model, mixed))
    condition = condition_of(model, plan)
    first, last = (
        model.invert(model.encode(pixels), prompt, timesteps=plan.timesteps)
        for pixels, prompt in ((start, condition[:1]), (end, condition[-1:]))
    )
    return plan.edit(noise=_arc(first, last, plan.n))


def _mix_ends(request: Request, to_prompt: str | None, to_seed: int | None) -> Request:
    """The request with prompts and noise of each image of the series."""
    n, several = request.n, not isinstance(request.prompt, str | None)
    if not isinstance(n, int) or n < 2 or several:
        raise UserError(
            f"n={n!r}, prompt={request.prompt!r}: expected at least 2 images, "
            "and one text for the first"
        )
    if request.noise_mix is not None or request.prompt_mix is not None:
        raise UserError(
            "this request lies between two prompts or seeds already: "
            "expected noise_mix=None and prompt_mix=None"
        )
    shares = _shares(n)
    noise = ([request.seed] * n, [0.0] * n)
    if to_seed is not None:
        noise = ([seed_number("to_seed", to_seed)] * n, shares)
    prompts = None if to_prompt is None else (to_prompt, shares)
    return replace(request, noise_mix=noise, prompt_mix=prompts)


def _shares(n: int) -> list[float]:
    """Even steps from 0 to 1."""
    return [k / (n - 1) for k in range(n)]


def _arc(
    start: Float[Tensor, "_ c h w"], end: Float[Tensor, "_ c h w"], n: int
) -> Float[Tensor, "B c h w"]:
    """Rows (n, c, h, w) in even steps from one latent to the other."""
    first, last = (latent.expand(n, -1, -1, -1) for latent in (start, end))
    return slerp(first, last, _shares(n))
