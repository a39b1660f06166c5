"""The same weight at every time (Ho & Salimans 2022, arXiv:2207.12598)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction


@dataclass(frozen=True)
class Constant:
    """w(t) = scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.scale) < float("inf"):
            raise UserError(f"guidance {self.scale}: expected a finite number; 1 is off")

    def active(self, moment: Moment) -> bool:
        return self.scale != 1

    def begin(self) -> Callable[[Moment, Prediction, Prediction], float | Tensor]:
        return lambda moment, conditional, reference: self.scale
