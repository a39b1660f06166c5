"""Adaptive projected guidance, APG (Sadat et al. 2024, arXiv:2410.02416).

With D = x0_c - x0_base:  D <- D + momentum D_before;  D <- D min(1, threshold/||D||);
D = D_par + D_orth, along and across x0_c;  x0 = x0_c + (w - 1) (D_orth + eta D_par).

Saturated colours come from the part along x0_c, so eta < 1 damps it. The threshold bounds the step.
A negative momentum moves away from the directions of the steps before. The rule acts on x0, as in
the paper, and eps follows, so that the pair adds up to x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.predict.guidance.algebra import ratio, total, with_x0
from sfumato.predict.guidance.rules import CombineFn, Moment, Prediction, Predictions, Rule, Scale
from sfumato.validate import number_in


@dataclass(frozen=True)
class Project(Rule):
    """Settings of APG.

    Args:
        eta: Share of the part along x0_c that stays. 1 without threshold and momentum is plain
            guidance.
        threshold: Bound of ||D||, which grows with the latent's size (2.5 to 15 are usual); 0 is
            none.
        momentum: In (-1, 1); 0 is none.
    """

    eta: float = 0.0
    threshold: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        number_in("guidance project eta", self.eta, hint="1 is plain guidance")
        number_in("guidance project threshold", self.threshold, 0, hint="0 is no threshold")
        number_in(
            "guidance project momentum", self.momentum, above=-1, below=1, hint="0 is no momentum"
        )

    @property
    def stateful(self) -> bool:
        """True with a momentum."""
        return self.momentum != 0

    def begin(self) -> CombineFn:
        """Return the projected step, with the momentum of one run."""
        before: Tensor | None = None

        def combine(x: Tensor, moment: Moment, predictions: Predictions, w: Scale) -> Prediction:
            nonlocal before
            conditional, baseline = predictions
            step = conditional.x0 - baseline.x0
            if self.momentum:
                step = step if before is None else step + self.momentum * before
                before = step
            if self.threshold:
                size = total(step.square()).sqrt()
                step = step * ratio(torch.full_like(size, self.threshold), size, 1.0).clamp(max=1)
            x0 = conditional.x0
            along = ratio(total(step * x0), total(x0.square()), 0.0) * x0
            return with_x0(conditional, x0 + (w - 1) * (step - (1 - self.eta) * along), moment)

        return combine
