"""Classifier-free guidance: baseline + w (conditional - baseline).

(Ho & Salimans 2022, arXiv:2207.12598, eq. 6.) It is linear, so it is the same in x0, eps, v and a
flow's velocity. With a weaker network as the baseline it is autoguidance (Karras et al. 2024,
arXiv:2406.02507).
"""

from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.rules import CombineFn, Moment, Prediction, Predictions, Rule, Scale


@dataclass(frozen=True)
class Linear(Rule):
    """One baseline, no options."""

    def begin(self) -> CombineFn:
        """Return baseline + w (conditional - baseline)."""

        def combine(x: Tensor, moment: Moment, predictions: Predictions, w: Scale) -> Prediction:
            conditional, baseline = predictions
            return conditional.away(baseline, w)

        return combine
