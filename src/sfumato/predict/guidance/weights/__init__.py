"""Guidance weights, one file each, found by name.

Where w is 1 guidance is off, and the baselines are not called. A weight is a frozen dataclass of
settings, `scale` first, with w between 1 and that scale unless its options say otherwise. At
scale 1 every weight is off. Memory from step to step belongs to the function that `begin` returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sfumato.predict.guidance.moment import Moment
from sfumato.types import Prediction
from sfumato.validate import number_in

WeightFn = Callable[[Moment, Prediction, Prediction], float | Tensor]
"""(moment, conditional, baseline) -> w.

w is a number or one an image (B, 1, 1, 1), and 1 where the weight is inactive.
"""


@dataclass(frozen=True)
class Weight(ABC):
    """The distance by which predictions move away from a baseline.

    Args:
        scale: 1 is off.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        number_in("guidance scale", self.scale, hint="1 is off")

    @abstractmethod
    def active(self, moment: Moment) -> bool:
        """Return True where the baselines are needed; the time and the noise level alone decide."""

    @abstractmethod
    def begin(self) -> WeightFn:
        """Return the weight of one run."""


class TimeWeight(Weight):
    """A weight that depends on the time alone."""

    @abstractmethod
    def at(self, t: float) -> float:
        """Return w at a time."""

    def active(self, moment: Moment) -> bool:
        """Return True where w is not 1."""
        return self.at(moment.t) != 1

    def begin(self) -> WeightFn:
        """Return w by the time of the moment."""
        return lambda moment, conditional, baseline: self.at(moment.t)
