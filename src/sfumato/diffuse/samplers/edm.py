"""Stochastic sampler of EDM: a little noise is added, then a step of Heun's method.

(Karras et al. 2022, arXiv:2206.00364, algorithm 2.) The noise level sigma/alpha of x is raised by a
factor 1 + gamma with gamma = min(S_churn/N, sqrt(2) - 1) between S_tmin and S_tmax, and Heun's
method (heun.py) goes down from there. Their best settings for images: churn 40, churn_noise 1.003.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import OdeCoordinates, add_noise_to, ddim_step
from sfumato.errors import UserError


@dataclass(frozen=True)
class Churn:
    """Noise added before a step.

    Args:
        amount: S_churn.
        low: S_tmin, a noise level.
        high: S_tmax, a noise level.
        scale: S_noise.
        steps: Number of steps of the run.
    """

    amount: float
    low: float
    high: float
    scale: float
    steps: int

    def __post_init__(self) -> None:
        if not (self.amount >= 0 and self.scale >= 0):
            raise UserError(
                f"churn={self.amount}, churn_noise={self.scale}: expected numbers of at least 0"
            )

    def __call__(
        self, x: Tensor, t: float, schedule: Schedule, noise: Noise
    ) -> tuple[Tensor, float]:
        """Return (x, t) with more noise; unchanged where the time of more noise is not above t."""
        level, gamma = schedule.noise_level(t), min(self.amount / self.steps, math.sqrt(2) - 1)
        if gamma == 0 or not self.low <= level <= self.high or math.isinf(level):
            return x, t
        up = schedule.at_noise_level(level * (1 + gamma))
        if up <= t:
            return x, t
        return add_noise_to(x, self.scale * noise(), schedule.point(t), schedule.point(up)), up


@traits(order=2, calls=2, noise=True)
def edm(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    churn: float = 40.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    churn_noise: float = 1.0,
) -> Run:
    """Call the network twice a step, once for a last step to t = 0.

    Options:
        churn: S_churn.
        churn_from: S_tmin, a noise level sigma/alpha.
        churn_to: S_tmax, a noise level sigma/alpha.
        churn_noise: S_noise.
    """
    add_churn = Churn(churn, churn_from, churn_to, churn_noise, len(times) - 1)
    coordinates = OdeCoordinates(schedule)
    for t, s in pairwise(times):
        x, t = add_churn(x, t, schedule, noise)
        first = yield x, t
        end = ddim_step(first, schedule.point(s))
        if schedule.point(s)[1] == 0:  # there is no noise to predict at t = 0
            return end
        second = yield end, s
        (c_t, b_t), (c_s, b_s) = coordinates.at(t), coordinates.at(s)
        half, (of_x0, of_eps) = c_s * (b_s - b_t) / 2, coordinates.slope
        x = first.at(half * of_x0, half * of_eps, c_s / c_t, x).add_(
            second.at(half * of_x0, half * of_eps)
        )
    return x
