"""Euler's method with ancestral noise ("Euler a", k-diffusion).

A step goes below the next noise level, and fresh noise goes up to it. In r = sigma/alpha:
up^2 = eta^2 r_s^2 (r_t^2 - r_s^2)/r_t^2, down^2 = r_s^2 - up^2; a step to `down`, then `up` times
noise. With eta 1 it is DDPM's posterior (Ho et al. 2020, arXiv:2006.11239) written for the flow of
Karras et al. 2022 (arXiv:2206.00364).
"""

from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import ancestral, exp_step_x0
from sfumato.validate import number_in


@traits(order=1, noise=True)
def euler_ancestral(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    eta: float = 1.0,
    noise_scale: float = 1.0,
) -> Run:
    """Call the network once a step.

    Options:
        eta: Share of the noise that is drawn anew, in [0, 1].
        noise_scale: Factor of that noise, at least 0.
    """
    number_in("eta", eta, 0, 1, hint="0 is deterministic")
    number_in("noise_scale", noise_scale, 0)
    for t, s in pairwise(times):
        prediction = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        down, up = ancestral(here, there, eta)
        x = exp_step_x0(x, prediction, here, (there[0], down))
        if up > 0:
            x.add_((up * noise_scale) * noise())
    return x
