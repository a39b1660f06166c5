"""DPM-Solver-2 with ancestral noise (k-diffusion's "DPM2 a").

A step of `dpm_solver_2` goes below the next noise level, and fresh noise goes up to it. down and up
are those of DDIM's posterior with eta (Song et al. 2021, arXiv:2010.02502, eq. 16). The step from
(alpha_t, sigma_t) to (alpha_s, down) calls the network at its middle in log(alpha/sigma) (Lu et al.
2022, arXiv:2206.00927, algorithm 1). Steps from or to an end are single ancestral ones.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import (
    ancestral,
    ddim_step,
    exp_step_eps,
    no_signal,
    time_between,
)
from sfumato.validate import number_in


@traits(order=2, calls=2, noise=True)
def dpm_solver_2_ancestral(
    x: Tensor, times: Times, schedule: Schedule, noise: Noise, eta: float = 1.0
) -> Run:
    """Call the network twice a step, once for a step from alpha = 0 or to sigma = 0.

    Options:
        eta: Share of the noise that is drawn anew, in [0, 1].
    """
    number_in("eta", eta, 0, 1, hint="0 is deterministic")
    for t, s in pairwise(times):
        first = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        down, up = ancestral(here, there, eta)
        lower = there[0], down
        if no_signal(here) or down == 0:
            x = ddim_step(first, lower)
        else:
            m = time_between(schedule, here, lower, 0.5)
            second = yield exp_step_eps(x, first.eps, here, schedule.point(m)), m
            x = exp_step_eps(x, second.eps, here, lower)
        if up > 0:
            x.add_(up * noise())
    return x
