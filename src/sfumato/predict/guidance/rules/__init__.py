"""Rules that combine predictions into one, one file each, found by name.

A rule is a frozen dataclass of settings. Memory from step to step belongs to the function that
`begin` returns. Arithmetic is multiplications and additions of whole tensors, one at a time, and
sums over single images (`algebra.total`), so that an image's bits do not depend on its batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from sfumato.predict.guidance.moment import Moment
from sfumato.types import Prediction

Predictions = Sequence[Prediction]
"""The conditional prediction, then one a baseline."""
Scale = float | Tensor
"""The weight of the first baseline: a number, or one an image (B, 1, 1, 1)."""
CombineFn = Callable[[Tensor, Moment, Predictions, Scale], Prediction]
"""(x, moment, predictions, w) -> prediction."""


class Rule(ABC):
    """A way to combine the conditional prediction and those of the baselines.

    Attributes:
        num_baselines: Number of baselines.
        consistent: True if the pair adds up to x = alpha*x0 + sigma*eps. Otherwise only samplers
            with the trait `uses_x0_and_eps` can use it.
        scale_is_share: True if the scale is the condition's share of a prediction, so that scales
            below 1 act. Otherwise `Guidance` takes them for off.
    """

    num_baselines: ClassVar[int] = 1
    consistent: ClassVar[bool] = True
    scale_is_share: ClassVar[bool] = False

    @property
    def always(self) -> bool:
        """True if the baselines are needed where w is 1 too.

        Otherwise `guide` returns the conditional prediction there.
        """
        return False

    @property
    def stateful(self) -> bool:
        """True if a prediction depends on those of earlier times."""
        return False

    def active_baselines(self, moment: Moment) -> int:
        """Return the number of baselines, from the first, that count at a time."""
        return self.num_baselines

    @abstractmethod
    def begin(self) -> CombineFn:
        """Return the function that combines the predictions of one run."""
