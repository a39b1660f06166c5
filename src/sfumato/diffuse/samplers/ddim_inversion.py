"""DDIM run backwards, from a clean latent to the noise that DDIM would make it from.

(Song et al. 2021, arXiv:2010.02502, section 4.3.) DDIM's step from s to t inverts exactly x_s =
(alpha_s/alpha_t) x_t + (sigma_s - sigma_t alpha_s/alpha_t) eps(x_s, s). It is implicit in x_s:
`iterations` fixed-point steps solve it (Pan et al. 2023, arXiv:2309.04907); one, begun at x_t, is
the usual approximation. Where there is more noise than signal the same step is written by x0, which
hardly changes with x_s there, as eps hardly changes elsewhere.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import exp_step_eps, exp_step_x0
from sfumato.validate import positive_int


@traits(order=1, inverts=True)
def ddim_inversion(
    x: Tensor, times: Times, schedule: Schedule, noise: Noise, iterations: int = 1
) -> Run:
    """Run from x at the last of the times (0: clean) to the latent at the first.

    Options:
        iterations: Network calls a step.
    """
    positive_int("iterations", iterations, unit="network calls a step")
    for t, s in pairwise(reversed(list(times))):
        here, there, x_s = schedule.point(t), schedule.point(s), x
        for k in range(iterations):
            prediction = yield x_s, s
            by_x0 = k > 0 and there[0] < there[1] and here[1] > 0  # the first is the published one
            x_s = (
                exp_step_x0(x, prediction.x0, here, there)
                if by_x0
                else exp_step_eps(x, prediction.eps, here, there)
            )
        x = x_s
    return x
