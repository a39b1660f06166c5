"""DDIM run backwards, from a clean latent to the noise that DDIM would make it from (Song et al.
2021, arXiv:2010.02502, section 4.3).

x_s = (alpha_s/alpha_t) x_t + (sigma_s - sigma_t alpha_s/alpha_t) eps(x_s, s) is what DDIM's step
from s to t inverts exactly. It is implicit in x_s: `iterations` fixed-point steps solve it (Pan et
al. 2023, arXiv:2309.04907); one, begun at x_t, is the usual approximation. Where there is more
noise than signal the same step is written by x0, which x_s hardly changes there, as eps is what it
hardly changes elsewhere.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.samplers._steps import along, towards
from sfumato.diffuse.schedule import Schedule
from sfumato.types import Noise
from sfumato.validate import positive_int


@traits(order=1, upward=True)
def ddim_inversion(
    x: Tensor, times: Sequence[float], schedule: Schedule, noise: Noise, iterations: int = 1
) -> Run:
    """x is the latent at the last of the times (0: clean); the result is the latent at the first.
    `iterations` network calls a step.
    """
    positive_int("iterations", iterations, unit="network calls a step")
    for t, s in pairwise(reversed(list(times))):
        here, there, found = schedule.point(t), schedule.point(s), x
        for k in range(iterations):
            prediction = yield found, s
            by_x0 = k > 0 and there[0] < there[1] and here[1] > 0  # the first is the published one
            found = (
                towards(x, prediction.x0, here, there)
                if by_x0
                else along(x, prediction.eps, here, there)
            )
        x = found
    return x
