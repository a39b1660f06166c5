"""A series of n pictures on the way from one to another: between two prompts, two seeds, two
pictures, or several of these at once.

Words: the network's condition goes straight from one to the other
(`predict/conditioners/_between.py`). Seeds: all noise goes along the arc from one seed's to the
other's (`diffuse/blend.py`). Pictures: their latents, then made as noisy as the run's first time
says, or the noise that DDIM inversion finds for them, go along the arc. The first and the last
picture are those of the plain requests at both ends.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.blend import slerp
from sfumato.errors import UserError, unknown
from sfumato.sampling import Request
from sfumato.tasks._pictures import Picture, extra_channels, later, sized
from sfumato.tasks.variations import WAYS, inverted, invertible, words_of


def interpolate(
    request: Request, *, to_prompt: str | None = None, to_seed: int | None = None
) -> Request:
    """request.n pictures, evenly from the request's prompt and seed to these; None: the same at
    both ends.

    All pictures have the noise of `seed`, not of seed + k. `prompt_2` and `negative_prompt` stay.
    to_prompt="" is the way to no words. `UserError` if there is no way to go, for less than two
    pictures, or for a list of prompts.
    """
    if to_prompt is None and to_seed is None:
        raise UserError("nothing to go to: expected to_prompt, to_seed or both")
    return _on_the_way(request, to_prompt, to_seed)


def interpolate_pictures(
    model: Any,
    first: Picture,
    second: Picture,
    request: Request | None = None,
    *,
    strength: float = 0.6,
    way: str = "noise",
    to_prompt: str | None = None,
    to_seed: int | None = None,
) -> Request:
    """request.n pictures from the first to the second, one each and of one size.

    way: "noise" (image to image at both ends: strength above 0 to 1, the share of the steps that
    are run) or "inversion" (all steps; five network calls a step to find the noise of each end;
    strength is not used). to_prompt, to_seed: as for `interpolate`, at the same time.
    """
    if way not in WAYS:
        raise unknown("way between pictures", way, WAYS)
    ends = [sized(model, picture, request or Request()) for picture in (first, second)]
    shapes, request = [tuple(pixels.shape) for pixels, _ in ends], ends[0][1]
    if shapes[0] != shapes[1] or shapes[0][0] != 1:
        raise UserError(
            f"pictures of shapes {shapes[0]} and {shapes[1]}: expected one at each end, of the same size"
        )
    z = [model.encode(pixels) for pixels, _ in ends]
    made = _on_the_way(request, to_prompt, to_seed)
    # noise and latents each on an arc of their own: together, shared noise would come out too
    # strong between the ends
    if way == "noise":
        if extra_channels(model):
            raise UserError(
                f"this model takes {extra_channels(model)} channels beside the latent: expected one that takes the latent alone"
            )
        return replace(
            made, timesteps=later(model, made, strength), begin=_arc(z, _shares(made.count))
        )
    if to_seed is not None:
        raise UserError(
            f"to_seed={to_seed} with way 'inversion': the noise is that of the pictures; expected None"
        )
    made = invertible(model, made)
    words = words_of(model, made)
    noise = [inverted(model, *end, made) for end in zip(z, (words[:1], words[-1:]), strict=True)]
    return replace(made, noise=_arc(noise, _shares(made.count)))


def _on_the_way(request: Request, to_prompt: str | None, to_seed: int | None) -> Request:
    """Words and noise of each picture of the series."""
    if (
        not isinstance(request.n, int)
        or request.n < 2
        or not isinstance(request.prompt, str | None)
    ):
        raise UserError(
            f"n={request.n!r}, prompt={request.prompt!r}: expected at least 2 pictures, and one text for the first"
        )
    if request.other_noise is not None or request.other_prompt is not None:
        raise UserError(
            "this request lies between two prompts or seeds already: expected other_noise=None and other_prompt=None"
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
        request, other_noise=noise, other_prompt=None if to_prompt is None else (to_prompt, shares)
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
