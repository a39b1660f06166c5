"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): reference + w (conditional - reference).

It is linear, so it is the same in x0, eps, v and a flow's velocity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction


def mixed(conditional: Tensor, reference: Tensor, w: float | Tensor) -> Tensor:
    """reference + w (conditional - reference), one rounding at a time so that bits do not depend on the batch."""
    return reference + w * (conditional - reference)


@dataclass(frozen=True)
class Linear:
    """One reference."""

    always = False

    def begin(self) -> Callable[[Tensor, Moment, Sequence[Prediction], float | Tensor], Prediction]:
        def combine(x: Tensor, moment: Moment, predictions: Sequence[Prediction], w: float | Tensor) -> Prediction:
            conditional, reference = predictions
            return Prediction(mixed(conditional.x0, reference.x0, w), mixed(conditional.eps, reference.eps, w))

        return combine
