"""DPM-Solver++(2M) for the stochastic equation.

(Lu et al. 2022, arXiv:2211.01095, section 5 and appendix; k-diffusion's `eta`.) With h the step in
log(alpha/sigma) and k = (1 + eta) h:

    x_s = (sigma_s/sigma_t) e^(-eta h) x + alpha_s (1 - e^-k) (x0 + (x0 - x0_before) h/(2 h_before))
          + sigma_s sqrt(1 - e^(-2 eta h)) noise

`solver="heun"` weights the difference by alpha_s (1 - (1 - e^-k)/k) instead of alpha_s (1 -
e^-k)/2. eta 0 is DPM-Solver++(2M).
"""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import at_an_end, log_snr_step, weighted_sum
from sfumato.validate import number_in, one_of


@traits(order=2, noise=True)
def dpmpp_2m_sde(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    eta: float = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = False,
    lower_below: int = 0,
) -> Run:
    """Call the network once a step; steps from or to an end are first-order.

    Options:
        eta: Amount of noise that is drawn anew, at least 0.
        solver: "midpoint" or "heun".
        lower_order_final: Make the last step first-order, wherever it ends; to t = 0 it always is.
        lower_below: Do so in runs of fewer steps than this (diffusers: 15).
    """
    number_in("eta", eta, 0, hint="0 is deterministic, 1 is the usual")
    one_of("solver", solver, ("midpoint", "heun"))
    before: tuple[Tensor, float] | None = None
    last = len(times) - 2 if lower_order_final or len(times) <= lower_below else None
    for index, (t, s) in enumerate(pairwise(times)):
        x0 = (yield x, t).x0
        here, there = schedule.point(t), schedule.point(s)
        h = log_snr_step(here, there)
        if there[1] == 0:
            x = x0
            continue
        kept = math.exp(-eta * h) if eta else 1.0  # e^-inf = 0 where alpha is 0
        gain = -math.expm1(-(1 + eta) * h)  # 1 - e^-k
        stay = there[1] / here[1] * kept, x
        if before is not None and index != last and not at_an_end(here, there):
            bend = gain / 2 if solver == "midpoint" else 1 - gain / ((1 + eta) * h)
            bend *= h / before[1]
            x = weighted_sum(stay, (there[0] * (gain + bend), x0), (-there[0] * bend, before[0]))
        else:
            x = weighted_sum(stay, (there[0] * gain, x0))
        if eta:
            x.add_((there[1] * math.sqrt(1 - kept**2)) * noise())
        before = None if here[0] == 0 else (x0, h)
    return x
