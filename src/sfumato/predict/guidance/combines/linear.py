"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): reference + w
(conditional - reference).

It is linear, so it is the same in x0, eps, v and a flow's velocity. With a weaker network as the
reference it is autoguidance (Karras et al. 2024, arXiv:2406.02507).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.combines import Join
from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction


@dataclass(frozen=True)
class Linear:
    """One reference, no options."""

    references = 1
    always = False
    consistent = True

    def begin(self) -> Join:
        def join(
            x: Tensor, moment: Moment, predictions: Sequence[Prediction], w: float | Tensor
        ) -> Prediction:
            conditional, reference = predictions
            return conditional.away(reference, w)

        return join
