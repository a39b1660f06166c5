"""CFG-Zero*: an optimised scale for the baseline, and a run that begins without moving.

(Fan et al. 2025, arXiv:2503.18886.) On the velocity v = eps - x0:

    v = s v_base + w (v_c - s v_base),  s = <v_c, v_base>/||v_base||^2

s minimises ||v_c - s v_base|| image by image. v = 0 at the first `zero_steps` times of the run,
where a network that is not fully trained is worse than none. v = 0 keeps x/(alpha + sigma), which
for a flow is x.
"""

from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.algebra import from_velocity, ratio, total
from sfumato.predict.guidance.rules import CombineFn, Moment, Prediction, Predictions, Rule, Scale
from sfumato.types import mixed
from sfumato.validate import whole_number


@dataclass(frozen=True)
class ZeroStar(Rule):
    """Settings of CFG-Zero*.

    Args:
        zero_steps: Number of a run's first times without motion (one is usual). Where w is 1 there,
            the prediction is the conditional one.
    """

    zero_steps: int = 1

    def __post_init__(self) -> None:
        whole_number("guidance zero_star zero_steps", self.zero_steps, 0)

    def begin(self) -> CombineFn:
        """Return the guided velocity, or none at the first times."""

        def combine(x: Tensor, moment: Moment, predictions: Predictions, w: Scale) -> Prediction:
            conditional, baseline = (p.eps - p.x0 for p in predictions)
            if moment.index < self.zero_steps:
                return from_velocity(x, 0 * conditional, moment)
            s = ratio(total(conditional * baseline), total(baseline.square()), 1.0)
            return from_velocity(x, mixed(conditional, s * baseline, w), moment)

        return combine
