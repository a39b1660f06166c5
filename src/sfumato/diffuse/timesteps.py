"""Spacings: the times of a run, from `start` (1 is pure noise) down to 0.

Each spacing is a function (steps, schedule, start, options) -> steps+1 floats, strictly descending,
the last 0. It is found by name in `SPACINGS`, which adds an option to all of them: with
`clean=False` a run ends at the least training time and not at 0.

By time: "trailing", "leading" and "linspace" are the conventions named in Lin et al. 2023
(arXiv:2305.08891, table 2); "beta" is Lee et al. 2024 (arXiv:2407.12173). By noise level
sigma/alpha: "karras" (2022, arXiv:2206.00364, eq. 5) and "exponential"; where sigma/alpha is
infinite at t = 1 (flows, zero terminal SNR) by sigma/(alpha + sigma), a flow's own t. "crash" is by
the share of noise. By log-SNR: "log_snr" (Lu et al. 2022, arXiv:2206.00927, section 3.4).
"align_your_steps": Sabour et al. 2024 (arXiv:2404.14507).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sfumato.diffuse.schedule import NO_SIGNAL, Schedule
from sfumato.diffuse.schedule_transforms import dynamic_shift, flux2_shift, shifted_time
from sfumato.errors import UserError
from sfumato.validate import number_in, one_of, step_count, whole_number

# Timesteps of 1000 that the paper's authors published for ten steps of these models.
ALIGN_YOUR_STEPS = {
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


# ---- by time -------------------------------------------------------------------------------------


def trailing(
    steps: int, schedule: Schedule, start: float = 1.0, whole: bool = False
) -> list[float]:
    """Space evenly from the full noise: start, start*(1 - 1/steps) ... start/steps, 0.

    Options:
        whole: Round to a table's grid, as diffusers does.
    """
    if whole and schedule.grid is not None:
        grid = schedule.grid
        return [round(grid * start * (steps - i) / steps) / grid for i in range(steps)] + [0.0]
    return [start * (steps - i) / steps for i in range(steps)] + [0.0]


def leading(
    steps: int, schedule: Schedule, start: float = 1.0, offset: int = 0, drop_last: bool = False
) -> list[float]:
    """Space by multiples of grid // steps (DDIM's original), which never reach the full noise.

    Options:
        offset: Added to each multiple; 1 for Stable Diffusion 1.
        drop_last: Space one more step and leave out the least time, as diffusers' multistep
            solvers.
    """
    if drop_last:
        return leading(steps + 1, schedule, start, offset)[:steps] + [0.0]
    grid = schedule.grid or 1000
    stride = max(int(grid * start) // steps, 1)
    return [min(stride * i + offset + 1, grid) / grid for i in reversed(range(steps))] + [0.0]


def linspace(
    steps: int,
    schedule: Schedule,
    start: float = 1.0,
    whole: bool = True,
    drop_last: bool = False,
    end: float | None = None,
) -> list[float]:
    """Space evenly from start to the least training time (Nichol & Dhariwal 2021, section 4).

    Options:
        whole: Round to a table's grid.
        drop_last: Space one more step and leave out the least time, as diffusers' multistep
            solvers.
        end: Least time instead of the training's.
    """
    if drop_last:
        return linspace(steps + 1, schedule, start, whole, end=end)[:steps] + [0.0]
    if steps == 1:
        return [start, 0.0]
    grid = schedule.grid
    if grid is None or end is not None:
        low = min(schedule.first, start / steps) if end is None else _end(schedule, start, end)
        return [start + (low - start) * i / (steps - 1) for i in range(steps)] + [0.0]
    exact = np.linspace(0, grid * start - 1, steps)[::-1]
    return [*(((exact.round() if whole else exact) + 1) / grid).tolist(), 0.0]


def shifted(
    steps: int,
    schedule: Schedule,
    start: float = 1.0,
    shift: float = 3.0,
    end: float | None = None,
    terminal: float = 0.0,
) -> list[float]:
    """Shift even times towards the noise: s t / (1 + (s - 1) t).

    (Esser et al. 2024, arXiv:2403.03206, eq. 23.)

    Options:
        shift: s; 3 is SD3's. `dynamic_shift` gives FLUX's for an image of so many tokens.
        end: Time of the last network call; None: one even step from 0.
        terminal: The same in another way: 1 - t of all times is stretched alike (`shift_terminal`
            of LTX-Video and Qwen-Image); 0: not stretched.
    """
    number_in("shift", shift, above=0, hint="1 changes nothing")
    inner = shifted_time(start, 1 / shift)  # the shift undone
    last = inner / steps if end is None else shifted_time(_end(schedule, start, end), 1 / shift)
    times = [shifted_time(last + (inner - last) * u, shift) for u in _ramp(steps).tolist()]
    if terminal and steps > 1:
        stretch = (start - _end(schedule, start, terminal)) / (start - times[-1])
        times = [start - (start - t) * stretch for t in times]
    return [start, *times[1:], 0.0]


def dynamic(
    steps: int,
    schedule: Schedule,
    start: float = 1.0,
    tokens: int = 4096,
    base_tokens: int = 256,
    base: float = 0.5,
    top_tokens: int = 4096,
    top: float = 1.15,
    exponential: bool = True,
    even: bool = True,
    terminal: float = 0.0,
    rule: str = "line",
) -> list[float]:
    """Shift by the size of the image (`dynamic_shift`): larger images have more time in noise.

    The defaults are FLUX.1's.

    Options:
        tokens: Number of image tokens; a run fills it in.
        base_tokens: Tokens of one point of the line.
        base: mu of that point.
        top_tokens: Tokens of another point.
        top: mu of that point.
        exponential: The shift is e^mu; else mu.
        even: Even times are shifted down to one step from 0 (FLUX's pipelines); else down to 0.001.
        terminal: See `shifted`.
        rule: "line" through both points, or "flux2" (`flux2_shift`), which depends on the steps
            too.
    """
    line = one_of("rule", rule, ("line", "flux2")) == "line"
    shift = (
        dynamic_shift(tokens, (base_tokens, base), (top_tokens, top), exponential)
        if line
        else flux2_shift(tokens, steps, exponential)
    )
    if shift <= 0:
        raise UserError(
            f"{tokens} tokens: the shift between {base} and {top} would be {shift:g}; "
            "expected more tokens"
        )
    end = None if even else shifted_time(0.001, shift)
    return shifted(steps, schedule, start, shift, end, terminal)


def beta(
    steps: int,
    schedule: Schedule,
    start: float = 1.0,
    a: float = 0.6,
    b: float = 0.6,
    over: str = "time",
    end: float | None = None,
    between: str = "ends",
    offset: int = 0,
) -> list[float]:
    """Space by quantiles of Beta(a, b), dense near 1 and near 0.

    Options:
        a: Of the distribution, above 0.
        b: Of the distribution, above 0.
        over: "time", as published, or "noise", the noise level (diffusers).
        end: Over noise, time of the last network call; None: the least training time.
        between: Over noise, see `karras`.
        offset: Over noise, see `karras`.
    """
    one_of("over", over, ("time", "noise"))
    number_in("a", a, above=0)
    number_in("b", b, above=0)
    if over == "time":
        quantiles = _beta_quantiles(np.arange(steps, 0, -1) / steps, a, b)
        return [*(start * quantiles).tolist(), 0.0]
    quantiles = _beta_quantiles(np.linspace(1, 0, steps), a, b) if steps > 1 else np.ones(1)
    start, end = _between(between, offset, steps, schedule, start, end)
    return _by_level(quantiles, schedule, start, end, lambda high, low, u: low + u * (high - low))


def lcm(steps: int, schedule: Schedule, start: float = 1.0, original: int = 50) -> list[float]:
    """Take some of the times that a latent consistency model was distilled at.

    (Luo et al. 2023, arXiv:2310.04378.)

    Options:
        original: Number of times of the distillation.
    """
    grid = schedule.grid or 1000
    original = min(original, grid)
    distilled = [(i + 1) * (grid // original) / grid for i in range(int(original * start))][::-1]
    if steps > len(distilled):
        raise UserError(
            f"steps={steps}: a model distilled at {original} times has "
            f"{len(distilled)} of them up to start={start}"
        )
    return [distilled[int(i * len(distilled) / steps)] for i in range(steps)] + [0.0]


# ---- by noise level ------------------------------------------------------------------------------


def karras(
    steps: int,
    schedule: Schedule,
    start: float = 1.0,
    rho: float = 7.0,
    end: float | None = None,
    between: str = "ends",
    offset: int = 0,
    original: int = 0,
) -> list[float]:
    """Space noise levels whose rho-th roots are even, from `start` to `end`, then 0.

    Options:
        rho: Above 0; 7 is Karras et al.'s.
        end: Time of the last network call; None: the least training time.
        between: "ends"; or "leading" or "trailing": from the first to the last call of that
            spacing, as diffusers' Euler has it.
        offset: Of `leading`.
        original: Number of levels of which every (original // steps)-th is taken, from `start` on,
            as consistency models are sampled; 0: all.
    """
    number_in("rho", rho, above=0, hint="7 is Karras et al.'s")
    whole_number("original", original, 0)
    if original and steps > original:
        raise UserError(f"steps={steps}: expected at most original={original} levels")
    start, end = _between(between, offset, steps, schedule, start, end)

    def level(high: float, low: float, u: float) -> float:
        root = low ** (1 / rho)
        return (root + u * (high ** (1 / rho) - root)) ** rho

    ramp = _ramp(original)[:: original // steps][:steps] if original else _ramp(steps)
    return _by_level(ramp, schedule, start, end, level)


def exponential(
    steps: int,
    schedule: Schedule,
    start: float = 1.0,
    end: float | None = None,
    rho: float = 1.0,
    between: str = "ends",
    offset: int = 0,
) -> list[float]:
    """Space noise levels in equal ratios, from `start` to `end`, then 0.

    Options:
        end: Time of the last network call; None: the least training time.
        rho: Bends the logarithm of the level: above 1 there are more steps at little noise
            (k-diffusion's "polyexponential").
        between: See `karras`.
        offset: See `karras`.
    """
    number_in("rho", rho, above=0, hint="1 is equal ratios")
    start, end = _between(between, offset, steps, schedule, start, end)
    return _by_level(
        _ramp(steps), schedule, start, end, lambda high, low, u: low * (high / low) ** (u**rho)
    )


def log_snr(
    steps: int, schedule: Schedule, start: float = 1.0, end: float | None = None
) -> list[float]:
    """Space by equal steps of log-SNR, from `start` to `end`, then 0.

    Where there is no signal at `start`, the first step goes to t = 0.999 start and the others are
    equal.

    Options:
        end: Time of the last network call; None: the least training time.
    """
    low = _end(schedule, start, end)
    infinite = schedule.noise_level(start) >= NO_SIGNAL
    if steps == 1 or (infinite and steps == 2):
        return [start, low, 0.0] if steps == 2 else [start, 0.0]
    head, top = ([start], 0.999 * start) if infinite else ([], start)
    a, b = (math.log(schedule.noise_level(t)) for t in (top, low))
    levels = torch.linspace(a, b, steps - len(head), dtype=torch.float64)
    inner = schedule.from_log_snr(-2 * levels).tolist()
    return [*head, top, *inner[1:-1], low, 0.0]


def crash(steps: int, schedule: Schedule, start: float = 1.0) -> list[float]:
    """Space by sigma/sqrt(alpha^2 + sigma^2) = sin^2(pi u/2) for even u, dense at both ends.

    (v-diffusion's "crash" schedule, and diffusers' IPNDM.)
    """
    alpha, sigma = schedule.point(start)
    top = 2 / math.pi * math.asin(math.sqrt(sigma / math.hypot(alpha, sigma)))
    shares = np.sin(np.arange(steps - 1, 0, -1) * (top / steps * math.pi / 2)) ** 2
    levels = torch.from_numpy(shares / np.sqrt(1 - shares**2))
    return [start, *schedule.from_log_snr(-2 * levels.log()).tolist(), 0.0]


def align_your_steps(
    steps: int, schedule: Schedule, start: float = 1.0, table: str = "sd15"
) -> list[float]:
    """Take the ten published times, or interpolate their log noise levels.

    Options:
        table: "sd15" or "sdxl".
    """
    published = ALIGN_YOUR_STEPS[one_of("align-your-steps table", table, ALIGN_YOUR_STEPS)]
    return resample([(i + 1) / 1000 for i in published], steps, schedule, start)


def resample(
    times: Sequence[float], steps: int, schedule: Schedule, start: float = 1.0
) -> list[float]:
    """Interpolate a table of times to another number of steps, in the log of the noise level.

    Args:
        times: Times in (0, 1), descending; those from `start` on are left out.
        steps: Number of steps of the result.
        schedule: t -> noise level.
        start: First time of the result.

    Returns:
        steps+1 times from `start` to 0.
    """
    kept = [start, *(t for t in times if 0 < t < start)]
    if len(kept) == steps:
        return [*kept, 0.0]
    levels = [math.log(_level(schedule, t)) for t in kept]
    places = np.linspace(0, 1, steps), np.linspace(0, 1, len(levels))
    points = np.interp(*places, levels) if steps > 1 else levels[:1]
    return [start, *_times(schedule, np.exp(points))[1:], 0.0]


def _with_clean(spacing: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """Return the spacing with the option `clean` (True) added.

    With False a run ends at the least training time and not at 0, with that much noise left. So do
    diffusers' `set_alpha_to_one=False` (Stable Diffusion 1) and `final_sigmas_type="sigma_min"`.
    """

    @wraps(spacing)
    def spaced(
        steps: int, schedule: Schedule, start: float = 1.0, clean: bool = True, **options: Any
    ) -> list[float]:
        times = spacing(steps, schedule, start, **options)
        if clean:
            return times
        return [*(t for t in times if t > schedule.first * (1 + 1e-9)), schedule.first]

    signature = inspect.signature(spacing)
    clean = inspect.Parameter(
        "clean", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool
    )
    # The options as `spec.options_of` reads them.
    vars(spaced)["__signature__"] = signature.replace(
        parameters=[*signature.parameters.values(), clean]
    )
    return spaced


SPACINGS = {"trailing": _with_clean(trailing), "uniform": _with_clean(trailing)} | {
    spacing.__name__: _with_clean(spacing)
    for spacing in (
        *(leading, linspace, shifted, dynamic, beta),
        *(karras, exponential, log_snr, crash, align_your_steps, lcm),
    )
}
"""Spacings by name; "uniform" is another name of even times from `start` to 0."""


def timesteps(
    spacing: str, steps: int, schedule: Schedule, start: float = 1.0, **options: Any
) -> list[float]:
    """Return the times of a run.

    Args:
        spacing: Name in `SPACINGS`.
        steps: From 1 to the size of the schedule's grid, if it has one.
        schedule: The process's.
        start: First time, in (0, 1].
        **options: Of the spacing.

    Returns:
        Times from `start` down, strictly descending, as `check_times` returns them.

    Raises:
        UserError: For an unknown spacing, options that it cannot have, or too many steps.
    """
    one_of("timestep spacing", spacing, SPACINGS)
    step_count("steps", steps)
    if schedule.grid is not None and steps > schedule.grid:
        raise UserError(
            f"steps={steps}: the model's noise table has {schedule.grid} times, "
            "expected at most as many steps"
        )
    number_in("start", start, above=0, at_most=1, hint="1 is noise")
    times = SPACINGS[spacing](steps, schedule, start, **options)
    if not all(a > b for a, b in pairwise(times)):
        listed = "".join(f", {key}={value}" for key, value in options.items())
        raise UserError(
            f"spacing {spacing!r} has no {steps} different times from start={start:g}{listed}: "
            "expected fewer steps, or another spacing"
        )
    return check_times(times)


def truncate(times: Sequence[float], start: float) -> list[float]:
    """Return the tail of a run that begins with less noise, as image-to-image does.

    Args:
        times: Times of the whole run.
        start: First time of the tail, above the last and at most the first of the times.

    Returns:
        `start`, and the times below it.

    Raises:
        UserError: For another start.
    """
    values = check_times(times)
    if not values[-1] < start <= values[0]:
        raise UserError(
            f"start={start}: expected a time above {values[-1]:.4g}, where the run ends, "
            f"and at most {values[0]:.4g}, where it begins"
        )
    return [start, *(t for t in values if t < start)]


def check_times(times: Sequence[float]) -> list[float]:
    """Return times as floats.

    Args:
        times: At least two numbers in [0, 1], strictly descending; 1 is noise and 0 is clean.

    Raises:
        UserError: For anything else.
    """
    try:
        values = [float(t) for t in times]
    except (TypeError, ValueError) as error:
        raise UserError(f"timesteps {times!r}: expected numbers in [0, 1]") from error
    falling = len(values) >= 2 and all(a > b for a, b in pairwise(values))
    if not falling or values[0] > 1 or values[-1] < 0:
        shown = ", ".join(f"{t:.4g}" for t in values[:8])
        raise UserError(
            f"timesteps [{shown}{', ...' if len(values) > 8 else ''}]: expected at least "
            "two numbers in [0, 1] that fall strictly, 1 is noise and 0 is clean"
        )
    return values


# ---- levels --------------------------------------------------------------------------------------


def _level(schedule: Schedule, t: float) -> float:
    """Return sigma/alpha, or sigma/(alpha + sigma) for schedules without signal at t = 1."""
    alpha, sigma = schedule.point(t)
    return sigma / alpha if schedule.bounded else sigma / (alpha + sigma)


def _times(schedule: Schedule, levels: np.ndarray) -> list[float]:
    """Invert `_level` for many levels."""
    with np.errstate(divide="ignore"):
        ratios = levels if schedule.bounded else levels / np.maximum(1 - levels, 0.0)
    return schedule.from_log_snr(-2 * torch.from_numpy(ratios).log()).tolist()


def _ramp(steps: int) -> np.ndarray:
    """Return even numbers from 1 to 0."""
    return np.linspace(1, 0, steps) if steps > 1 else np.ones(1)


def _end(schedule: Schedule, start: float, end: float | None) -> float:
    if end is not None and not 0 < end < start:
        raise UserError(
            f"end={end}: expected the time of the last network call, "
            f"above 0 and below start={start}"
        )
    return min(schedule.first, start / 2) if end is None else end


def _between(
    name: str, offset: int, steps: int, schedule: Schedule, start: float, end: float | None
) -> tuple[float, float | None]:
    """Return the times of the first and the last call: the ends, or those of an even spacing."""
    if one_of("between", name, ("ends", "leading", "trailing")) == "ends":
        return start, end
    even = (
        leading(steps, schedule, start, offset)
        if name == "leading"
        else trailing(steps, schedule, start, whole=True)
    )
    return even[0], even[-2] if end is None and steps > 1 else end


def _by_level(
    ramp: np.ndarray,
    schedule: Schedule,
    start: float,
    end: float | None,
    curve: Callable[[float, float, float], float],
) -> list[float]:
    """Return times whose levels are curve(highest, lowest, u) for u of a ramp from 1 to 0.

    The ends are exactly `start` and `end`.
    """
    last = _end(schedule, start, end)
    high, low = _level(schedule, start), _level(schedule, last)
    times = _times(schedule, np.array([curve(high, low, float(u)) for u in ramp]))
    if ramp[0] == 1:
        times[0] = start
    if len(ramp) > 1 and ramp[-1] == 0:
        times[-1] = last
    return [*times, 0.0]


def _beta_quantiles(u: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return x with I_x(a, b) = u, by bisection.

    The integral of s^(a-1) (1-s)^(b-1) up to x <= 1/2 is that of (1 - v^(1/a))^(b-1) / a up to v =
    x^a, which is smooth: Gauss's rule of 64 points is exact to about 1e-10. Above 1/2 the roles of
    a and b are exchanged.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def lower(x: np.ndarray, a: float, b: float) -> np.ndarray:
        v = np.multiply.outer(x**a, (nodes + 1) / 2)
        return ((1 - v ** (1 / a)) ** (b - 1) @ weights) * x**a / (2 * a)

    half = np.array([0.5])
    below, above = float(lower(half, a, b)[0]), float(lower(half, b, a)[0])
    target = np.asarray(u, dtype=float) * (below + above)
    mirrored = target > below
    left = np.where(mirrored, below + above - target, target)
    low, high = np.zeros_like(left), np.full_like(left, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        under = np.where(mirrored, lower(middle, b, a), lower(middle, a, b)) < left
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    x = (low + high) / 2
    return np.where(mirrored, 1 - x, x)
