"""The same weight at every time (Ho & Salimans 2022, arXiv:2207.12598)."""

from dataclasses import dataclass

from sfumato.predict.guidance.guide import Moment
from sfumato.predict.guidance.weights import Weigh, check_scale


@dataclass(frozen=True)
class Constant:
    """w(t) = scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def active(self, moment: Moment) -> bool:
        return self.scale != 1

    def begin(self) -> Weigh:
        return lambda moment, conditional, reference: self.scale
