"""A weight that rises or falls along the run.

(Wang et al. 2024, arXiv:2404.13040, who compare such schedulers.)

    w(t) = 1 + (scale - 1) r(t)
    r(t) = last + (first - last) f(t),  f = t, (1 - cos(pi t))/2 or t^power

r is `first` at t = 1 and `last` at t = 0. The defaults go from off to scale. Their "linear"
scheduler, which keeps the mean over the run, is first 0, last 2. A negative `first` or `last` gives
w below 1, towards the baseline. w stays above 0, where the baseline alone would be drawn.
"""

import math
from dataclasses import dataclass

from sfumato.errors import UserError
from sfumato.predict.guidance.weights import TimeWeight
from sfumato.validate import number_in, one_of

SHAPES = ("linear", "cosine", "power")


@dataclass(frozen=True)
class Ramp(TimeWeight):
    """w(t) = 1 + (scale - 1) r(t).

    Args:
        scale: 1 is off.
        first: Share of the scale at the start of a run, t = 1.
        last: Share of the scale at its end, t = 0.
        shape: "linear", "cosine" or "power".
        power: Exponent of the shape "power", above 0.
    """

    first: float = 0.0
    last: float = 1.0
    shape: str = "linear"
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number_in("guidance ramp first", self.first, hint="1 is the whole scale")
        number_in("guidance ramp last", self.last, hint="1 is the whole scale")
        one_of("shape of a guidance ramp", self.shape, SHAPES)
        number_in("guidance ramp power", self.power, above=0, hint="1 is linear")
        for name, t in (("first", 1.0), ("last", 0.0)):
            if self.at(t) <= 0:
                raise UserError(
                    f"guidance ramp {name}={getattr(self, name):g} of the scale {self.scale:g} "
                    f"makes the weight {self.at(t):g}: expected one above 0, "
                    "where the negative prompt is not drawn itself"
                )

    def at(self, t: float) -> float:
        """Return w at a time."""
        if self.shape == "cosine":
            f = (1 - math.cos(math.pi * t)) / 2
        else:
            f = t if self.shape == "linear" else t**self.power
        return 1 + (self.scale - 1) * (self.last + (self.first - self.last) * f)
