"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12).

x_s = alpha_s*x0 + sqrt(sigma_s^2 - nu^2)*eps + nu*noise, where nu is the standard deviation of eq.
16 written for any (alpha, sigma): nu^2 = eta^2 * sigma_s^2 * (1 - (alpha_t*sigma_s /
(alpha_s*sigma_t))^2). eta 0 is deterministic, eta 1 is DDPM.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import ancestral, ddim_step
from sfumato.validate import number_in


@traits(order=1, uses_x0_and_eps=True)
def ddim(x: Tensor, times: Times, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Run:
    """Call the network once a step.

    Options:
        eta: Share of the noise that is drawn anew, in [0, 1].
    """
    number_in("eta", eta, 0, 1, hint="0 is deterministic, 1 is DDPM")
    for t, s in pairwise(times):
        prediction = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        down, up = ancestral(here, there, eta)
        x = ddim_step(prediction, (there[0], down))
        if up > 0:
            x.add_(up * noise())
    return x
