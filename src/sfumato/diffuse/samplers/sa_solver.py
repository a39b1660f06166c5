"""SA-Solver: stochastic Adams, a multistep predictor and corrector that draw noise.

(Xue et al. 2023, arXiv:2309.05019, eq. 14 and 17, algorithm 1.) Data prediction, with h the step in
lambda = log(alpha/sigma), a = 1 + tau^2 and l_i the Lagrange polynomials through the last calls,
for the corrector also through the end:

    x_s = (sigma_s/sigma_t) e^(-tau^2 h) x + alpha_s sum_i b_i x0_i
          + sigma_s sqrt(1 - e^(-2 tau^2 h)) noise
    b_i = a (integral over u from -h to 0 of e^(a u) l_i(lambda_s + u))

Through two points the integral of the slope is a h^2/2, which is equal to O(h^3) (the authors'
code). The corrector repeats a step with the noise of the step.
"""

import math
from functools import lru_cache

import numpy as np
from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import Point, half_log_snr, log_snr_step, weighted_sum
from sfumato.validate import number_in, whole_number

Calls = list[tuple[Tensor, float]]
"""(x0, lambda) of network calls, the latest first."""


@lru_cache(maxsize=1024)
def weights(places: tuple[float, ...], k: float) -> list[float]:
    """Return b_i for k = a h and points at (lambda - lambda_s)/h: -1 is the start, 0 the end."""
    moments = [-math.expm1(-k)]  # k (integral over v from -1 to 0 of e^(k v) v^p)
    if len(places) == 1:
        return moments
    if len(places) == 2:
        slope = k / 2 / (places[0] - places[1])
        result = [slope, -slope]
        result[places.index(-1.0)] += moments[0]
        return result
    for p in range(1, len(places)):
        moments.append(-math.exp(-k) * (-1) ** p - p / k * moments[-1])
    result = []
    for i, place in enumerate(places):
        others = [q for j, q in enumerate(places) if j != i]
        basis = np.poly(others)[::-1] / math.prod(place - q for q in others)  # rising powers of v
        result.append(float(sum(c * m for c, m in zip(basis, moments, strict=True))))
    return result


@traits(order=2, noise=True)
def sa_solver(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    predictor: int = 2,
    corrector: int = 2,
    tau: float = 1.0,
    low: float = 0.2,
    high: float = 0.8,
    lower_order_final: bool = True,
    corrected_end: bool = False,
) -> Run:
    """Call the network once a step: the corrector uses the next step's call.

    Options:
        predictor: Order of the predictor, from 1 to 4.
        corrector: Order of the corrector, from 1 to 4; 0 leaves it out.
        tau: Amount of noise, at least 0.
        low: Least t at which noise is drawn, on a table in timesteps of 1000.
        high: Highest t at which noise is drawn.
        lower_order_final: Lower the order over the last steps, which is stabler.
        corrected_end: In runs that end above t = 0: correct the last step too, by one more call at
            the end. It counts as a step of lower_order_final.
    """
    whole_number("predictor", predictor, 1, 4)
    whole_number("corrector", corrector, 0, 4)
    number_in("tau", tau, 0, hint="0 is deterministic, 1 is the usual")
    number_in("low", low, 0, 1)
    number_in("high", high, 0, 1)
    last: tuple[Tensor, Point, float, Tensor | None, Calls] | None = None
    history: Calls = []
    corrected_end = corrected_end and times[-1] > 0
    count = len(times) - 1 + corrected_end
    ends = [*times[1:], None] if corrected_end and corrector else times[1:]
    for index, (t, s) in enumerate(zip(times, ends, strict=False)):
        x0, here = (yield x, t).x0, schedule.point(t)
        call = x0, half_log_snr(here)
        if last is not None:
            *start, points = last
            x = _step(*start, [call, *points], here)
        there = (0.0, 0.0) if s is None else schedule.point(s)
        if there[1] == 0:
            return x if s is None else x0
        history = [call, *history][: max(predictor, corrector - 1)]
        left = count - index if lower_order_final else predictor + corrector
        # One draw a step, so that the noise of a step does not depend on `low` and `high`.
        draw = noise() if tau > 0 else None
        inside = low <= round(t - schedule.first, 9) <= high
        start = x, here, tau if inside else 0.0, draw
        x = _step(*start, history[: min(predictor, left)], there)
        last = (*start, history[: min(corrector, left + 1) - 1]) if corrector and here[0] else None
        history = history if here[0] else []
    return x


def _step(
    x: Tensor, here: Point, tau: float, noise: Tensor | None, points: Calls, there: Point
) -> Tensor:
    """Step through the clean latents of calls."""
    h, tau2, end = log_snr_step(here, there), tau**2, half_log_snr(there)
    kept = math.exp(-tau2 * h) if tau2 else 1.0
    # exactly -1 and 0 at the step's own ends; -1 also where h is infinite
    ends = {half_log_snr(here): -1.0, end: 0.0}
    places = tuple(ends[at] if at in ends else (at - end) / h for _, at in points)
    terms = zip(points, weights(places, (1 + tau2) * h), strict=True)
    stay = there[1] / here[1] * kept
    x = weighted_sum((stay, x), *((there[0] * weight, x0) for (x0, _), weight in terms))
    return x if noise is None else x.add_((there[1] * math.sqrt(1 - kept**2)) * noise)
