"""Transforms of schedules: zero terminal SNR, and the time shift for larger images.

Zero terminal SNR (Lin et al. 2023, arXiv:2305.08891, algorithm 1): alpha is shifted and scaled so
that alpha(1) = 0 and the first step's alpha is kept. Shift (Esser et al. 2024, arXiv:2403.03206,
eq. 23): t -> s t / (1 + (s - 1) t), which for a flow divides alpha/sigma by s.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.diffuse.schedule import Schedule
from sfumato.errors import UserError
from sfumato.validate import number_in, positive_int


class ScheduleTransform(Schedule):
    """A schedule around another one, `base`, with the base's methods where it has none."""

    base: Schedule

    @property
    def kind(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base's."""
        return self.base.kind

    @property
    def grid(self) -> int | None:
        """The base's."""
        return self.base.grid

    @property
    def first(self) -> float:
        """The base's."""
        return self.base.first

    def timestep(self, t: Tensor) -> Tensor:
        """Return the base's timestep."""
        return self.base.timestep(t)

    def time(self, timestep: Tensor) -> Tensor:
        """Return the base's time."""
        return self.base.time(timestep)

    def sample_times(self, u: Tensor) -> Tensor:
        """Return the base's times."""
        return self.base.sample_times(u)


@dataclass(frozen=True)
class ZeroTerminalSNR(ScheduleTransform):
    """A variance-preserving schedule with alpha(1)^2 = `last`.

    Only v and x0 can be solved at alpha = 0: `Process` refuses eps.

    Args:
        base: The schedule to transform.
        last: 0, or a little more for solvers that divide by alpha.
    """

    base: Schedule
    last: float = 0.0

    def __post_init__(self) -> None:
        alpha, sigma = self.base.at(torch.tensor([self.base.first, 0.5, 1.0], dtype=torch.float64))
        if (alpha.square() + sigma.square() - 1).abs().max() > 1e-9:
            raise UserError(
                "zero terminal SNR is for variance-preserving schedules (alpha^2 + sigma^2 = 1): "
                "flows end without signal anyway"
            )
        if not 0 <= self.last < float(alpha[-1]) ** 2:
            raise UserError(
                f"last={self.last}: expected alpha^2 at t = 1 from 0 to below "
                f"{float(alpha[-1]) ** 2:.3g}, that of the schedule itself"
            )

    @property
    def _ends(self) -> tuple[float, float]:
        """Return the base's alpha at the first step and at t = 1."""
        return self.base.point(0.0 if self.grid is None else self.first)[0], self.base.point(1.0)[0]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base's alpha, shifted and scaled, and sigma with alpha^2 + sigma^2 = 1."""
        (first, end), least = self._ends, math.sqrt(self.last)
        alpha = first - (first - self.base.coefficients(t)[0]) * (first - least) / (first - end)
        if self.grid is None:
            sigma2 = 1 - alpha.square()
        else:  # below the first step sigma^2 is linear in t, as in the base
            inside = (t.double() / self.first).clamp(max=1)
            alpha = torch.where(inside < 1, first, alpha)
            sigma2 = (1 - alpha.square()) * inside
            alpha = torch.where(inside < 1, (1 - sigma2).sqrt(), alpha)
        # Exactly: a rounding error would be a signal.
        sigma = torch.where(t >= 1, math.sqrt(1 - self.last), sigma2.clamp(min=0).sqrt())
        return torch.where(t >= 1, least, alpha), sigma

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the base's t of its own alpha."""
        (first, end), least = self._ends, math.sqrt(self.last)
        value = log_snr.double()
        alpha = torch.sigmoid(value).sqrt().clamp(min=least)
        base = (first - (first - alpha) * (first - end) / (first - least)).clamp(max=1.0)
        inner = self.base.from_log_snr(2 * base.log() - torch.log1p(-base.square()))
        if self.grid is None:
            return inner
        below = torch.sigmoid(-value) / (1 - first**2) * self.first
        return torch.where(alpha > first, below, inner)


T = TypeVar("T", float, Tensor)


def shifted_time(t: T, shift: float) -> T:
    """Return shift * t / (1 + (shift - 1) t).

    The ends stay. Times between them move towards the noise for shift > 1.

    Args:
        t: Time in [0, 1].
        shift: Positive number.
    """
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Shifted(ScheduleTransform):
    """A schedule with its time shifted; the network still gets the timestep of the noise in x.

    Args:
        base: The schedule to transform.
        shift: Positive number; above 1 there is more time in noise.
    """

    base: Schedule
    shift: float = 3.0

    def __post_init__(self) -> None:
        number_in("shift", self.shift, above=0, hint="1 changes nothing, 3 is SD3's")

    @property
    def first(self) -> float:
        """The base's, shifted."""
        return float(self._unshift(torch.tensor(self.base.first, dtype=torch.float64)))

    def _shift(self, t: Tensor) -> Tensor:
        return shifted_time(t.double(), self.shift)

    def _unshift(self, t: Tensor) -> Tensor:
        return shifted_time(t.double(), 1 / self.shift)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base's at the shifted time."""
        return self.base.coefficients(self._shift(t))

    def timestep(self, t: Tensor) -> Tensor:
        """Return the base's timestep of the shifted time."""
        return self.base.timestep(self._shift(t))

    def time(self, timestep: Tensor) -> Tensor:
        """Return the base's time, shifted back."""
        return self._unshift(self.base.time(timestep))

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the base's time, shifted back."""
        return self._unshift(self.base.from_log_snr(log_snr))

    def sample_times(self, u: Tensor) -> Tensor:
        """Spread u over this schedule's own time; a table's grid is the base's."""
        return self._unshift(self.base.sample_times(self._shift(u)))


def dynamic_shift(
    tokens: int,
    base: tuple[int, float] = (256, 0.5),
    top: tuple[int, float] = (4096, 1.15),
    exponential: bool = True,
) -> float:
    """Return the shift for an image of so many tokens, with mu on a line over the tokens.

    The defaults are FLUX.1's (scheduler_config.json: base_image_seq_len, base_shift,
    max_image_seq_len, max_shift).

    Args:
        tokens: Number of image tokens.
        base: (tokens, mu), one point of the line.
        top: (tokens, mu), another one.
        exponential: The shift is e^mu (FLUX, SD3.5's dynamic shift); else mu itself.
    """
    positive_int("tokens", tokens, unit="image tokens")
    mu = base[1] + (tokens - base[0]) * (top[1] - base[1]) / (top[0] - base[0])
    return math.exp(mu) if exponential else mu


def flux2_shift(tokens: int, steps: int, exponential: bool = True) -> float:
    """Return the shift by FLUX.2's rule, which depends on the number of steps too.

    mu is on a line over the tokens for 10 steps, on another for 200, and on the line over the steps
    through both; above 4300 tokens it is that of 200 steps for any number
    (compute_empirical_mu, github.com/black-forest-labs/flux2, src/flux2/sampling.py).

    Args:
        tokens: Number of image tokens.
        steps: Number of steps of the run.
        exponential: The shift is e^mu; else mu itself.
    """
    positive_int("tokens", tokens, unit="image tokens")
    positive_int("steps", steps)
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    mu = many if tokens > 4300 else many + (few - many) * (200 - steps) / 190
    return math.exp(mu) if exponential else mu
