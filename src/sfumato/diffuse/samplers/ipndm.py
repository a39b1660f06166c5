"""Improved PNDM: plms without its second call, begun by DDIM's step.

(Liu et al. 2022, arXiv:2202.09778, eq. 9 and 12; Zhang & Chen 2023, arXiv:2204.13902, section 3.4,
"iPNDM".) DDIM's step with e' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3)/24 of the last noises, fewer at
first, as for even steps in t.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers.plms import multistep, transfer
from sfumato.validate import whole_number


@traits(order=2)
def ipndm(x: Tensor, times: Times, schedule: Schedule, noise: Noise, order: int = 4) -> Run:
    """Call the network once a step.

    Options:
        order: Number of noises in the mean, from 1 (DDIM) to 4.
    """
    whole_number("order", order, 1, 4)
    noises: list[Tensor] = []
    for t, s in pairwise(times):
        prediction = yield x, t
        noises = [prediction.eps, *noises][:order]
        x = transfer(x, prediction, multistep(noises), schedule.point(t), schedule.point(s))
    return x
