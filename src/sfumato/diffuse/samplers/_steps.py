"""The moves that samplers are made of. A point is (alpha, sigma) as plain numbers; x at `here`
becomes x at `there`.

Everything is finite at both ends: alpha = 0 (a flow at t = 1, zero terminal SNR) and sigma = 0 (t =
0).
"""

import math

from torch import Tensor

from sfumato.diffuse.schedule import NO_SIGNAL, Schedule
from sfumato.types import Prediction

Point = tuple[float, float]


def no_signal(point: Point) -> bool:
    """Whether x is as good as pure noise there: a step from there by eps divides by next to
    nothing, one of first order by x0 does not.
    """
    return point[1] >= NO_SIGNAL * point[0]


def at_an_end(here: Point, there: Point) -> bool:
    """Steps from alpha = 0 and to sigma = 0, which log(alpha/sigma) does not measure: DDIM's step
    is taken there.
    """
    return here[0] == 0 or there[1] == 0


def half_log_snr(point: Point) -> float:
    """log(alpha/sigma): -inf where alpha is 0, inf where sigma is."""
    alpha, sigma = point
    return (
        -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha) - math.log(sigma)
    )


def between(here: Point, there: Point) -> float:
    """h, the step in log(alpha/sigma): positive on the way to clean, inf from or to an end."""
    return half_log_snr(there) - half_log_snr(here)


def place(prediction: Prediction, there: Point) -> Tensor:
    """alpha*x0 + sigma*eps: the forward process with what was predicted (DDIM, Song et al. 2021,
    eq. 12, eta 0).
    """
    return prediction.at(*there)


def towards(x: Tensor, x0: Tensor | Prediction, here: Point, there: Point) -> Tensor:
    """The exact solution of the flow if x0 (a prediction's, or another) stays: (sigma_s/sigma_t) x
    + (alpha_s - alpha_t sigma_s/sigma_t) x0.
    """
    ratio = there[1] / here[1]
    rest = there[0] - here[0] * ratio
    return (
        x0.at(rest, 0.0, ratio, x) if isinstance(x0, Prediction) else total((ratio, x), (rest, x0))
    )


def along(x: Tensor, eps: Tensor, here: Point, there: Point) -> Tensor:
    """The exact solution of the flow if eps stays: (alpha_s/alpha_t) x + (sigma_s - sigma_t
    alpha_s/alpha_t) eps. Needs alpha_t > 0.
    """
    ratio = there[0] / here[0]
    return total((ratio, x), (there[1] - here[1] * ratio, eps))


def total(*terms: tuple[float, Tensor]) -> Tensor:
    """The sum of numbers times tensors, in that order, one rounding at a time."""
    found = terms[0][0] * terms[0][1]
    for weight, value in terms[1:]:
        found.add_(weight * value)
    return found


def noisier(x: Tensor, noise: Tensor, here: Point, there: Point) -> Tensor:
    """A draw from q(x_s | x_t) for s > t: (alpha_s/alpha_t) x + sqrt(sigma_s^2 - (alpha_s
    sigma_t/alpha_t)^2) noise.
    """
    ratio, added = rise(here, there)
    return total((ratio, x), (added, noise))


def rise(here: Point, there: Point) -> tuple[float, float]:
    """The weights of x and of the noise in `noisier`."""
    ratio = there[0] / here[0]
    return ratio, math.sqrt(max(there[1] ** 2 - (ratio * here[1]) ** 2, 0.0))


def ancestral(here: Point, there: Point, eta: float = 1.0) -> tuple[float, float]:
    """(down, up) with down^2 + up^2 = sigma_s^2: the noise that is kept and the noise that is drawn
    anew (eta 1: DDPM's posterior).

    up^2 = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2) (Song et al. 2021, eq. 16).
    """
    if there[1] == 0:
        return 0.0, 0.0
    ratio = here[0] * there[1] / (there[0] * here[1])
    up2 = eta**2 * there[1] ** 2 * max(1 - ratio**2, 0.0)
    return math.sqrt(there[1] ** 2 - up2), math.sqrt(up2)


class Straight:
    """The coordinates x/c in which first-order solvers step: x/c = A z + B eps, with d(x/c)/dB =
    slope.

    c = alpha where sigma/alpha is finite (B is Karras et al.'s sigma, the slope is eps); else c =
    alpha + sigma, which for a flow is 1 (B is t, the slope is eps - x0).
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.flow = schedule, not schedule.bounded
        self.slope = (-1.0, 1.0) if self.flow else (0.0, 1.0)  # of x0 and of eps

    def at(self, t: float) -> tuple[float, float]:
        """(c, B)."""
        alpha, sigma = self.schedule.point(t)
        c = alpha + sigma if self.flow else alpha
        return c, sigma / c
