"""Loss weights and the distribution of training times.

`loss_weight` multiplies the error of the network's own target. min-SNR-gamma (Hang et al. 2023,
arXiv:2303.09556, section 3.4) clips the weight of the x0 error at gamma; in another
parameterization y the x0 error is (sigma/det)^2 times y's. The debiased weight of the x0 error is
sqrt(SNR), 1/sqrt(SNR) of the eps error (Yu et al. 2023, arXiv:2310.08442, eq. 11).
"""

import math

import torch
from torch import Tensor

from sfumato.diffuse.process import Process
from sfumato.validate import one_of

WEIGHTINGS = ("plain", "min_snr", "debiased")
ERRORS = ("l2", "huber")
TIMES = ("uniform", "logit_normal", "mode")


def loss_weight(name: str, process: Process, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the factor of ||y - target||^2 at each time.

    Args:
        name: "plain": 1. "min_snr": min(SNR, gamma) * (sigma/det)^2, which is min(SNR, gamma)/SNR
            for eps and min(SNR, gamma)/(SNR + 1) for v. "debiased": sqrt(SNR) * (sigma/det)^2.
        process: Schedule and parameterization.
        t: Times (B,).
        gamma: Of min_snr.

    Returns:
        (B,), float64.

    Raises:
        UserError: For an unknown name.
    """
    if one_of("weighting", name, WEIGHTINGS) == "plain":
        return torch.ones_like(t, dtype=torch.float64)
    alpha, sigma = process.schedule.at(t)
    det = process.parameterization.determinant(alpha, sigma)
    snr = (alpha / sigma).square()
    return (snr.sqrt() if name == "debiased" else snr.clamp(max=gamma)) * (sigma / det).square()


def pointwise_error(name: str, y: Tensor, target: Tensor, delta: float = 0.1) -> Tensor:
    """Return the error of each value.

    Args:
        name: "l2": the square of the difference d. "huber": 2 delta (sqrt(d^2 + delta^2) - delta),
            which is d^2 near 0 and whose slope is at most 2 delta (pseudo-Huber, Charbonnier et al.
            1997), so that outliers weigh less.
        y: Of the network.
        target: Of the same shape.
        delta: Of huber, above 0.

    Raises:
        UserError: For an unknown name.
    """
    squared = (y - target).square()
    if one_of("error", name, ERRORS) == "l2":
        return squared
    return 2 * delta * ((squared + delta**2).sqrt() - delta)


def draw_times(
    name: str,
    process: Process,
    count: int,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
    scale: float = 1.29,
    shift: float = 1.0,
) -> Tensor:
    """Draw training times.

    The distributions are those of Esser et al. 2024 (arXiv:2403.03206, section 3.1). u is
    stratified over the batch, one in each of `count` equal intervals. That lowers the loss's
    variance and keeps every marginal uniform (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).

    Args:
        name: "uniform", "logit_normal" (eq. 19), or "mode" (eq. 20):
            1 - u - scale (cos^2(pi u / 2) - 1 + u), around the middle for scales above 0.
        process: Its schedule maps u to times.
        count: Number of times.
        generator: Source of u.
        mean: Of logit_normal.
        std: Of logit_normal.
        scale: Of mode, from -1 to 2/(pi - 2).
        shift: Moves all times towards the noise as sampling times are (eq. 23); 1 does not.

    Returns:
        (count,), float64 in (0, 1].

    Raises:
        UserError: For an unknown name.
    """
    if one_of("distribution of times", name, TIMES) == "logit_normal":
        u = torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float64) * std + mean)
    else:
        u = (
            torch.randperm(count, generator=generator)
            + torch.rand(count, generator=generator, dtype=torch.float64)
        ) / count
    if name == "mode":
        u = 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)
    return process.schedule.sample_times(shift * u / (1 + (shift - 1) * u) if shift != 1 else u)


MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Scales between which the map of "mode" is monotone: its times lie in (0, 1)."""
