"""DPM-Solver++(3M) for the stochastic equation: the two steps before correct this one.

(Lu et al. 2022, arXiv:2211.01095; k-diffusion's `eta`.) With h the step in log(alpha/sigma),
k = (1 + eta) h, x0 + u c1 + u^2 c2 the parabola through the last three clean latents (u = 1 at the
end), and phi = 1 - (1 - e^-k)/k:

    x_s = (sigma_s/sigma_t) e^(-eta h) x + alpha_s ((1 - e^-k) x0 + phi c1 + (1 - 2 phi/k) c2)
          + sigma_s sqrt(1 - e^(-2 eta h)) noise

The authors' code, k-diffusion and diffusers have 1/2 - phi/k at c2, half of the integral, and so
are of order two: `published=True` gives their results.
"""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import log_snr_step, weighted_sum
from sfumato.validate import number_in, one_of, whole_number


@traits(order=3, noise=True)
def dpmpp_3m_sde(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    eta: float = 1.0,
    published: bool = False,
    solver: Literal["midpoint", "heun"] = "heun",
    lower_order_final: bool = False,
    lower_below: int = 0,
    last_order: int = 1,
    euler_at_final: bool = False,
) -> Run:
    """Call the network once a step; steps from or to an end are first-order.

    Options:
        eta: Amount of noise that is drawn anew, at least 0.
        published: Half of the quadratic term, as in other implementations (order two).
        solver: "midpoint" or "heun", of second-order steps (see dpmpp_2m_sde.py), such as the
            second of a run.
        lower_order_final: Lower the order to 2 and 1 over the last two steps, which is stabler in
            few steps.
        lower_below: Do so in runs of fewer steps than this (diffusers: 15).
        last_order: 2 lowers the order to 2 in the last step alone, where it is lowered.
        euler_at_final: Make the last step first-order, and lower no other; to t = 0 it always is.
    """
    number_in("eta", eta, 0, hint="0 is deterministic, 1 is the usual")
    one_of("solver", solver, ("midpoint", "heun"))
    whole_number("last_order", last_order, 1, 3)
    before: list[tuple[Tensor, float]] = []  # (x0, h) of the last steps, the latest first
    count = len(times) - 1
    lower = lower_order_final or count < lower_below
    for index, (t, s) in enumerate(pairwise(times)):
        x0 = (yield x, t).x0
        here, there = schedule.point(t), schedule.point(s)
        h = log_snr_step(here, there)
        if there[1] == 0:
            x = x0
            continue
        kept, k = (math.exp(-eta * h) if eta else 1.0), (1 + eta) * h
        gain = -math.expm1(-k)  # 1 - e^-k
        history = before[: count - index - 2 + last_order] if lower else before
        if euler_at_final and index == count - 1:
            history = []
        weights = [gain]  # of x0 and of those before it
        if history:
            r0, phi = history[0][1] / h, 1 - gain / k
            # Divided differences, as weights of the same.
            slope, bend = [1 / r0, -1 / r0], [0.0, 0.0]
            if len(history) > 1:
                r1 = history[1][1] / h
                slope, second = [*slope, 0.0], [0.0, 1 / r1, -1 / r1]
                bend = [(a - b) / (r0 + r1) for a, b in zip(slope, second, strict=True)]
                slope = [a + r0 * b for a, b in zip(slope, bend, strict=True)]
            elif solver == "midpoint":
                phi = gain / 2
            curve = (0.5 if published else 1.0) * (1 - 2 * phi / k)
            weights = [phi * a + curve * b for a, b in zip(slope, bend, strict=True)]
            weights[0] += gain
        points = [x0, *(old for old, _ in history)]
        x = weighted_sum(
            (there[1] / here[1] * kept, x),
            *((there[0] * weight, old) for weight, old in zip(weights, points, strict=True)),
        )
        if eta:
            x.add_((there[1] * math.sqrt(1 - kept**2)) * noise())
        before = [] if here[0] == 0 else [(x0, h), *before[:1]]
    return x
