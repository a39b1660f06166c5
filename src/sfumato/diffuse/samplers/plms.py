"""PLMS: the pseudo linear multistep method, begun by a pseudo improved Euler step.

(Liu et al. 2022, arXiv:2202.09778, eq. 12 and 22.) DDIM's step with e' = (55 e_0 - 59 e_1 + 37 e_2
- 9 e_3)/24 of the last noises (fewer at first), as for even steps in t. The first step is made
twice: with e_0, and again with the mean of e_0 and the noise predicted at its end. It is Stable
Diffusion's first default sampler.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import Point, ddim_step, exp_step_eps, no_signal
from sfumato.types import Prediction

ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def multistep(noises: Sequence[Tensor]) -> Tensor:
    """Return Adams-Bashforth's mean of the last noises, the latest first."""
    weights = ADAMS[len(noises) - 1]
    mean = weights[0] * noises[0]
    for weight, eps in zip(weights[1:], noises[1:], strict=True):
        mean = mean + weight * eps
    return mean


def transfer(x: Tensor, prediction: Prediction, eps: Tensor, here: Point, there: Point) -> Tensor:
    """Take DDIM's step from x with another eps.

    Without signal at `here` eps is x up to scale, and the prediction's own pair is taken.
    """
    return ddim_step(prediction, there) if no_signal(here) else exp_step_eps(x, eps, here, there)


@traits(order=2, calls=2)
def plms(x: Tensor, times: Times, schedule: Schedule, noise: Noise) -> Run:
    """Call the network once a step, twice for the first."""
    noises: list[Tensor] = []
    for t, s in pairwise(times):
        prediction = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        noises = [prediction.eps, *noises][:4]
        if len(noises) == 1 and there[1] > 0:
            end = yield transfer(x, prediction, prediction.eps, here, there), s
            x = transfer(x, prediction, (prediction.eps + end.eps) * 0.5, here, there)
        else:
            x = transfer(x, prediction, multistep(noises), here, there)
    return x
