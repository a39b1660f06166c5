"""Linear multistep (Adams-Bashforth) for uneven steps (k-diffusion's "LMS").

In the coordinates of Karras et al. (2022, arXiv:2206.00364): x/c moves by the integral of the
polynomial through the last slopes over B (see `_steps.OdeCoordinates`: B is sigma/alpha and the
slope eps; for flows B is t and the slope eps - x0).
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import OdeCoordinates, weighted_sum
from sfumato.validate import whole_number


@lru_cache(maxsize=1024)
def coefficients(points: tuple[float, ...], end: float) -> list[float]:
    """Integrate the Lagrange polynomials through `points` from points[0] to `end`.

    Args:
        points: B of the last calls, the latest first.
        end: B of the step's end.
    """
    width = end - points[0]  # in units of the step, where the numbers are near 1
    shifted, integrals = [(p - points[0]) / width for p in points], []
    for i, p in enumerate(shifted):
        others = [q for j, q in enumerate(shifted) if j != i]
        basis = np.polyint(np.atleast_1d(np.poly(others))) / math.prod(p - q for q in others)
        integrals.append(float(np.polyval(basis, 1.0)) * width)
    return integrals


@traits(order=4)
def lms(x: Tensor, times: Times, schedule: Schedule, noise: Noise, order: int = 4) -> Run:
    """Call the network once a step.

    Options:
        order: From 1 (Euler) to 4.
    """
    whole_number("order", order, 1, 4)
    coordinates = OdeCoordinates(schedule)
    history: list[tuple[Tensor, float]] = []  # (slope, B), the latest first
    for t, s in pairwise(times):
        prediction = yield x, t
        (c_t, b_t), (c_s, b_s) = coordinates.at(t), coordinates.at(s)
        history = [(prediction.at(*coordinates.slope), b_t), *history][:order]
        weights = coefficients(tuple(b for _, b in history), b_s)
        x = weighted_sum(
            (c_s / c_t, x),
            *((c_s * c, slope) for (slope, _), c in zip(history, weights, strict=True)),
        )
    return x
