"""Guidance in a limited interval: w(t) = scale where low <= t <= high, 1 elsewhere.

(Kynkaanniemi et al. 2024, arXiv:2404.07724.) At high noise guidance takes variety away, at low
noise it changes next to nothing; in between it helps. Outside of the interval the baselines are not
called. The paper gives noise levels; for a flow t = 0.2 to 0.85, the defaults here, is sigma/alpha
= 0.25 to 5.7.
"""

from dataclasses import dataclass

from sfumato.errors import UserError
from sfumato.predict.guidance.weights import TimeWeight


@dataclass(frozen=True)
class Interval(TimeWeight):
    """w(t) = scale in an interval.

    Args:
        scale: 1 is off.
        low: Least time, in [0, 1]; 1 is noise.
        high: Largest time.
    """

    low: float = 0.2
    high: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"guidance interval low={self.low}, high={self.high}: "
                "expected times with 0 <= low <= high <= 1, 1 is noise"
            )

    def at(self, t: float) -> float:
        """Return the scale in the interval, else 1."""
        return self.scale if self.low <= t <= self.high else 1.0
