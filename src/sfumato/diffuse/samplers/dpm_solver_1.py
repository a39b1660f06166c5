"""DPM-Solver-1 (Lu et al. 2022, arXiv:2206.00927, eq. 3.7), which is DDIM.

x_s = (alpha_s/alpha_t) x - sigma_s (e^h - 1) eps, h the step in log(alpha/sigma). As section 4.1
shows: sigma_s e^h = alpha_s sigma_t / alpha_t, and x - sigma_t eps = alpha_t x0.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import ddim_step


@traits(order=1, uses_x0_and_eps=True)
def dpm_solver_1(x: Tensor, times: Times, schedule: Schedule, noise: Noise) -> Run:
    """Call the network once a step."""
    for t, s in pairwise(times):
        prediction = yield x, t
        x = ddim_step(prediction, schedule.point(s))
    return x
