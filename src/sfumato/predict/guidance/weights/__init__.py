"""Guidance weights, one file each, found by name. 1 is off: there the references are not asked.

A weight is a frozen dataclass of settings, `scale` first, whose w lies between 1 and that scale,
give or take what its options say; at scale 1 every weight is off. It has two methods:

    active(moment) -> bool                  whether the references are needed at this time at all
    begin() -> (moment, conditional, reference) -> float | Tensor (B, 1, 1, 1)      1 where it is
    not active

`begin` is called once a run: what a weight remembers from step to step belongs to the function that
it returns. A weight that looks at the predictions cannot say that it is off before they are there,
except by time or noise level.
"""

from collections.abc import Callable

from torch import Tensor

from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction
from sfumato.validate import number_in

Weigh = Callable[[Moment, Prediction, Prediction], float | Tensor]
"""What `begin` returns."""


def check_scale(scale: float) -> None:
    """Raise `UserError` unless the scale is a finite number."""
    number_in("guidance scale", scale, hint="1 is off")
