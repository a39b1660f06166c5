"""DPM-Solver-1 (Lu et al. 2022, arXiv:2206.00927, eq. 3.7): x_s = (alpha_s/alpha_t) x - sigma_s
(e^h - 1) eps, h the step in log(alpha/sigma).

It is DDIM, as its authors show in section 4.1: sigma_s e^h = alpha_s sigma_t / alpha_t, and x -
sigma_t eps = alpha_t x0.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.samplers._steps import place
from sfumato.diffuse.schedule import Schedule
from sfumato.types import Noise


@traits(order=1, both=True)
def dpm_solver_1(x: Tensor, times: Sequence[float], schedule: Schedule, noise: Noise) -> Run:
    """One network call a step."""
    for t, s in pairwise(times):
        prediction = yield x, t
        x = place(prediction, schedule.point(s))
    return x
