"""Rules that combine predictions into one, one file each, found by name.

A rule is a frozen dataclass of settings with

    begin() -> CombineFn        a function for one run
    num_baselines               number of baselines that it takes
    always                      True if the baselines are needed where w is 1 too; otherwise `guide`
                                returns the conditional prediction there
    active_baselines(moment)    number of baselines, from the first, that count at a time; optional:
                                without it, all
    consistent                  True if the pair adds up to x = alpha*x0 + sigma*eps. Otherwise only
                                samplers with the trait `uses_x0_and_eps` can use it

Memory from step to step belongs to the function that `begin` returns. Arithmetic is multiplications
and additions of whole tensors, one at a time, and sums over single images (`algebra.total`), so
that an image's bits do not depend on its batch.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction

CombineFn = Callable[[Tensor, Moment, Sequence[Prediction], float | Tensor], Prediction]
"""(x, moment, predictions, w) -> prediction.

The predictions are the conditional one, then one a baseline; w weights the first baseline.
"""
