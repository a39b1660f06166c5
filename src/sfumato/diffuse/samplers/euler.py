"""Euler's method on the flow of a diffusion model.

(Karras et al. 2022, arXiv:2206.00364, algorithm 1 without the correction.) x/alpha +
(sigma_s/alpha_s - sigma_t/alpha_t) eps, in any coordinates, is alpha_s*x0 + sigma_s*eps: the step
of DDIM with eta 0, and of a flow's x + (s - t)(eps - x0). With `churn` > 0 noise is added before
each step and removed by it (their algorithm 2, S_churn).
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import ddim_step
from sfumato.diffuse.samplers.edm import Churn


@traits(order=1, uses_x0_and_eps=True)
def euler(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    churn: float = 0.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    churn_noise: float = 1.0,
) -> Run:
    """Call the network once a step.

    Options:
        churn: S_churn.
        churn_from: S_tmin, a noise level sigma/alpha.
        churn_to: S_tmax, a noise level sigma/alpha.
        churn_noise: S_noise.
    """
    add_churn = Churn(churn, churn_from, churn_to, churn_noise, len(times) - 1)
    for t, s in pairwise(times):
        x, t = add_churn(x, t, schedule, noise)
        prediction = yield x, t
        x = ddim_step(prediction, schedule.point(s))
    return x
