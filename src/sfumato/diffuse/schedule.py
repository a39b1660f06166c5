"""Noise schedules: t in [0, 1] -> (alpha, sigma) with x_t = alpha*z + sigma*eps.

t = 0 is clean, t = 1 is noise; all is float64. Discrete tables are variance preserving, alpha^2 +
sigma^2 = 1: alpha_i^2 = prod_{j<=i} (1 - beta_j) (Ho et al. 2020, arXiv:2006.11239, eq. 4) at t =
(i+1)/T, with the log-SNR interpolated between. Continuous ones are variance preserving and
exploding (Song et al. 2021, arXiv:2011.13456, appendix C), rectified flow alpha = 1 - t, sigma = t
(Liu et al. 2023, arXiv:2209.03003, eq. 1), and EDM (Karras et al. 2022, arXiv:2206.00364).
Transforms (zero terminal SNR, shift) are in schedule_transforms.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.validate import one_of

NO_SIGNAL = 5000.0
"""Noise level sigma/alpha above which a latent counts as pure noise.

The rest of z is then below float32's rounding of a prediction.
"""


class Schedule(ABC):
    """t -> (alpha, sigma), float64, and back from the log-SNR log(alpha^2 / sigma^2).

    Attributes:
        kind: Name in configs.
    """

    kind: str = "?"

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at t in [0, 1], of any shape; float64 in and out."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return t in a network's units: 0..T-1 for a table of T steps, 0..1000 for a flow."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """Invert `timestep`."""

    @abstractmethod
    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the t at which log(alpha^2 / sigma^2) has a value.

        Values outside of the schedule's range are clamped to its ends.
        """

    @abstractmethod
    def sample_times(self, u: Tensor) -> Tensor:
        """Map u in (0, 1), of any distribution, to training times.

        They are never 0, and on the grid of a discrete table.
        """

    @property
    def grid(self) -> int | None:
        """Number of times of a discrete table; None for a continuous schedule."""
        return None

    @property
    def first(self) -> float:
        """Least time that networks are trained at, of the last call in spacings by noise level."""
        return 0.001 if self.grid is None else 1 / self.grid

    @property
    def bounded(self) -> bool:
        """True if there is signal at t = 1.

        There is none for flows, at zero terminal SNR and in the cosine table.
        """
        return self.noise_level(1.0) < NO_SIGNAL

    def point(self, t: float) -> tuple[float, float]:
        """Return (alpha, sigma) at a time as plain numbers, for the algebra of samplers.

        Cached, because runs visit the same times again.
        """
        return _point(self, float(t))

    def noise_level(self, t: float) -> float:
        """Return sigma/alpha at a time; inf where alpha is 0."""
        alpha, sigma = self.point(t)
        return sigma / alpha if alpha > 0 else math.inf

    def at_noise_level(self, level: float) -> float:
        """Return the time at which sigma/alpha has a value, clamped to [0, 1]."""
        log_snr = -2 * math.log(level) if level > 0 else math.inf
        return float(self.from_log_snr(torch.tensor(log_snr, dtype=torch.float64)))

    def at(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at a number or tensor t as float64 tensors of its shape."""
        return self.coefficients(torch.as_tensor(t, dtype=torch.float64))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2): +inf at t = 0, falling in t."""
        alpha, sigma = self.at(t)
        return 2 * (alpha.log() - sigma.log())


@lru_cache(maxsize=8192)
def _point(schedule: Schedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule.at(t)
    return float(alpha), float(sigma)


@dataclass(frozen=True)
class BetaTable(Schedule):
    """A table of T betas.

    Args:
        betas: Numbers in (0, 1), from the least noisy step on.
        kind: Name in configs: "linear", "scaled_linear", "cosine", "sigmoid" or "table".
        beta_start: First beta of a closed form, for configs.
        beta_end: Last beta of a closed form, for configs.
    """

    betas: tuple[float, ...] = field(repr=False)
    kind: str = "table"
    beta_start: float = 0.0001
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < b < 1 for b in self.betas):
            raise UserError(
                f"a beta table of {len(self.betas)} values: "
                "expected numbers strictly between 0 and 1"
            )

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.betas))

    # Hashing a thousand numbers each time would cost more than the cache saves.
    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _log_snr_table(self) -> Tensor:
        """Log-SNR at t = 1/T, 2/T ... 1."""
        log_alpha2 = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64)).cumsum(0)
        return log_alpha2 - torch.log(-torch.expm1(log_alpha2))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at t; the log-SNR is linear between the times of the table."""
        table, count = self._log_snr_table.to(t.device), len(self.betas)
        position = (t.double() * count - 1).clamp(0, count - 1)
        low = position.floor().long().clamp(max=max(count - 2, 0))
        high = (low + 1).clamp(max=count - 1)
        log_snr = torch.lerp(table[low], table[high], position - low)
        alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        # Below the first step sigma^2 falls linearly to 0: t = 0 is exactly clean.
        inside = (t.double() * count).clamp(max=1)
        sigma2 = sigma2 * inside
        return torch.where(inside < 1, 1 - sigma2, alpha2).sqrt(), sigma2.sqrt()

    @property
    def grid(self) -> int:
        """Number of betas."""
        return len(self.betas)

    def timestep(self, t: Tensor) -> Tensor:
        """Return t in steps of the table, from 0: no network is trained below its first."""
        return (t.double() * len(self.betas) - 1).clamp(min=0)

    def time(self, timestep: Tensor) -> Tensor:
        """Return the time of a step of the table."""
        return (timestep.double() + 1) / len(self.betas)

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the t of a log-SNR, by interpolation in the table."""
        table, count = self._log_snr_table.to(log_snr.device), len(self.betas)
        value = log_snr.double()
        rising = table.flip(0)
        high = torch.searchsorted(rising, value.contiguous()).clamp(1, count - 1)
        weight = ((value - rising[high - 1]) / (rising[high] - rising[high - 1])).clamp(0, 1)
        inner = (count - (high - 1 + weight)) / count
        # sigma^2 is linear below the first step.
        below = torch.sigmoid(-value) / torch.sigmoid(-table[0]) / count
        return torch.where(value > table[0], below, inner)

    def sample_times(self, u: Tensor) -> Tensor:
        """Map u to the times of the table."""
        count = len(self.betas)
        return ((u.double() * count).floor().clamp(0, count - 1) + 1) / count


class Continuous(Schedule):
    """A schedule without a table: training visits all of (0, 1]."""

    def sample_times(self, u: Tensor) -> Tensor:
        """Return u itself, at least 1e-5."""
        return u.double().clamp(1e-5, 1.0)


@dataclass(frozen=True)
class RectifiedFlow(Continuous):
    """Rectified flow: alpha = 1 - t, sigma = t; the timestep is t * 1000, as for SD3 and FLUX."""

    kind: str = "flow"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - t, t)."""
        t = t.double()
        return 1 - t, t.clone()

    def timestep(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return t.double() * 1000

    def time(self, timestep: Tensor) -> Tensor:
        """Return the timestep over 1000."""
        return timestep.double() / 1000

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the sigmoid of minus half the log-SNR."""
        return torch.sigmoid(-log_snr.double() / 2)


@dataclass(frozen=True)
class VariancePreserving(Continuous):
    """Continuous VP: log alpha = -t^2 (b - a)/4 - t a/2 for beta(t) = a + t (b - a).

    (Song et al. 2021, eq. 33.) The timestep is t * 999, as in their code.

    Args:
        beta_min: a, above 0.
        beta_max: b, from a to below 200.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    kind: str = "vp"

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < 200:  # e^-50 of signal is as good as none
            raise UserError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max}: "
                "expected 0 < beta_min <= beta_max < 200"
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha by the formula above, and sigma with alpha^2 + sigma^2 = 1."""
        t = t.double()
        log_alpha2 = -t.square() * (self.beta_max - self.beta_min) / 2 - t * self.beta_min
        return (log_alpha2 / 2).exp(), (-torch.expm1(log_alpha2)).sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        """Return 999 t."""
        return t.double() * 999

    def time(self, timestep: Tensor) -> Tensor:
        """Return the timestep over 999."""
        return timestep.double() / 999

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Solve -log alpha^2 = (b - a)/2 t^2 + a t."""
        added = torch.nn.functional.softplus(-log_snr.double()).clamp(max=1e6)
        slope, low = self.beta_max - self.beta_min, self.beta_min
        return (2 * added / ((low**2 + 2 * slope * added).sqrt() + low)).clamp(0, 1)


@dataclass(frozen=True)
class VarianceExploding(Continuous):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t.

    (Song et al. 2021, eq. 30.) Below t = 0.001 sigma falls linearly to 0. The timestep is sigma.

    Args:
        sigma_min: Least noise level, above 0.
        sigma_max: Noise level at t = 1.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    kind: str = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: "
                "expected 0 < sigma_min < sigma_max"
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and the noise level, linear in t below `first`."""
        t, ratio = t.double(), self.sigma_max / self.sigma_min
        foot = (t / self.first).clamp(max=1)
        return torch.ones_like(t), self.sigma_min * ratio ** t.clamp(min=self.first) * foot

    def timestep(self, t: Tensor) -> Tensor:
        """Return the noise level."""
        return self.coefficients(t.double().clamp(min=self.first))[1]

    def time(self, timestep: Tensor) -> Tensor:
        """Return the time of a noise level."""
        return self.from_log_snr(-2 * timestep.double().log())

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return t from the logarithm of the noise level over sigma_min."""
        growth = math.log(self.sigma_max / self.sigma_min)
        raised = -log_snr.double() / 2 - math.log(self.sigma_min)
        above, foot = raised / growth, (raised - growth * self.first).exp() * self.first
        return torch.where(above >= self.first, above, foot).clamp(0, 1)


@dataclass(frozen=True)
class EDM(Continuous):
    """EDM: alpha = 1, sigma = sigma_max * t^rho.

    Even times are the spacing of Karras et al. (2022, eq. 5) extended to sigma = 0. The timestep is
    log(sigma)/4 (their table 1, c_noise), and that of sigma_min below it.

    Args:
        sigma_min: Least noise level that networks are trained at, above 0.
        sigma_max: Noise level at t = 1.
        rho: Exponent in [1, 20].
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    kind: str = "edm"

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and 1 <= self.rho <= 20):
            raise UserError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, rho={self.rho}: "
                "expected 0 < sigma_min < sigma_max and rho in [1, 20]"
            )

    @property
    def first(self) -> float:
        """Time of sigma_min."""
        return (self.sigma_min / self.sigma_max) ** (1 / self.rho)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and sigma_max t^rho."""
        t = t.double()
        return torch.ones_like(t), self.sigma_max * t**self.rho

    def timestep(self, t: Tensor) -> Tensor:
        """Return log(sigma)/4, at least that of sigma_min."""
        return self.coefficients(t.double().clamp(min=self.first))[1].log() / 4

    def time(self, timestep: Tensor) -> Tensor:
        """Return the time of log(sigma)/4."""
        return self.from_log_snr(-8 * timestep.double())

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the rho-th root of sigma/sigma_max."""
        return ((-log_snr.double() / 2 - math.log(self.sigma_max)) / self.rho).exp().clamp(0, 1)


@dataclass(frozen=True)
class ConsistencyEDM(EDM):
    """EDM with the timestep 250 log(sigma) of consistency models.

    (Song et al. 2023, arXiv:2303.01469; the authors' code.)
    """

    kind: str = "consistency_edm"

    def timestep(self, t: Tensor) -> Tensor:
        """Return 250 log(sigma), at least that of sigma_min."""
        return 1000 * super().timestep(t)

    def time(self, timestep: Tensor) -> Tensor:
        """Return the time of 250 log(sigma)."""
        return super().time(timestep / 1000)


@dataclass(frozen=True)
class Trigonometric(Continuous):
    """Trigonometric: alpha = cos(pi t/2), sigma = sin(pi t/2); the timestep is t.

    (Salimans & Ho 2022, arXiv:2202.00512, section 3.)
    """

    kind: str = "trigonometric"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine, exactly 0 at t = 1, and the sine."""
        angle = t.double() * (math.pi / 2)
        return (math.pi / 2 - angle).sin(), angle.sin()

    def timestep(self, t: Tensor) -> Tensor:
        """Return t."""
        return t.double()

    def time(self, timestep: Tensor) -> Tensor:
        """Return the timestep."""
        return timestep.double()

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the angle whose tangent is the noise level, over pi/2."""
        return (-log_snr.double() / 2).exp().atan() * (2 / math.pi)


def _table(kind: str, betas: Tensor, start: float = 0.0001, end: float = 0.02) -> BetaTable:
    return BetaTable(tuple(betas.tolist()), kind, start, end)


def linear(steps: int = 1000, start: float = 0.0001, end: float = 0.02) -> BetaTable:
    """Betas on a line (Ho et al. 2020, section 4)."""
    return _table("linear", torch.linspace(start, end, steps, dtype=torch.float64), start, end)


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> BetaTable:
    """Square roots of betas on a line: Latent Diffusion's and Stable Diffusion's."""
    roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
    return _table("scaled_linear", roots.square(), start, end)


def cosine(steps: int = 1000) -> BetaTable:
    """Cosine table: alpha(t)^2 = cos^2((t + 0.008) / 1.008 * pi/2), betas at most 0.999.

    (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.)
    """
    edge = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return BetaTable(tuple(min(1 - edge[i + 1] / edge[i], 0.999) for i in range(steps)), "cosine")


def sigmoid(steps: int = 1000, start: float = 0.0001, end: float = 0.02) -> BetaTable:
    """Betas on a sigmoid over [-6, 6] from start to end.

    (GeoDiff, Xu et al. 2022, arXiv:2203.02923, and diffusers.)
    """
    ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
    return _table("sigmoid", ramp * (end - start) + start, start, end)


def table(betas: Sequence[float]) -> BetaTable:
    """Return a table of given betas, strictly between 0 and 1, from the least noisy step on."""
    return BetaTable(tuple(map(float, betas)))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "flow": RectifiedFlow,
    "vp": VariancePreserving,
    "ve": VarianceExploding,
    "edm": EDM,
}


def schedule(name: str, **options: float) -> Schedule:
    """Return a schedule by name.

    Args:
        name: linear, scaled_linear, cosine, sigmoid, flow, vp, ve or edm.
        **options: Its own numbers.

    Raises:
        UserError: For an unknown name, or numbers that the schedule cannot have.
    """
    return SCHEDULES[one_of("schedule", name, SCHEDULES)](**options)
