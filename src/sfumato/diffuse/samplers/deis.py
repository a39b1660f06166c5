"""DEIS: eps extrapolated by a polynomial in log(sigma/alpha), integrated exactly (Zhang & Chen
2023, arXiv:2204.13902, section 4; "log rho").

d(x/alpha) = eps d(rho) with rho = sigma/alpha: x_s/alpha_s = x_t/alpha_t + sum_i c_i eps_i, c_i the
integral of the i-th Lagrange polynomial in log rho. With u = log(rho/rho_t): integral of u^k d(rho)
= rho u^k - k (integral of u^(k-1)). The first step, and one from alpha = 0, is DDIM's.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.samplers._steps import along, no_signal, place, total
from sfumato.diffuse.schedule import Schedule
from sfumato.types import Noise
from sfumato.validate import whole_number


@lru_cache(maxsize=1024)
def coefficients(points: tuple[float, ...], end: float) -> list[float]:
    """c_i for log-rhos `points`, the latest first, from the first of them to the level `end` (a
    rho, which may be 0).
    """
    begin = math.exp(points[0])
    u = math.log(end / begin) if end > 0 else 0.0  # end = 0: end * u^k -> 0, whatever k
    integral = [end - begin]
    for k in range(1, len(points)):
        integral.append(end * u**k - k * integral[-1])
    shifted, found = [p - points[0] for p in points], []
    for i, p in enumerate(shifted):
        others = [q for j, q in enumerate(shifted) if j != i]
        basis = np.poly(others)[::-1] / math.prod(p - q for q in others)  # rising powers of u
        found.append(float(sum(b * v for b, v in zip(basis, integral, strict=True))))
    return found


@traits(order=2)
def deis(
    x: Tensor,
    times: Sequence[float],
    schedule: Schedule,
    noise: Noise,
    order: int = 2,
    lower_order_final: bool = True,
    lower_below: int = 0,
) -> Run:
    """order from 1 (DDIM) to 4. `lower_order_final` lowers it over the last steps, which is
    stabler. One network call a step.

    `lower_below`: does so in runs of fewer steps than that, where `lower_order_final` does not
    (diffusers: 15).
    """
    whole_number("order", order, 1, 4)
    known: list[tuple[Tensor, float]] = []  # (eps, log rho), the latest first
    count = len(times) - 1
    lower = lower_order_final or count < lower_below
    for index, (t, s) in enumerate(pairwise(times)):
        prediction = yield x, t
        here, there = schedule.point(t), schedule.point(s)
        if no_signal(here):
            x = place(prediction, there)
            continue
        known = [(prediction.eps, math.log(here[1] / here[0])), *known][:order]
        used = known[: min(order, count - index) if lower else order]
        if len(used) == 1:
            x = along(x, prediction.eps, here, there)
            continue
        weights = coefficients(tuple(p for _, p in used), there[1] / there[0])
        x = total(
            (there[0] / here[0], x),
            *((there[0] * c, eps) for (eps, _), c in zip(used, weights, strict=True)),
        )
    return x
