"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): prediction = reference + w * (conditional - reference).

w = 1 is off, and then the second pass is not run. The combination is linear, so it is the same in x0, eps and v.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.types import Conditioning, Prediction

Predict = Callable[[Tensor, float, Conditioning], Prediction]


def classifier_free(denoiser: Predict, reference: Conditioning, weight: float) -> Predict:
    """A denoiser guided away from `reference` (the null condition, or a negative prompt): both passes are one batch of 2B."""

    def guided(x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        if weight == 1:
            return denoiser(x, t, conditioning)
        both = denoiser(torch.cat([x, x]), t, Conditioning.cat([conditioning, reference]))
        (x0, x0_ref), (eps, eps_ref) = both.x0.chunk(2), both.eps.chunk(2)
        return Prediction(torch.lerp(x0_ref, x0, weight), torch.lerp(eps_ref, eps, weight))

    return guided
