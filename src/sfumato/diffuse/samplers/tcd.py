"""Sampler of trajectory consistency distillation: strategic stochastic sampling.

(Zheng et al. 2024, arXiv:2402.19159, algorithm 4.) Each step goes past its end, to s' = (1 - eta) s
(on a table: in timesteps, rounded down), by DDIM's step, and comes back by adding noise: x_s =
(alpha_s/alpha_s') x_s' + sqrt(sigma_s^2 - (alpha_s sigma_s'/alpha_s')^2) noise. eta 0 is DDIM, eta
1 is consistency sampling.
"""

import math
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import added_noise
from sfumato.validate import number_in


@traits(order=1, noise=True, network_type="consistency", exact={"eta": 1.0})
def tcd(x: Tensor, times: Times, schedule: Schedule, noise: Noise, eta: float = 0.3) -> Run:
    """Call the network once a step.

    Options:
        eta: Share of each step that is noise drawn anew, in [0, 1].
    """
    number_in("eta", eta, 0, 1, hint="0 is deterministic")
    for t, s in pairwise(times):
        prediction = yield x, t
        past, there = (1 - eta) * s, schedule.point(s)
        # In whole timesteps, of which the first, 0, is at t = 1/grid.
        if schedule.grid is not None and 0 < past < s:
            past = (math.floor(round((1 - eta) * (s * schedule.grid - 1), 6)) + 1) / schedule.grid
        alpha, sigma = schedule.point(past)
        ratio, added = added_noise((alpha, sigma), there)
        x = prediction.at(ratio * alpha, ratio * sigma)
        if past < s:
            x.add_(added * noise())
    return x
