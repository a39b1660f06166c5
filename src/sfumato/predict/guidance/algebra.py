"""Algebra of weights and rules: sums over images, and pairs (x0, eps) at one x.

Everything is finite at both ends: alpha = 0 (a flow at t = 1, zero terminal SNR) and sigma = 0
(clean).
"""

import torch
from torch import Tensor

from sfumato.predict.guidance.moment import Moment
from sfumato.types import Prediction


def total(value: Tensor) -> Tensor:
    """Sum over each image: (B, C, h, w) -> (B, 1, 1, 1).

    Image by image: a sum over a whole batch may be split among threads by the batch's size, and its
    last bits with it.
    """
    return torch.stack([image.sum() for image in value.flatten(1)])[:, None, None, None]


def ratio(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    """Return numerator/denominator, and `otherwise` where the denominator is 0."""
    zero = denominator == 0
    quotient = numerator / torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.full_like(numerator, otherwise), quotient)


def with_x0(start: Prediction, x0: Tensor, moment: Moment) -> Prediction:
    """Return the pair with this x0 at the x of another pair.

    eps = eps_start - (alpha/sigma) (x0 - x0_start), which is (x - alpha*x0)/sigma without the
    cancellation. Without signal (alpha = 0) eps is x/sigma for any x0.
    """
    if moment.sigma == 0:  # clean: any eps fits
        return Prediction(x0, start.eps)
    return Prediction(x0, start.eps - moment.alpha / moment.sigma * (x0 - start.x0))


def from_velocity(x: Tensor, velocity: Tensor, moment: Moment) -> Prediction:
    """Return the pair at x with eps - x0 = velocity.

    x0 = (x - sigma v)/(alpha + sigma), eps = (x + alpha v)/(alpha + sigma).
    """
    whole = moment.alpha + moment.sigma
    x0 = 1 / whole * x - moment.sigma / whole * velocity
    return Prediction(x0, 1 / whole * x + moment.alpha / whole * velocity)
