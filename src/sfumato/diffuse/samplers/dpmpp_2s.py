"""DPM-Solver++(2S), singlestep: the clean latent at a middle point corrects the step.

(Lu et al. 2022, arXiv:2211.01095, algorithm 1.) With h the step in log(alpha/sigma) and m at r of
it: u = (sigma_m/sigma_t) x + alpha_m (1 - e^(-r h)) x0_t, then x_s = (sigma_s/sigma_t) x + alpha_s
(1 - e^-h) ((1 - 1/(2r)) x0_t + x0_m/(2r)). Steps from or to an end, where h is infinite, are
DDIM's.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import at_an_end, exp_step_x0, time_between
from sfumato.validate import number_in


@traits(order=2, calls=2)
def dpmpp_2s(x: Tensor, times: Times, schedule: Schedule, noise: Noise, r: float = 0.5) -> Run:
    """Call the network twice a step, once for a step from alpha = 0 or to sigma = 0.

    Options:
        r: Place of the middle point, in (0, 1).
    """
    number_in("r", r, above=0, below=1, hint="0.5 is the midpoint")
    for t, s in pairwise(times):
        first = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        x0 = first.x0
        if not at_an_end(here, there):
            m = time_between(schedule, here, there, r)
            second = yield exp_step_x0(x, x0, here, schedule.point(m)), m
            x0 = x0 * (1 - 0.5 / r) + second.x0 * (0.5 / r)
        x = exp_step_x0(x, x0, here, there)
    return x
