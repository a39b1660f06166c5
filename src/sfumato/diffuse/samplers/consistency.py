"""Multistep consistency sampling: to the clean latent, fresh noise on it, and again.

(Song et al. 2023, arXiv:2303.01469, algorithm 1.) x_s = alpha_s x0 + sigma_s noise, for networks
that predict the end of the flow through x. With an ordinary denoiser samples are blurred.
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits


@traits(order=1, noise=True, network_type="consistency")
def consistency(x: Tensor, times: Times, schedule: Schedule, noise: Noise) -> Run:
    """Call the network once a step."""
    for t, s in pairwise(times):
        prediction = yield x, t
        alpha, sigma = schedule.point(s)
        x = prediction.at(alpha, 0.0)
        if sigma > 0:
            x.add_(sigma * noise())
    return x
