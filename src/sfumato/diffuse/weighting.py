"""Loss weights and the distribution of training times.

`weight(name)` multiplies the squared error of the network's own target. min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4)
clips the weight of the x0 error at gamma; in another parameterization y the x0 error is (sigma/det)^2 times y's.
"""

import torch
from torch import Tensor

from sfumato.diffuse.process import Process
from sfumato.errors import unknown

WEIGHTINGS = ("plain", "min_snr")
TIMES = ("uniform", "logit_normal")


def loss_weight(name: str, process: Process, t: Tensor, gamma: float = 5.0) -> Tensor:
    """The factor (B,) float64 on ||y - target||^2 at t (B,).

    plain: 1. min_snr: min(SNR, gamma) * (sigma/det)^2, which is min(SNR, gamma)/SNR for eps and min(SNR, gamma)/(SNR + 1) for v.
    """
    if name not in WEIGHTINGS:
        raise unknown("weighting", name, WEIGHTINGS)
    if name == "plain":
        return torch.ones_like(t, dtype=torch.float64)
    alpha, sigma = process.schedule.at(t)
    det = process.parameterization.determinant(alpha, sigma)
    return (alpha / sigma).square().clamp(max=gamma) * (sigma / det).square()


def draw_times(name: str, process: Process, count: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times (count,) float64 in (0, 1]: uniform, or logit-normal(mean, std) (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Uniform draws are stratified over the batch: one in each of `count` equal intervals, which lowers the loss's variance and keeps
    every marginal uniform (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    if name not in TIMES:
        raise unknown("distribution of times", name, TIMES)
    if name == "uniform":
        u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    else:
        u = torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float64) * std + mean)
    return process.schedule.sample_times(u)
