"""What a network predicts: the target y = a*z + b*eps, and the one 2x2 solve that turns y back into (x0, eps).

With x = alpha*z + sigma*eps and det = alpha*b - sigma*a:  x0 = (b*x - sigma*y) / det,  eps = (alpha*y - a*x) / det.
eps: Ho et al. 2020; v: Salimans & Ho 2022, arXiv:2202.00512, appendix D; flow eps - z: Lipman et al. 2023, arXiv:2210.02747.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import unknown


@dataclass(frozen=True)
class Parameterization:
    """A row (a, b) as functions of (alpha, sigma), float64 tensors."""

    name: str
    row: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha*b - sigma*a; zero where y says nothing new about z."""
        a, b = self.row(alpha, sigma)
        return alpha * b - sigma * a


PARAMETERIZATIONS = {
    "eps": Parameterization("eps", lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha))),
    "x0": Parameterization("x0", lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha))),
    "v": Parameterization("v", lambda alpha, sigma: (-sigma, alpha)),
    "flow": Parameterization("flow", lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha))),
}


def parameterization(name: str) -> Parameterization:
    """A parameterization by name: eps, x0, v or flow."""
    if name not in PARAMETERIZATIONS:
        raise unknown("parameterization", name, PARAMETERIZATIONS)
    return PARAMETERIZATIONS[name]
