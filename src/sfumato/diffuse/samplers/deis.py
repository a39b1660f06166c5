"""DEIS: eps extrapolated by a polynomial in log(sigma/alpha), integrated exactly.

(Zhang & Chen 2023, arXiv:2204.13902, section 4; "log rho".) d(x/alpha) = eps d(rho) with rho =
sigma/alpha: x_s/alpha_s = x_t/alpha_t + sum_i c_i eps_i, c_i the integral of the i-th Lagrange
polynomial in log rho. With u = log(rho/rho_t): integral of u^k d(rho) = rho u^k - k (integral of
u^(k-1)). The first step, and one from alpha = 0, is DDIM's.
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import ddim_step, exp_step_eps, no_signal, weighted_sum
from sfumato.validate import whole_number


@lru_cache(maxsize=1024)
def coefficients(points: tuple[float, ...], end: float) -> list[float]:
    """Return c_i from points[0] to `end`.

    Args:
        points: log rho of the last calls, the latest first.
        end: rho of the step's end, which may be 0.
    """
    begin = math.exp(points[0])
    u = math.log(end / begin) if end > 0 else 0.0  # end = 0: end * u^k -> 0, whatever k
    integral = [end - begin]
    for k in range(1, len(points)):
        integral.append(end * u**k - k * integral[-1])
    shifted, weights = [p - points[0] for p in points], []
    for i, p in enumerate(shifted):
        others = [q for j, q in enumerate(shifted) if j != i]
        basis = np.poly(others)[::-1] / math.prod(p - q for q in others)  # rising powers of u
        weights.append(float(sum(b * v for b, v in zip(basis, integral, strict=True))))
    return weights


@traits(order=2)
def deis(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    order: int = 2,
    lower_order_final: bool = True,
    lower_below: int = 0,
    last_order: int = 1,
) -> Run:
    """Call the network once a step.

    Options:
        order: From 1 (DDIM) to 4.
        lower_order_final: Lower the order over the last steps, which is stabler.
        lower_below: Do so in runs of fewer steps than this (diffusers: 15).
        last_order: Order of the last step where the order is lowered, one less than of the step
            before it.
    """
    whole_number("order", order, 1, 4)
    whole_number("last_order", last_order, 1, 4)
    history: list[tuple[Tensor, float]] = []  # (eps, log rho), the latest first
    count = len(times) - 1
    lower = lower_order_final or count < lower_below
    for index, (t, s) in enumerate(pairwise(times)):
        prediction = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        if no_signal(here):
            x = ddim_step(prediction, there)
            continue
        history = [(prediction.eps, math.log(here[1] / here[0])), *history][:order]
        used = history[: min(order, count - index - 1 + last_order) if lower else order]
        if len(used) == 1:
            x = exp_step_eps(x, prediction.eps, here, there)
            continue
        weights = coefficients(tuple(p for _, p in used), there[1] / there[0])
        x = weighted_sum(
            (there[0] / here[0], x),
            *((there[0] * c, eps) for (eps, _), c in zip(used, weights, strict=True)),
        )
    return x
