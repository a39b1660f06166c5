"""DPM-Solver-2, singlestep: the noise at a middle point corrects the step.

(Lu et al. 2022, arXiv:2206.00927, algorithm 1.) With h the step in log(alpha/sigma) and m at r1 of
it: u = (alpha_m/alpha_t) x - sigma_m (e^(r1 h) - 1) eps_t, then x_s = (alpha_s/alpha_t) x - sigma_s
(e^h - 1) (eps_t + (eps_m - eps_t)/(2 r1)). Steps from or to an end, where h is infinite, are
DDIM's.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import ddim_step, exp_step_eps, no_signal, time_between
from sfumato.validate import number_in


@traits(order=2, calls=2)
def dpm_solver_2(x: Tensor, times: Times, schedule: Schedule, noise: Noise, r1: float = 0.5) -> Run:
    """Call the network twice a step, once for a step from alpha = 0 or to sigma = 0.

    Options:
        r1: Place of the middle point, in (0, 1).
    """
    number_in("r1", r1, above=0, below=1, hint="0.5 is the midpoint")
    for t, s in pairwise(times):
        first = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        if no_signal(here) or there[1] == 0:
            x = ddim_step(first, there)
            continue
        m = time_between(schedule, here, there, r1)
        second = yield exp_step_eps(x, first.eps, here, schedule.point(m)), m
        x = exp_step_eps(x, first.eps + (second.eps - first.eps) * (0.5 / r1), here, there)
    return x
