"""UniPC: a multistep predictor, and a corrector that uses the next call's prediction too.

(Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6.) Data prediction, with h the step in
log(alpha/sigma), D_i = (x0_i - x0_t)/r_i for the points before at r_i h and, for the corrector, the
end itself (r = 1):

    x_s = (sigma_s/sigma_t) x + alpha_s (1 - e^-h) x0_t - alpha_s B sum_i rho_i D_i

where sum_i rho_i r_i^(k-1) = k! phi_k/B with phi_1 = (e^-h - 1)/(-h) - 1 and
phi_(k+1) = phi_k/(-h) - 1/(k+1)!; B = -h ("bh1") or e^-h - 1 ("bh2").
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import (
    Point,
    at_an_end,
    exp_step_x0,
    half_log_snr,
    log_snr_step,
    weighted_sum,
)
from sfumato.validate import one_of, whole_number


@lru_cache(maxsize=1024)
def weights(ratios: tuple[float, ...], h: float, kind: str) -> list[float]:
    """Return B(h) rho_i for points at ratios r_i of the step h; `kind` is "bh1" or "bh2"."""
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
    times: Times,
    schedule: Schedule,
    noise: Noise,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    corrected_end: bool = False,
) -> Run:
    """Call the network once a step: the corrector uses the next step's call.

    Options:
        order: Of the predictor, from 1 to 4; the corrector adds up to one.
        variant: "bh1" or "bh2".
        corrector: False leaves the corrector out.
        lower_order_final: Lower the order over the last steps, which is stabler.
        corrected_end: In runs that end above t = 0: correct the last step too, by one more call at
            the end. It counts as a step of lower_order_final.
    """
    whole_number("order", order, 1, 4, hint="2 is the usual with guidance, 3 without")
    one_of("variant", variant, ("bh1", "bh2"))
    # The corrector's start, and (x0, log(alpha/sigma)) of the calls before, the latest first.
    last: tuple[Tensor, Point, list[tuple[Tensor, float]], float] | None = None
    history: list[tuple[Tensor, float]] = []
    corrected_end = corrected_end and times[-1] > 0
    count = len(times) - 1 + corrected_end
    ends = [*times[1:], None] if corrected_end and corrector else times[1:]
    for index, (t, s) in enumerate(zip(times, ends, strict=False)):
        x0, here = (yield x, t).x0, schedule.point(t)
        if corrector and last is not None:
            begin, point, points, h = last
            x = _step(begin, points, (x0, half_log_snr(here)), point, here, h, variant)
        if s is None:
            break
        there, last = schedule.point(s), None
        if at_an_end(here, there):
            x = exp_step_x0(x, x0, here, there)
            continue
        history = [(x0, half_log_snr(here)), *history][:order]
        points = history[: min(order, count - index) if lower_order_final else order]
        h = log_snr_step(here, there)
        last = x, here, points, h
        x = _step(x, points, None, here, there, h, variant)
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
    """Step from `here` with the history and, for the corrector, the value at the end."""
    x0, latest = points[0]
    others = [*points[1:], *([end] if end is not None else [])]
    ratios = tuple((at - latest) / h for _, at in others)
    bends = [
        there[0] * weight / ratio
        for weight, ratio in zip(weights(ratios, h, kind) if others else (), ratios, strict=True)
    ]
    stay = there[1] / here[1]
    return weighted_sum(
        (stay, x),
        (there[0] - here[0] * stay + sum(bends), x0),
        *((-bend, value) for bend, (value, _) in zip(bends, others, strict=True)),
    )
