"""The process: a schedule, a parameterization, and three maps between z, eps, x and y.

add_noise   x = alpha*z + sigma*eps
target      y = a*z + b*eps
split       (x, y) -> (x0, eps), the inverse of both
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.parameterization import Parameterization
from sfumato.diffuse.schedule import Schedule
from sfumato.errors import UserError
from sfumato.prediction import LinearPrediction
from sfumato.types import Prediction


def _columns(like: Tensor, *values: Tensor) -> list[Tensor]:
    """Return coefficients () or (B,) that broadcast over `like` (B, C, h, w), in its dtype."""
    return [v.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1)) for v in values]


@dataclass(frozen=True)
class Process:
    """Schedule + parameterization.

    Args:
        schedule: t -> (alpha, sigma).
        parameterization: The network's target.

    Raises:
        UserError: For a pair that cannot be solved at a training time, such as eps at zero
            terminal SNR.
    """

    schedule: Schedule
    parameterization: Parameterization

    def __post_init__(self) -> None:
        t = torch.linspace(self.schedule.first, 1, 1000, dtype=torch.float64)
        det = self.parameterization.determinant(*self.schedule.at(t))
        worst = int(det.abs().argmin())
        if det[worst].abs() < 1e-9:
            raise UserError(
                f"parameterization {self.parameterization.name!r} cannot be solved "
                f"at t = {t[worst]:.3g}: there alpha is {self.schedule.at(t[worst])[0]:.3g}, "
                "so the network's output has no information about the clean latent; "
                "use v or x0 with this schedule"
            )

    def add_noise(
        self, z: Float[Tensor, "B C h w"], eps: Float[Tensor, "B C h w"], t: float | Tensor
    ) -> Float[Tensor, "B C h w"]:
        """Return x_t = alpha*z + sigma*eps for one t, or one an image (B,)."""
        alpha, sigma = _columns(z, *self.schedule.at(t))
        return alpha * z + sigma * eps

    def target(
        self, z: Float[Tensor, "B C h w"], eps: Float[Tensor, "B C h w"], t: float | Tensor
    ) -> Float[Tensor, "B C h w"]:
        """Return the network's target at x_t: a*z + b*eps."""
        a, b = _columns(z, *self.parameterization.row(*self.schedule.at(t)))
        return a * z + b * eps

    def timestep(self, t: float | Tensor, device: torch.device) -> Float[Tensor, "..."]:
        """Return a time, or one an image (B,), in the network's units: float32, of t's shape."""
        if isinstance(t, Tensor):
            return self.schedule.timestep(t.double()).to(device, torch.float32)
        return _timestep_at(self.schedule, float(t), device)

    def network_input(
        self, x: Float[Tensor, "B C h w"], t: float | Tensor
    ) -> Float[Tensor, "B C h w"]:
        """Return the network's input: x, or x scaled to unit variance (edm)."""
        scale = self.parameterization.input_scale
        return x if scale is None else x * _columns(x, scale(*self.schedule.at(t)))[0]

    def split(
        self, x: Float[Tensor, "B C h w"], y: Float[Tensor, "B C h w"], t: float | Tensor
    ) -> Prediction:
        """Return the clean latent and the noise that y predicts for x at t in (0, 1]."""
        if isinstance(t, Tensor):
            x_x0, y_x0, x_eps, y_eps = _columns(x, *_solution(self, t))
            return Prediction(x_x0 * x + y_x0 * y, x_eps * x + y_eps * y)
        return LinearPrediction(x, y, self.solution(t))

    def solution(self, t: float) -> tuple[float, float, float, float]:
        """Return (a, b, c, d) with x0 = a*x + b*y and eps = c*x + d*y at a time.

        Cached, because runs visit the same times again.
        """
        return _solution_at(self, float(t))


def _solution(process: Process, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the coefficients of x and y in x0 and in eps, float64."""
    alpha, sigma = process.schedule.at(t)
    a, b = process.parameterization.row(alpha, sigma)
    det = alpha * b - sigma * a
    return b / det, -sigma / det, -a / det, alpha / det


@lru_cache(maxsize=8192)
def _solution_at(process: Process, t: float) -> tuple[float, float, float, float]:
    w, x, y, z = _solution(process, t)
    return float(w), float(x), float(y), float(z)


@lru_cache(maxsize=1024)
def _timestep_at(schedule: Schedule, t: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # cached for training too
        return schedule.timestep(torch.tensor(t, dtype=torch.float64)).to(device, torch.float32)
