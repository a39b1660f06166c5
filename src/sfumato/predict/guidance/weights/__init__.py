"""Guidance weights, one file each, found by name.

Where w is 1 guidance is off, and the baselines are not called. A weight is a frozen dataclass of
settings, `scale` first, with w between 1 and that scale but for what its options say. At scale 1
every weight is off. It has two methods:

    active(moment) -> bool      True where the baselines are needed
    begin() -> WeightFn         a function for one run

Memory from step to step belongs to the function that `begin` returns. A weight that depends on the
predictions can be off before they are computed only by time or noise level.
"""

from collections.abc import Callable

from torch import Tensor

from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction
from sfumato.validate import number_in

WeightFn = Callable[[Moment, Prediction, Prediction], float | Tensor]
"""(moment, conditional, baseline) -> w, a number or one an image (B, 1, 1, 1); 1 where inactive."""


def check_scale(scale: float) -> None:
    """Raise `UserError` unless the scale is a finite number."""
    number_in("guidance scale", scale, hint="1 is off")
