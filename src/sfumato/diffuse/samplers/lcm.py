"""Sampler of latent consistency models: consistency sampling with a boundary condition.

(Luo et al. 2023, arXiv:2310.04378, algorithm 3.) f = c_skip x + c_out x0 with c_skip = d^2/(k^2 +
d^2), c_out = k/sqrt(k^2 + d^2), k = scaling * timestep (of 1000): the identity at timestep 0, x0
almost everywhere else. x_s = alpha_s f + sigma_s noise.
"""

import math
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.validate import number_in


@traits(order=1, noise=True, network_type="consistency")
def lcm(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Run:
    """Call the network once a step.

    Options:
        scaling: Of the timestep, above 0; `timestep_scaling` of diffusers' config.
        sigma_data: d, above 0.
    """
    number_in("scaling", scaling, above=0)
    number_in("sigma_data", sigma_data, above=0)
    for t, s in pairwise(times):
        prediction = yield x, t
        alpha, sigma = schedule.point(s)
        k = scaling * 1000 * max(t - schedule.first, 0.0)  # the timestep of a table of 1000
        skip, out = sigma_data**2 / (k**2 + sigma_data**2), k / math.hypot(k, sigma_data)
        x = prediction.at(alpha * out, 0.0, alpha * skip, x)
        if sigma > 0:
            x.add_(sigma * noise())
    return x
