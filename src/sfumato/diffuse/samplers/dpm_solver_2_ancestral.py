"""DPM-Solver-2 with ancestral noise: a step of `dpm_solver_2` to less noise than asked for, and
fresh noise up to it (k-diffusion's "DPM2 a").

down and up are those of DDIM's posterior with eta (Song et al. 2021, arXiv:2010.02502, eq. 16); the
step from (alpha_t, sigma_t) to (alpha_s, down) asks at its middle in log(alpha/sigma) (Lu et al.
2022, arXiv:2206.00927, algorithm 1). Steps from or to an end are single ancestral ones.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.samplers._steps import (
    along,
    ancestral,
    between,
    half_log_snr,
    no_signal,
    place,
)
from sfumato.diffuse.schedule import Schedule
from sfumato.types import Noise
from sfumato.validate import number_in


@traits(order=2, calls=2, noise=True)
def dpm_solver_2_ancestral(
    x: Tensor, times: Sequence[float], schedule: Schedule, noise: Noise, eta: float = 1.0
) -> Run:
    """eta in [0, 1]: how much of the noise is drawn anew. Two network calls a step, one for a step
    from alpha = 0 or to sigma = 0.
    """
    number_in("eta", eta, 0, 1, hint="0 is deterministic")
    for t, s in pairwise(times):
        first = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        down, up = ancestral(here, there, eta)
        lower = there[0], down
        if no_signal(here) or down == 0:
            x = place(first, lower)
        else:
            m = schedule.at_noise_level(math.exp(-half_log_snr(here) - between(here, lower) / 2))
            second = yield along(x, first.eps, here, schedule.point(m)), m
            x = along(x, second.eps, here, lower)
        if up > 0:
            x.add_(up * noise())
    return x
