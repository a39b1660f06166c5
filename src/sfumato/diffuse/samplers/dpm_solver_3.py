"""DPM-Solver-3, singlestep: two points on the way correct the step.

(Lu et al. 2022, arXiv:2206.00927, algorithm 2.) They lie at r1 and r2 of h, the step in
log(alpha/sigma):

    u1 = (alpha_1/alpha_t) x - sigma_1 (e^(r1 h) - 1) eps_t,  D1 = eps_1 - eps_t
    u2 = (alpha_2/alpha_t) x - sigma_2 (e^(r2 h) - 1) eps_t
         - sigma_2 (r2/r1) ((e^(r2 h) - 1)/(r2 h) - 1) D1,  D2 = eps_2 - eps_t
    x_s = (alpha_s/alpha_t) x - sigma_s (e^h - 1) eps_t - sigma_s/r2 ((e^h - 1)/h - 1) D2

Steps from or to an end are DDIM's.
"""

import math
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import (
    ddim_step,
    exp_step_eps,
    log_snr_step,
    no_signal,
    time_between,
)
from sfumato.errors import UserError


@traits(order=3, calls=3)
def dpm_solver_3(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> Run:
    """Call the network three times a step, once for a step from alpha = 0 or to sigma = 0.

    Options:
        r1: Place of the first point; 0 < r1 < r2.
        r2: Place of the second point; r1 < r2 < 1.
    """
    if not 0 < r1 < r2 < 1:
        raise UserError(f"r1={r1}, r2={r2}: expected 0 < r1 < r2 < 1")
    for t, s in pairwise(times):
        first = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        if no_signal(here) or there[1] == 0:
            x = ddim_step(first, there)
            continue
        h = log_snr_step(here, there)
        t1, t2 = (time_between(schedule, here, there, r) for r in (r1, r2))
        p1, p2 = schedule.point(t1), schedule.point(t2)
        d1 = (yield exp_step_eps(x, first.eps, here, p1), t1).eps - first.eps
        bend = p2[1] * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1)
        d2 = (yield exp_step_eps(x, first.eps, here, p2) - bend * d1, t2).eps - first.eps
        x = exp_step_eps(x, first.eps, here, there) - (there[1] / r2 * (math.expm1(h) / h - 1)) * d2
    return x
