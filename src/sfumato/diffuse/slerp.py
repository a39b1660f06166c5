"""Spherical interpolation of noise and of latents.

    slerp(a, b, s) = (sin((1 - s) w) a + sin(s w) b) / sin w,      w the angle between a and b

(Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; for the latents of
generative models: White 2016, arXiv:1609.04468). The norm changes evenly from that of a to that of
b. Two draws of noise are almost orthogonal and of equal norm, so that a point between them has that
norm too. The straight line has less, by up to a factor of sqrt(2) in the middle: noise of half the
variance, which no network was trained on.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.types import Noise

PARALLEL = 1e-6
"""Sine of the angle below which a and b count as parallel.

The interpolation between them is then linear.
"""


def slerp(
    a: Float[Tensor, "B C h w"], b: Float[Tensor, "B C h w"], shares: Sequence[float]
) -> Float[Tensor, "B C h w"]:
    """Interpolate row by row, from a[k] at shares[k] = 0 to b[k] at 1, exact at both ends.

    Args:
        a: Start of each row.
        b: End of each row.
        shares: One number in [0, 1] a row.
    """
    return torch.stack([_slerp(*row) for row in zip(a, b, shares, strict=True)])


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    if share in (0, 1):
        return b if share else a
    u, v = (t.double().flatten() for t in (a, b))
    cosine = (u @ v) / (u.norm() * v.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < PARALLEL:
        weights = 1 - share, share
    else:
        weights = tuple(float((part * angle).sin() / angle.sin()) for part in (1 - share, share))
    return weights[0] * a + weights[1] * b


class SlerpNoise:
    """Noise between two sources of noise.

    Args:
        first: Noise at share 0.
        second: Noise at share 1.
        shares: One number in [0, 1] an image.
    """

    def __init__(self, first: Noise, second: Noise, shares: Sequence[float]):
        self.first, self.second, self.shares = first, second, list(shares)

    def __call__(self) -> Float[Tensor, "B C h w"]:
        """Draw the next tensor of both and interpolate."""
        return slerp(self.first(), self.second(), self.shares)
