"""UniPC: a multistep predictor, and a corrector that uses the next call's answer too (Zhao et al.
2023, arXiv:2302.04867, algorithms 5 and 6).

Data prediction, with h the step in log(alpha/sigma), D_i = (x0_i - x0_t)/r_i for the points before
at r_i h and, for the corrector, the end itself (r = 1): x_s = (sigma_s/sigma_t) x + alpha_s (1 -
e^-h) x0_t - alpha_s B sum_i rho_i D_i, where sum_i rho_i r_i^(k-1) = k! phi_k/B with phi_1 = (e^-h
- 1)/(-h) - 1 and phi_(k+1) = phi_k/(-h) - 1/(k+1)!; B = -h ("bh1") or e^-h - 1 ("bh2"). One network
call a step: the corrector takes the next one's.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from sfumato.diffuse.samplers import Run, traits
from sfumato.diffuse.samplers._steps import Point, at_an_end, between, half_log_snr, total, towards
from sfumato.diffuse.schedule import Schedule
from sfumato.types import Noise
from sfumato.validate import one_of, whole_number


@lru_cache(maxsize=1024)
def weights(ratios: tuple[float, ...], h: float, kind: str) -> list[float]:
    """B(h) rho_i for points at ratios r_i of the step h."""
    k = -h
    scale = k if kind == "bh1" else math.expm1(k)
    phi, factorial, right = math.expm1(k) / k - 1, 1, []
    for i in range(1, len(ratios) + 1):
        right.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / k - 1 / factorial
    if len(ratios) == 1:  # the paper's choice for one point: as accurate, and independent of B
        return [scale * 0.5]
    matrix = np.array([[r**p for r in ratios] for p in range(len(ratios))])
    return (scale * np.linalg.solve(matrix, np.array(right))).tolist()


@traits(order=2)
def unipc(
    x: Tensor,
    times: Sequence[float],
    schedule: Schedule,
    noise: Noise,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Run:
    """order from 1 to 4 (the predictor's; the corrector adds up to one). `lower_order_final` lowers
    it over the last steps, which is stabler.

    One network call a step.
    """
    whole_number("order", order, 1, 4, hint="2 is the usual with guidance, 3 without")
    one_of("variant", variant, ("bh1", "bh2"))
    # what the corrector begins from
    last: tuple[Tensor, Point, list[tuple[Tensor, float]], float, int] | None = None
    # (x0, log(alpha/sigma)) of the calls before, the latest first
    known: list[tuple[Tensor, float]] = []
    count = len(times) - 1
    for index, (t, s) in enumerate(pairwise(times)):
        x0 = (yield x, t).x0
        here, there = schedule.point(t), schedule.point(s)
        if corrector and last is not None:
            begin, point, points, h, used = last
            x = _step(begin, points[:used], (x0, half_log_snr(here)), point, here, h, variant)
        last = None
        if at_an_end(here, there):
            x = towards(x, x0, here, there)
            continue
        known = [(x0, half_log_snr(here)), *known][:order]
        used = min(len(known), order, count - index if lower_order_final else order)
        h = between(here, there)
        last = x, here, known, h, used
        x = _step(x, known[:used], None, here, there, h, variant)
    return x


def _step(
    x: Tensor,
    points: Sequence[tuple[Tensor, float]],
    end: tuple[Tensor, float] | None,
    here: Point,
    there: Point,
    h: float,
    kind: str,
) -> Tensor:
    """From `here` with the values known before and, for the corrector, the value at the end."""
    x0, place = points[0]
    others = [*points[1:], *([end] if end is not None else [])]
    ratios = tuple((at - place) / h for _, at in others)
    bends = [
        there[0] * weight / ratio
        for weight, ratio in zip(weights(ratios, h, kind) if others else (), ratios, strict=True)
    ]
    stay = there[1] / here[1]
    return total(
        (stay, x),
        (there[0] - here[0] * stay + sum(bends), x0),
        *((-bend, value) for bend, (value, _) in zip(bends, others, strict=True)),
    )
