"""Karras et al.'s stochastic sampler: add a little noise, then a step of Heun's method (2022,
arXiv:2206.00364, algorithm 2).

The noise level sigma/alpha of x is raised by a factor 1 + gamma with gamma = min(S_churn/N, sqrt(2)
- 1) between S_tmin and S_tmax, and Heun's method (heun.py) goes down from there. Their best
settings for images: churn 40, churn_noise 1.003.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.samplers._steps import Straight, noisier, place
from sfumato.diffuse.schedule import Schedule
from sfumato.errors import UserError
from sfumato.types import Noise


@dataclass(frozen=True)
class Churn:
    """The raising of the noise: S_churn, S_tmin, S_tmax, S_noise and the number of steps."""

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
        """(x, t) with more noise; as they are where there is none to add, or no time of more noise
        to go to.
        """
        level, gamma = schedule.noise_level(t), min(self.amount / self.steps, math.sqrt(2) - 1)
        if gamma == 0 or not self.low <= level <= self.high or math.isinf(level):
            return x, t
        up = schedule.at_noise_level(level * (1 + gamma))
        if up <= t:
            return x, t
        return noisier(x, self.scale * noise(), schedule.point(t), schedule.point(up)), up


@traits(order=2, calls=2, noise=True)
def edm(
    x: Tensor,
    times: Sequence[float],
    schedule: Schedule,
    noise: Noise,
    churn: float = 40.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    churn_noise: float = 1.0,
) -> Run:
    """Two network calls a step, one for a last step to t = 0."""
    churned, straight = (
        Churn(churn, churn_from, churn_to, churn_noise, len(times) - 1),
        Straight(schedule),
    )
    for t, s in pairwise(times):
        x, t = churned(x, t, schedule, noise)
        first = yield x, t
        end = place(first, schedule.point(s))
        if schedule.point(s)[1] == 0:  # there is nothing to ask at t = 0
            return end
        second = yield end, s
        (c_t, b_t), (c_s, b_s) = straight.at(t), straight.at(s)
        half, (of_x0, of_eps) = c_s * (b_s - b_t) / 2, straight.slope
        x = first.at(half * of_x0, half * of_eps, c_s / c_t, x).add_(
            second.at(half * of_x0, half * of_eps)
        )
    return x
