"""Steps that samplers share: x at the point `here` -> x at the point `there`.

A point is (alpha, sigma) as plain numbers. Everything is finite at both ends: alpha = 0 (a flow at
t = 1, zero terminal SNR) and sigma = 0 (t = 0).
"""

import math

from torch import Tensor

from sfumato.diffuse.schedule import NO_SIGNAL, Schedule
from sfumato.types import Prediction

Point = tuple[float, float]


def no_signal(point: Point) -> bool:
    """Return True where x is as good as pure noise.

    A step from there by eps divides by next to nothing, a first-order step by x0 does not.
    """
    return point[1] >= NO_SIGNAL * point[0]


def at_an_end(here: Point, there: Point) -> bool:
    """Return True for a step from alpha = 0 or to sigma = 0.

    log(alpha/sigma) is infinite there, and samplers take DDIM's step.
    """
    return here[0] == 0 or there[1] == 0


def half_log_snr(point: Point) -> float:
    """Return log(alpha/sigma): -inf where alpha is 0, inf where sigma is."""
    alpha, sigma = point
    return (
        -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha) - math.log(sigma)
    )


def log_snr_step(here: Point, there: Point) -> float:
    """Return h, the step in log(alpha/sigma): positive towards clean, inf from or to an end."""
    return half_log_snr(there) - half_log_snr(here)


def time_between(schedule: Schedule, here: Point, there: Point, share: float) -> float:
    """Return the time at a share of the step in log(alpha/sigma), which is finite."""
    return schedule.at_noise_level(
        math.exp(-half_log_snr(here) - share * log_snr_step(here, there))
    )


def ddim_step(prediction: Prediction, there: Point) -> Tensor:
    """Return alpha*x0 + sigma*eps: the forward process at the predicted pair.

    (DDIM, Song et al. 2021, arXiv:2010.02502, eq. 12, eta 0.)
    """
    return prediction.at(*there)


def exp_step_x0(x: Tensor, x0: Tensor | Prediction, here: Point, there: Point) -> Tensor:
    """Solve the flow exactly for a constant x0: the exponential integrator's step by x0.

    (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) x0, of a prediction's x0 or another.
    """
    ratio = there[1] / here[1]
    rest = there[0] - here[0] * ratio
    return (
        x0.at(rest, 0.0, ratio, x)
        if isinstance(x0, Prediction)
        else weighted_sum((ratio, x), (rest, x0))
    )


def exp_step_eps(x: Tensor, eps: Tensor, here: Point, there: Point) -> Tensor:
    """Solve the flow exactly for a constant eps: the exponential integrator's step by eps.

    (alpha_s/alpha_t) x + (sigma_s - sigma_t alpha_s/alpha_t) eps, for alpha_t > 0.
    """
    ratio = there[0] / here[0]
    return weighted_sum((ratio, x), (there[1] - here[1] * ratio, eps))


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Return the sum of weight * tensor, in that order, one rounding at a time."""
    result = terms[0][0] * terms[0][1]
    for weight, value in terms[1:]:
        result.add_(weight * value)
    return result


def add_noise_to(x: Tensor, noise: Tensor, here: Point, there: Point) -> Tensor:
    """Draw from q(x_s | x_t) for s > t.

    (alpha_s/alpha_t) x + sqrt(sigma_s^2 - (alpha_s sigma_t/alpha_t)^2) noise.
    """
    ratio, added = added_noise(here, there)
    return weighted_sum((ratio, x), (added, noise))


def added_noise(here: Point, there: Point) -> tuple[float, float]:
    """Return the weights of x and of the noise in `add_noise_to`."""
    ratio = there[0] / here[0]
    return ratio, math.sqrt(max(there[1] ** 2 - (ratio * here[1]) ** 2, 0.0))


def ancestral(here: Point, there: Point, eta: float = 1.0) -> tuple[float, float]:
    """Return (down, up), the noise that is kept and the noise drawn anew.

    down^2 + up^2 = sigma_s^2 and
    up^2 = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2) (Song et al. 2021, eq. 16);
    eta 1 is DDPM's posterior.
    """
    if there[1] == 0:
        return 0.0, 0.0
    ratio = here[0] * there[1] / (there[0] * here[1])
    up2 = eta**2 * there[1] ** 2 * max(1 - ratio**2, 0.0)
    return math.sqrt(there[1] ** 2 - up2), math.sqrt(up2)


class OdeCoordinates:
    """The coordinates x/c of first-order solvers: x/c = A z + B eps, with d(x/c)/dB = slope.

    c = alpha where sigma/alpha is finite (B is Karras et al.'s sigma, the slope is eps). Otherwise
    c = alpha + sigma, which for a flow is 1 (B is t, the slope is eps - x0).

    Args:
        schedule: t -> (alpha, sigma).

    Attributes:
        slope: Weights of x0 and of eps in the slope.
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.flow = schedule, not schedule.bounded
        self.slope = (-1.0, 1.0) if self.flow else (0.0, 1.0)

    def at(self, t: float) -> tuple[float, float]:
        """Return (c, B) at a time."""
        alpha, sigma = self.schedule.point(t)
        c = alpha + sigma if self.flow else alpha
        return c, sigma / c
