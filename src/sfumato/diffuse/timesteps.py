"""Which times a run visits: from `start` (1 is pure noise) down to 0, `steps` network calls, no duplicates.

Each spacing returns steps+1 floats, strictly descending, the last 0. "trailing", "leading" and "linspace" are the conventions named in
Lin et al. 2023 (arXiv:2305.08891, table 2) on the grid of a discrete table.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from sfumato.errors import UserError, unknown


def trailing(steps: int, start: float = 1.0, grid: int = 1000) -> list[float]:
    """start, start*(1 - 1/steps) ... start/steps, 0: begins at the full noise. Right for every schedule, whatever its grid."""
    return [start * (steps - i) / steps for i in range(steps)] + [0.0]


def uniform(steps: int, start: float = 1.0, grid: int = 1000) -> list[float]:
    """Another name for even spacing from start to 0."""
    return trailing(steps, start, grid)


def leading(steps: int, start: float = 1.0, grid: int = 1000, offset: int = 0) -> list[float]:
    """Multiples of grid // steps, plus an offset (DDIM's original; SD 1 uses offset 1). Never reaches full noise."""
    stride = max(int(grid * start) // steps, 1)
    return [min(stride * i + offset + 1, grid) / grid for i in reversed(range(steps))] + [0.0]


def linspace(steps: int, start: float = 1.0, grid: int = 1000) -> list[float]:
    """Both ends of the grid and evenly between, rounded to the grid (DDPM, Nichol & Dhariwal 2021, section 4)."""
    if steps == 1:
        return [start, 0.0]
    return [(round((grid * start - 1) * (steps - 1 - i) / (steps - 1)) + 1) / grid for i in range(steps)] + [0.0]


SPACINGS: dict[str, Callable[..., list[float]]] = {"trailing": trailing, "uniform": uniform, "leading": leading, "linspace": linspace}


def timesteps(spacing: str, steps: int, start: float = 1.0, grid: int | None = None, **options: int) -> list[float]:
    """The times of a run by spacing name; `steps` from 1 to the size of the schedule's grid (`Schedule.grid`), where it has one."""
    if spacing not in SPACINGS:
        raise unknown("timestep spacing", spacing, SPACINGS)
    if steps < 1:
        raise UserError(f"steps={steps}: expected at least 1 network call")
    if grid is not None and steps > grid:
        raise UserError(f"steps={steps}: the model's noise table has {grid} times, expected at most as many steps")
    if not 0 < start <= 1:
        raise UserError(f"start={start}: expected a time in (0, 1]")
    return check_times(SPACINGS[spacing](steps, start, grid or 1000, **options))


def check_times(times: Sequence[float]) -> list[float]:
    """The same times as floats, or a `UserError`: they must fall strictly, within [0, 1]."""
    try:
        values = [float(t) for t in times]
    except (TypeError, ValueError) as error:
        raise UserError(f"timesteps {times!r}: expected numbers in [0, 1]") from error
    if len(values) < 2 or not all(a > b for a, b in pairwise(values)) or values[0] > 1 or values[-1] < 0:
        shown = ", ".join(f"{t:.4g}" for t in values[:8])
        raise UserError(
            f"timesteps [{shown}{', ...' if len(values) > 8 else ''}]: expected at least two numbers in [0, 1] that fall strictly, 1 is noise and 0 is clean"
        )
    return values
