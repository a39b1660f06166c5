"""DPM-Solver++(2M), multistep: the step before corrects this one.

(Lu et al. 2022, arXiv:2211.01095, algorithm 2.) With h the step in log(alpha/sigma): x_s =
(sigma_s/sigma_t) x + alpha_s (1 - e^-h) (x0 + (x0 - x0_before) h/(2 h_before)). The first step, and
steps from or to an end, where h is infinite, are DDIM's.
"""

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers.dpmpp_2m_sde import dpmpp_2m_sde


@traits(order=2)
def dpmpp_2m(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    lower_order_final: bool = False,
    lower_below: int = 0,
) -> Run:
    """Call the network once a step.

    Options:
        lower_order_final: Make the last step first-order, wherever it ends; to t = 0 it always is.
        lower_below: Do so in runs of fewer steps than this (diffusers: 15).
    """
    lower = {"lower_order_final": lower_order_final, "lower_below": lower_below}
    return (yield from dpmpp_2m_sde(x, times, schedule, noise, eta=0.0, **lower))
