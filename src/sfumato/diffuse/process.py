"""The process: a schedule and a parameterization, and the three lines that connect z, noise, x and a network's output y.

add_noise: x = alpha*z + sigma*eps;  target: y = a*z + b*eps;  split: (x, y) -> (x0, eps), the inverse of both.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.parameterization import Parameterization
from sfumato.diffuse.schedule import Schedule
from sfumato.errors import UserError
from sfumato.types import Prediction


def _columns(like: Tensor, *values: Tensor) -> list[Tensor]:
    """Float64 coefficients () or (B,) as tensors that broadcast over `like` (B, C, h, w), in its dtype and on its device."""
    return [v.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1)) for v in values]


@dataclass(frozen=True)
class Process:
    """Schedule + parameterization. A pair that cannot be solved somewhere in (0, 1] is refused when it is built (`UserError`)."""

    schedule: Schedule
    parameterization: Parameterization

    def __post_init__(self) -> None:
        t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
        det = self.parameterization.determinant(*self.schedule.at(t))
        worst = int(det.abs().argmin())
        if det[worst].abs() < 1e-9:
            raise UserError(
                f"parameterization {self.parameterization.name!r} cannot be solved at t = {t[worst]:.3g}: there alpha is {self.schedule.at(t[worst])[0]:.3g}, "
                "so the network's output says nothing about the clean latent; use v or x0 with this schedule"
            )

    def add_noise(self, z: Float[Tensor, "B C h w"], eps: Float[Tensor, "B C h w"], t: float | Tensor) -> Float[Tensor, "B C h w"]:
        """x_t = alpha*z + sigma*eps for one t or a t an image (B,)."""
        alpha, sigma = _columns(z, *self.schedule.at(t))
        return alpha * z + sigma * eps

    def target(self, z: Float[Tensor, "B C h w"], eps: Float[Tensor, "B C h w"], t: float | Tensor) -> Float[Tensor, "B C h w"]:
        """What the network should output at x_t: a*z + b*eps."""
        a, b = _columns(z, *self.parameterization.row(*self.schedule.at(t)))
        return a * z + b * eps

    def split(self, x: Float[Tensor, "B C h w"], y: Float[Tensor, "B C h w"], t: float | Tensor) -> Prediction:
        """The clean latent and the noise that the output y claims for x at t in (0, 1]."""
        alpha, sigma = self.schedule.at(t)
        a, b = self.parameterization.row(alpha, sigma)
        det = alpha * b - sigma * a
        x_x0, y_x0, x_eps, y_eps = _columns(x, b / det, -sigma / det, -a / det, alpha / det)
        return Prediction(x_x0 * x + y_x0 * y, x_eps * x + y_eps * y)
