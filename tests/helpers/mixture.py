"""A mixture of three Gaussians in two dimensions, whose denoiser is exact.

z ~ sum_k w_k N(m_k, s_k^2 I), so x = alpha z + sigma eps ~ sum_k w_k N(alpha m_k, v_k I) with v_k =
alpha^2 s_k^2 + sigma^2, and E[z | x] is the mean of the components' posterior means, weighted by
Bayes' rule. All tensors are float64; points have the shape (N, 2, 1, 1) of latents.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.diffuse.schedule import Schedule
from sfumato.types import Prediction

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 0.0], [1.5, 1.0], [1.0, -2.0]], dtype=torch.float64)
STDS = torch.tensor([0.5, 0.3, 0.7], dtype=torch.float64)

Denoise = Callable[[Tensor, float], Prediction]
"""A denoiser of noisy latents at a time in [0, 1]."""


def log_densities(points: Tensor, alpha: float, sigma: float) -> Tensor:
    """Return log(w_k N(x; alpha m_k, v_k I)) of points (N, 2) for each component: (N, 3)."""
    v = (alpha * STDS).square() + sigma**2
    return (
        WEIGHTS.log()
        - torch.log(2 * math.pi * v)
        - (points[:, None] - alpha * MEANS).square().sum(-1) / (2 * v)
    )


def clean_mean(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Return E[z | x] in the shape of x; squares are written out, for speed."""
    points = x.flatten(1).double()
    v = (alpha * STDS).square() + sigma**2
    gain = alpha * STDS.square() / v
    constant = WEIGHTS.log() - v.log() - (alpha * MEANS).square().sum(1) / (2 * v)
    square = points.square().sum(1, keepdim=True)
    r = torch.addmm(constant - square / (2 * v), points, (alpha * MEANS / v[:, None]).T).softmax(1)
    return (r @ (MEANS * (1 - alpha * gain)[:, None]) + (r @ gain)[:, None] * points).reshape(
        x.shape
    )


def exact_denoiser(schedule: Schedule, calls: list[float] | None = None) -> Denoise:
    """Return the mixture's own denoiser under a schedule; `calls` collects its times."""

    def denoise(x: Tensor, t: float) -> Prediction:
        if calls is not None:
            calls.append(t)
        alpha, sigma = schedule.point(t)
        x0 = clean_mean(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def noisy_points(count: int, point: tuple[float, float], seed: int) -> Tensor:
    """Draw alpha z + sigma eps for data z of the mixture.

    Args:
        count: number of points N.
        point: (alpha, sigma).
        seed: seed of data and noise.

    Returns:
        Points (N, 2, 1, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    z, noise = torch.randn((2, count, 2), generator=generator, dtype=torch.float64)
    return (point[0] * (MEANS[component] + STDS[component, None] * z) + point[1] * noise)[
        ..., None, None
    ]
