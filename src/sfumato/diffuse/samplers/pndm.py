"""PNDM: three pseudo Runge-Kutta steps, then the pseudo linear multistep method.

(Liu et al. 2022, arXiv:2202.09778, eq. 12-14.) A pseudo Runge-Kutta step calls the network at t,
twice at the middle m and at s, moving each time by DDIM's step: e = (e_1 + 2 e_2 + 2 e_3 + e_4)/6.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers.plms import multistep, transfer


@traits(order=2, calls=4)
def pndm(x: Tensor, times: Times, schedule: Schedule, noise: Noise) -> Run:
    """Call the network four times in each of the first three steps, then once a step."""
    noises: list[Tensor] = []
    for index, (t, s) in enumerate(pairwise(times)):
        prediction = yield x, t
        here, there, e1 = schedule.point(t), schedule.point(s), prediction.eps
        noises = [e1, *noises][:4]
        if index < 3 and there[1] > 0:
            m = (t + s) / 2
            middle = schedule.point(m)
            e2 = (yield transfer(x, prediction, e1, here, middle), m).eps
            e3 = (yield transfer(x, prediction, e2, here, middle), m).eps
            e4 = (yield transfer(x, prediction, e3, here, there), s).eps
            eps = (e1 + 2 * e2 + 2 * e3 + e4) * (1 / 6)
        else:
            eps = multistep(noises)
        x = transfer(x, prediction, eps, here, there)
    return x
