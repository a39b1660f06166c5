"""Parameterizations: the target y = a*z + b*eps, and the solve from y to (x0, eps).

With x = alpha*z + sigma*eps and det = alpha*b - sigma*a:

    x0 = (b*x - sigma*y) / det,  eps = (alpha*y - a*x) / det.

eps: Ho et al. 2020; v: Salimans & Ho 2022, arXiv:2202.00512, appendix D; flow eps - z: Lipman et
al. 2023, arXiv:2210.02747. edm (Karras et al. 2022, arXiv:2206.00364, eq. 7 and table 1) for any
(alpha, sigma), with S^2 = alpha^2 d^2 + sigma^2 and d the data's standard deviation: D = (alpha d^2
x + sigma d S y) / S^2 is the row (sigma/(d S), -alpha d/S), and the network's input is x/S. det =
-S/d is never zero. consistency: the same with the boundary condition of Song et al. 2023
(arXiv:2303.01469, appendix C).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.validate import number_in, one_of


@dataclass(frozen=True)
class Parameterization:
    """A row (a, b), and the scale of the network's input.

    Args:
        name: In configs.
        row: (alpha, sigma) -> (a, b), float64 tensors.
        input_scale: (alpha, sigma) -> factor of x; None for 1.
    """

    name: str
    row: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    input_scale: Callable[[Tensor, Tensor], Tensor] | None = None

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return alpha*b - sigma*a; zero where y carries no information about z beside x."""
        a, b = self.row(alpha, sigma)
        return alpha * b - sigma * a


PARAMETERIZATIONS = {
    "eps": Parameterization(
        "eps", lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha))
    ),
    "x0": Parameterization(
        "x0", lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha))
    ),
    "v": Parameterization("v", lambda alpha, sigma: (-sigma, alpha)),
    "flow": Parameterization(
        "flow", lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha))
    ),
}


@dataclass(frozen=True)
class _EDMRow:
    sigma_data: float
    sign: int = 1

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.hypot(alpha * self.sigma_data, sigma) * self.sign
        return sigma / (self.sigma_data * total), -alpha * self.sigma_data / total


@dataclass(frozen=True)
class _EDMInput:
    sigma_data: float

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / torch.hypot(alpha * self.sigma_data, sigma)


def edm(sigma_data: float = 1.0, flipped: bool = False) -> Parameterization:
    """Return the preconditioning of Karras et al.

    Args:
        sigma_data: Standard deviation of the data: 1 for standardised latents, 0.5 in the paper.
        flipped: The network's output is -y. With sigma_data 1 that is v of x/S, for which CosXL
            and Stable Video Diffusion are trained ("edm_v").

    Raises:
        UserError: For a sigma_data that is not positive.
    """
    number_in("sigma_data", sigma_data, above=0, hint="the standard deviation of the data")
    return Parameterization(
        "edm_v" if flipped else "edm",
        _EDMRow(sigma_data, -1 if flipped else 1),
        _EDMInput(sigma_data),
    )


PARAMETERIZATIONS["edm"] = edm()


@dataclass(frozen=True)
class _ConsistencyRow:
    sigma_data: float
    sigma_min: float

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # x0 = skip x + out y, solved for y; at sigma_min itself, where out is 0, next to it.
        d, low = self.sigma_data, self.sigma_min
        above = (sigma - low).clamp(min=1e-6 * low)
        skip, out = d**2 / (above.square() + d**2), above * d / torch.hypot(sigma, d * alpha)
        return (1 - skip * alpha) / out, -sigma * skip / out


def consistency(sigma_data: float = 0.5, sigma_min: float = 0.002) -> Parameterization:
    """Return the preconditioning of consistency models, of levels with alpha = 1.

    x0 = d^2/((sigma - sigma_min)^2 + d^2) x + (sigma - sigma_min) d/S y: the identity at sigma_min.

    Args:
        sigma_data: d, the standard deviation of the data.
        sigma_min: Noise level at which the results lie.

    Raises:
        UserError: For numbers that are not positive.
    """
    number_in("sigma_data", sigma_data, above=0, hint="the standard deviation of the data")
    number_in("sigma_min", sigma_min, above=0)
    return Parameterization(
        "consistency", _ConsistencyRow(sigma_data, sigma_min), _EDMInput(sigma_data)
    )


def parameterization(name: str) -> Parameterization:
    """Return a parameterization by name: eps, x0, v, flow or edm."""
    return PARAMETERIZATIONS[one_of("parameterization", name, PARAMETERIZATIONS)]
