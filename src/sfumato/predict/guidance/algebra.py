"""What weights and combines share: mixtures, sums over one image, and pairs (x0, eps) that add up
to x = alpha*x0 + sigma*eps.

Everything is finite at both ends: alpha = 0 (a flow at t = 1, zero terminal SNR) and sigma = 0
(clean).
"""

import torch
from torch import Tensor

from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction


def total(value: Tensor) -> Tensor:
    """The sum over each image's numbers: (B, C, h, w) -> (B, 1, 1, 1).

    Image by image: a sum over a whole batch may be split among threads by the batch's size, and its
    last bits with it.
    """
    return torch.stack([image.sum() for image in value.flatten(1)])[:, None, None, None]


def ratio(above: Tensor, below: Tensor, otherwise: float) -> Tensor:
    """above/below, and `otherwise` where below is 0."""
    zero = below == 0
    return torch.where(
        zero,
        torch.full_like(above, otherwise),
        above / torch.where(zero, torch.ones_like(below), below),
    )


def moved(start: Prediction, x0: Tensor, moment: Moment) -> Prediction:
    """The pair with this x0 that adds up to the x that `start` adds up to: eps = eps_start -
    (alpha/sigma) (x0 - x0_start).

    That is (x - alpha*x0)/sigma without the cancellation; without signal (alpha = 0) eps is x/sigma
    whatever x0 is.
    """
    if moment.sigma == 0:  # clean: any eps adds up
        return Prediction(x0, start.eps)
    return Prediction(x0, start.eps - moment.alpha / moment.sigma * (x0 - start.x0))


def from_velocity(x: Tensor, velocity: Tensor, moment: Moment) -> Prediction:
    """The pair at x with eps - x0 = velocity: x0 = (x - sigma v)/(alpha + sigma), eps = (x + alpha
    v)/(alpha + sigma).
    """
    whole = moment.alpha + moment.sigma
    return Prediction(
        1 / whole * x - moment.sigma / whole * velocity,
        1 / whole * x + moment.alpha / whole * velocity,
    )
