"""Ways to combine predictions, one file each, found by name.

A combine is a frozen dataclass of settings with

    begin() -> (x, moment, predictions, w) -> Prediction      predictions: the conditional one, then
    one a reference; w weighs the first
    references  how many it takes
    always      whether the references are needed where w is 1 too; where not, `guide` returns the
                conditional prediction for w = 1
    needed(moment)  how many of them, from the first, count at a time; without it, all do
    consistent  whether the pair adds up to x = alpha*x0 + sigma*eps. If not, only samplers whose
                traits say `both` can use it

`begin` is called once a run: what a combine remembers from step to step belongs to the function
that it returns. Arithmetic is multiplications and additions of whole tensors, one at a time, and
sums over single images (`algebra.total`), so that an image's bits do not depend on its batch.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from sfumato.predict.guidance.guide import Moment
from sfumato.types import Prediction

Join = Callable[[Tensor, Moment, Sequence[Prediction], float | Tensor], Prediction]
"""What `begin` returns."""
