"""Restart: Heun's method, and at a low noise level up with fresh noise and down again.

(Xu et al. 2023, arXiv:2306.14878, algorithm 1.) When the run passes the noise level `low`
(sigma/alpha), `restarts` times: noise is added up to `high`, and `inner` steps of Heun, spaced as
those of Karras et al., come back. The noise contracts the errors made above; the deterministic
steps keep those made below small.
"""

import math

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers._steps import add_noise_to
from sfumato.diffuse.samplers.heun import heun
from sfumato.errors import UserError


@traits(order=2, calls=2, noise=True)
def restart(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    low: float = 0.1,
    high: float = 2.0,
    restarts: int = 2,
    inner: int = 9,
    rho: float = 7.0,
) -> Run:
    """Call the network twice a step, and 2 * restarts * inner times more.

    A run that does not come down from above `high` is Heun's alone.

    Options:
        low: Noise level sigma/alpha of the restarts, above 0.
        high: Noise level up to which noise is added, above `low`.
        restarts: Number of restarts.
        inner: Heun steps of a restart.
        rho: Of their spacing, above 0.
    """
    if not (0 < low < high < math.inf and restarts >= 0 and inner >= 1 and 0 < rho < math.inf):
        options = f"low={low}, high={high}, restarts={restarts}, inner={inner}, rho={rho}"
        raise UserError(f"{options}: expected 0 < low < high, restarts >= 0, inner >= 1, rho > 0")
    bottom, top = schedule.at_noise_level(low), schedule.at_noise_level(high)
    positive = [i for i, s in enumerate(times) if s > 0]
    # A run of few steps jumps over `low`: its last time then.
    crossing = next((i for i in positive if times[i] <= bottom), positive[-1])
    if restarts == 0 or crossing == 0 or not times[crossing] < top < times[0]:
        return (yield from heun(x, times, schedule, noise))
    s = times[crossing]
    x = yield from heun(x, times[: crossing + 1], schedule, noise)
    levels = [schedule.noise_level(top) ** (1 / rho), schedule.noise_level(s) ** (1 / rho)]
    ladder = [
        schedule.at_noise_level((levels[0] + (levels[1] - levels[0]) * i / inner) ** rho)
        for i in range(inner)
    ]
    ladder = [top, *ladder[1:], s]
    for _ in range(restarts):
        x = add_noise_to(x, noise(), schedule.point(s), schedule.point(top))
        x = yield from heun(x, ladder, schedule, noise)
    if crossing == len(times) - 1:
        return x
    return (yield from heun(x, times[crossing:], schedule, noise))
