"""DPM-Solver++(3M), multistep: the two steps before correct this one.

(Lu et al. 2022, arXiv:2211.01095, appendix; the formula is in dpmpp_3m_sde.py, with eta 0.)
"""

from typing import Literal

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers.dpmpp_3m_sde import dpmpp_3m_sde


@traits(order=3)
def dpmpp_3m(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    published: bool = False,
    solver: Literal["midpoint", "heun"] = "heun",
    lower_order_final: bool = False,
    lower_below: int = 0,
    last_order: int = 1,
    euler_at_final: bool = False,
) -> Run:
    """Call the network once a step; the options are those of `dpmpp_3m_sde`."""
    lower = {"lower_order_final": lower_order_final, "lower_below": lower_below}
    lower |= {"last_order": last_order, "euler_at_final": euler_at_final}
    return (yield from dpmpp_3m_sde(x, times, schedule, noise, 0.0, published, solver, **lower))
