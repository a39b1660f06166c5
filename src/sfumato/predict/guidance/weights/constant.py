"""The same weight at every time (Ho & Salimans 2022, arXiv:2207.12598)."""

from dataclasses import dataclass

from sfumato.predict.guidance.weights import TimeWeight


@dataclass(frozen=True)
class Constant(TimeWeight):
    """w(t) = scale."""

    def at(self, t: float) -> float:
        """Return the scale."""
        return self.scale
