"""Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1): go to the clean
latent, add fresh noise, again.

x_s = alpha_s x0 + sigma_s noise, for networks that give the end of the flow through x at once. With
an ordinary denoiser it blurs.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.schedule import Schedule
from sfumato.types import Noise


@traits(order=1, noise=True, network="consistency")
def consistency(x: Tensor, times: Sequence[float], schedule: Schedule, noise: Noise) -> Run:
    """One network call a step."""
    for t, s in pairwise(times):
        prediction = yield x, t
        alpha, sigma = schedule.point(s)
        x = prediction.at(alpha, 0.0)
        if sigma > 0:
            x.add_(sigma * noise())
    return x
