"""Guidance that keeps the conditional prediction's contrast.

(Lin et al. 2023, arXiv:2305.08891, eq. 15-16.)

    x0_w = x0_base + w (x0_c - x0_base)
    x0 = phi (std(x0_c)/std(x0_w)) x0_w + (1 - phi) x0_w, the standard deviation over each image

Large weights make x0 too wide, and images over-exposed; phi pulls the width back. The paper
rescales the network's output in any parameterization. Here it is x0, where the image is, in every
parameterization, and eps follows, so that the pair adds up to x.
"""

from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.algebra import ratio, total, with_x0
from sfumato.predict.guidance.rules import CombineFn, Moment, Prediction, Predictions, Rule, Scale
from sfumato.types import mixed
from sfumato.validate import number_in


@dataclass(frozen=True)
class Rescale(Rule):
    """Settings of the rescaling.

    Args:
        phi: In [0, 1]: 0 is plain guidance, 1 the conditional's standard deviation; the paper
            suggests 0.7.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        number_in("guidance rescale phi", self.phi, 0, 1, hint="0 is plain guidance")

    def begin(self) -> CombineFn:
        """Return the guided x0 at the conditional prediction's deviation."""

        def combine(x: Tensor, moment: Moment, predictions: Predictions, w: Scale) -> Prediction:
            conditional, baseline = predictions
            x0 = mixed(conditional.x0, baseline.x0, w)
            width = ratio(deviation(conditional.x0), deviation(x0), 1.0)
            return with_x0(conditional, ((1 - self.phi) + self.phi * width) * x0, moment)

        return combine


def deviation(value: Tensor) -> Tensor:
    """Return the standard deviation over each image: (B, C, h, w) -> (B, 1, 1, 1)."""
    count = value[0].numel()
    centred = value - total(value) / count
    return (total(centred.square()) / count).sqrt()
