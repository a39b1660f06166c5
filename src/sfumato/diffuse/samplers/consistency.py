"""Multistep consistency sampling: to the clean latent, fresh noise on it, and again.

(Song et al. 2023, arXiv:2303.01469, algorithm 1.) x_s = alpha_s x0 + sigma_s noise, for networks
that predict the end of the flow through x. With an ordinary denoiser samples are blurred. Where the
flow ends at a noise level e above 0, the noise is sqrt(sigma_s^2 - alpha_s^2 e^2).
"""

import math
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.validate import number_in


@traits(order=1, noise=True, network_type="consistency")
def consistency(
    x: Tensor, times: Times, schedule: Schedule, noise: Noise, sigma_min: float = 0.0
) -> Run:
    """Call the network once a step.

    Options:
        sigma_min: e, the noise level at which the network's results lie; 0.002 for EDM's.
    """
    number_in("sigma_min", sigma_min, 0)
    for t, s in pairwise(times):
        prediction = yield x, t
        alpha, sigma = schedule.point(s)
        x = prediction.at(alpha, 0.0)
        if sigma > 0:
            # the square root of a square may differ in its last bit
            added = math.sqrt(max(sigma**2 - (alpha * sigma_min) ** 2, 0.0)) if sigma_min else sigma
            x.add_(added * noise())
    return x
