"""DPM-Solver++(2S) for the stochastic equation, singlestep (k-diffusion's "DPM++ SDE").

(Lu et al. 2022, arXiv:2211.01095.) An ancestral step to the middle in log(alpha/sigma), then the
whole step again with x0 = (1 - 1/(2r)) x0_t + x0_m/(2r), each with its own noise. Steps from or to
an end, where there is no middle, are single ancestral ones.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import (
    Point,
    ancestral,
    at_an_end,
    exp_step_x0,
    time_between,
    weighted_sum,
)
from sfumato.types import Prediction
from sfumato.validate import number_in


@traits(order=2, calls=2, noise=True)
def dpmpp_sde(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    eta: float = 1.0,
    r: float = 0.5,
) -> Run:
    """Call the network twice a step, once for a step from alpha = 0 or to sigma = 0.

    Options:
        eta: Share of the noise that is drawn anew, in [0, 1].
        r: Place of the middle point, in (0, 1).
    """
    number_in("eta", eta, 0, 1, hint="0 is deterministic")
    number_in("r", r, above=0, below=1, hint="0.5 is the midpoint")

    def step(x0: Tensor | Prediction, here: Point, there: Point) -> Tensor:
        down, up = ancestral(here, there, eta)
        x_down = exp_step_x0(x, x0, here, (there[0], down))
        return x_down.add_(up * noise()) if up > 0 else x_down

    for t, s in pairwise(times):
        first = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        if at_an_end(here, there):
            x = step(first, here, there)
            continue
        m = time_between(schedule, here, there, r)
        second = yield step(first, here, schedule.point(m)), m
        x = step(weighted_sum((1 - 0.5 / r, first.x0), (0.5 / r, second.x0)), here, there)
    return x
