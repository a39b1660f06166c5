"""CFG-Zero* (Fan et al. 2025, arXiv:2503.18886): an optimised scale for the reference, and a run
that begins without moving.

On the velocity v = eps - x0:  v = s v_ref + w (v_c - s v_ref),  s = <v_c, v_ref>/||v_ref||^2, which
minimises ||v_c - s v_ref|| image by image; and v = 0 at the first `zero_steps` times of the run,
where a network that is not fully trained is worse than nothing. v = 0 keeps x/(alpha + sigma) where
it is: for a flow that is x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.algebra import from_velocity, ratio, total
from sfumato.predict.guidance.combines import Join
from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction, mixed
from sfumato.validate import whole_number


@dataclass(frozen=True)
class ZeroStar:
    """zero_steps: at how many of a run's first times nothing moves (one is usual); where w is 1
    there, they are as they are.
    """

    zero_steps: int = 1

    references = 1
    always = False
    consistent = True

    def __post_init__(self) -> None:
        whole_number("guidance zero_star zero_steps", self.zero_steps, 0)

    def begin(self) -> Join:
        def join(
            x: Tensor, moment: Moment, predictions: Sequence[Prediction], w: float | Tensor
        ) -> Prediction:
            conditional, reference = (p.eps - p.x0 for p in predictions)
            if moment.index < self.zero_steps:
                return from_velocity(x, 0 * conditional, moment)
            s = ratio(total(conditional * reference), total(reference.square()), 1.0)
            return from_velocity(x, mixed(conditional, s * reference, w), moment)

        return join
