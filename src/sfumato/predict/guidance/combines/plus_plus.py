"""CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2): x0 is guided, and noised again with the
reference's eps.

x0 = x0_ref + w (x0_c - x0_ref), eps = eps_ref, with w = lambda in [0, 1]. The pair does not add up
to x, so only samplers that use both halves as they are (traits `both`: DDIM, Euler) know what to do
with it; there a step to (alpha_s, sigma_s) is that of plain guidance with w = lambda/(1 - e^-h), h
the step in log(alpha/sigma).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.combines import Join
from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction, mixed


@dataclass(frozen=True)
class PlusPlus:
    """One reference, no options. w = 1 is full guidance here and not off, so the reference is
    always asked.
    """

    references = 1
    always = True
    consistent = False

    def begin(self) -> Join:
        def join(
            x: Tensor, moment: Moment, predictions: Sequence[Prediction], w: float | Tensor
        ) -> Prediction:
            conditional, reference = predictions
            return Prediction(mixed(conditional.x0, reference.x0, w), reference.eps)

        return join
