"""Guidance with two baselines, p1 and p2, and two scales, w and `second`.

p is x0 and eps alike:

    chain   p = p2 + second (p1 - p2) + w (p_c - p1): p1 has one of two conditions and p2 none
            (Brooks et al. 2023, arXiv:2211.09800, eq. 3)
    sum     p = p1 + second (p2 - p1) + w (p_c - p1): p1 has no condition and p2 another one
            (Liu et al. 2022, arXiv:2206.01714)
    away    p = p_c + (w - 1) (p_c - p1) + (second - 1) (p_c - p2): away from both, as from no
            condition and from perturbed attention (Ahn et al. 2024, arXiv:2403.17377)

For `away` a second scale from 0 to 1 is off too, so that p never is p2 alone.

The weights of the three predictions sum to 1, so it is the same in every parameterization. Where
p1 = p2 the first two are plain guidance with w, and the third with w + second - 1. The second scale
can be limited to an interval, as by Stability AI for skipped layers in early steps. Elsewhere it is
off, p = p1 + w (p_c - p1), and p2 is not computed.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.guidance.rules import CombineFn, Moment, Prediction, Predictions, Rule, Scale
from sfumato.types import mixed
from sfumato.validate import number_in, one_of

KINDS = {"chain": 1.0, "sum": 0.0, "away": 1.0}
"""Kind -> the second scale at which w = 1 is the conditional prediction."""


@dataclass(frozen=True)
class Dual(Rule):
    """Settings of two baselines.

    Args:
        kind: "chain", "sum" or "away".
        second: The second scale; for "away" at least 0, and 0 to 1 is off.
        low: Least time at which it acts, in [0, 1]; 1 is noise.
        high: Largest time at which it acts.
    """

    kind: str = "chain"
    second: float = 1.5
    low: float = 0.0
    high: float = 1.0

    num_baselines = 2

    def __post_init__(self) -> None:
        one_of("kind of dual guidance", self.kind, KINDS)
        off = f"{KINDS[self.kind]:g}"
        low, off = (0.0, "0 to 1") if self.kind == "away" else (-math.inf, off)
        number_in("guidance dual second", self.second, low, hint=f"{off} is off")
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"guidance dual low={self.low}, high={self.high}: "
                "expected times with 0 <= low <= high <= 1, 1 is noise"
            )

    def active_baselines(self, moment: Moment) -> int:
        """Return 2 where the second scale acts, 1 elsewhere."""
        return 2 if self.low <= moment.t <= self.high else 1

    @property
    def always(self) -> bool:
        """True if the second scale acts where w is 1."""
        return self._second != KINDS[self.kind]

    @property
    def _second(self) -> float:
        """The second scale, at least 1 for "away"."""
        return max(self.second, 1.0) if self.kind == "away" else self.second

    def begin(self) -> CombineFn:
        """Return the sum of both differences, or of one where the second scale is off."""

        def both(conditional: Tensor, one: Tensor, two: Tensor, w: Scale) -> Tensor:
            if self.kind == "chain":
                return mixed(one, two, self.second) + w * (conditional - one)
            if self.kind == "sum":
                return mixed(two, one, self.second) + w * (conditional - one)
            moved = conditional + (w - 1) * (conditional - one)
            return moved + (self._second - 1) * (conditional - two)

        def combine(x: Tensor, moment: Moment, predictions: Predictions, w: Scale) -> Prediction:
            conditional, one, *rest = predictions
            if not rest:
                return conditional.away(one, w)
            (two,) = rest
            x0 = both(conditional.x0, one.x0, two.x0, w)
            return Prediction(x0, both(conditional.eps, one.eps, two.eps, w))

        return combine
