"""The same weight at every time (Ho & Salimans 2022, arXiv:2207.12598)."""

from dataclasses import dataclass

from sfumato.predict.guidance.guide import Moment
from sfumato.predict.guidance.weights import WeightFn, check_scale


@dataclass(frozen=True)
class Constant:
    """w(t) = scale.

    Args:
        scale: 1 is off.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def active(self, moment: Moment) -> bool:
        return self.scale != 1

    def begin(self) -> WeightFn:
        return lambda moment, conditional, baseline: self.scale
