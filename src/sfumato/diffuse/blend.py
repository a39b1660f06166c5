"""Noise between two noises, and latents between two latents, on the arc that joins them.

    slerp(a, b, s) = (sin((1 - s) w) a + sin(s w) b) / sin w,      w the angle between a and b

(Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; for the latents of
generative models: White 2016, arXiv:1609.04468). Its length goes evenly from that of a to that of
b. Two draws of noise are almost at right angles and equally long, so what lies between is as long,
where the straight line would be shorter by up to a factor of sqrt(2): a noise of half the variance,
which no network knows.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.types import Noise

NEARLY = 1e-6
"""The sine of an angle below which the arc is a straight line (a and b are the same), or is not to
be found (they are opposite)."""


def slerp(
    a: Float[Tensor, "B C h w"], b: Float[Tensor, "B C h w"], shares: Sequence[float]
) -> Float[Tensor, "B C h w"]:
    """Row k lies at shares[k] in [0, 1] of the way from a[k] (0) to b[k] (1); at the ends it is
    a[k] or b[k] to the last bit.
    """
    return torch.stack([_slerp(*row) for row in zip(a, b, shares, strict=True)])


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    if share in (0, 1):
        return b if share else a
    u, v = (t.double().flatten() for t in (a, b))
    cosine = (u @ v) / (u.norm() * v.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < NEARLY:
        weights = 1 - share, share
    else:
        weights = tuple(float((part * angle).sin() / angle.sin()) for part in (1 - share, share))
    return weights[0] * a + weights[1] * b


class BlendedNoise:
    """Draw after draw of two sources, blended: shares[k] of the way from image k's `first` to its
    `second`.
    """

    def __init__(self, first: Noise, second: Noise, shares: Sequence[float]):
        self.first, self.second, self.shares = first, second, list(shares)

    def __call__(self) -> Float[Tensor, "B C h w"]:
        return slerp(self.first(), self.second(), self.shares)
