"""CFG++: x0 is guided, and noised again with the baseline's eps.

(Chung et al. 2024, arXiv:2406.08070, algorithm 2.) x0 = x0_base + w (x0_c - x0_base), eps =
eps_base, with w = lambda in [0, 1]. The pair does not add up to x, so only samplers that use both
halves as they are (trait `uses_x0_and_eps`: DDIM, Euler) can use it. There a step to (alpha_s,
sigma_s) is that of plain guidance with w = lambda/(1 - e^-h), h the step in log(alpha/sigma).
"""

from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.rules import CombineFn, Moment, Prediction, Predictions, Rule, Scale
from sfumato.types import mixed


@dataclass(frozen=True)
class PlusPlus(Rule):
    """One baseline, no options.

    w = 1 is full guidance here and not off, so the baseline is always needed.
    """

    consistent = False
    scale_is_share = True

    @property
    def always(self) -> bool:
        """True."""
        return True

    def begin(self) -> CombineFn:
        """Return the guided x0 with the baseline's eps."""

        def combine(x: Tensor, moment: Moment, predictions: Predictions, w: Scale) -> Prediction:
            conditional, baseline = predictions
            return Prediction(mixed(conditional.x0, baseline.x0, w), baseline.eps)

        return combine
