"""Guidance as questions: ask the denoiser, ask the references where they count, combine the answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.types import Ask, Asking, Conditioning, Prediction, Query


@dataclass(frozen=True)
class Moment:
    """A time of a run and what is there: x = alpha*z + sigma*eps."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """log(alpha^2/sigma^2); -inf without signal."""
        return -math.inf if self.alpha == 0 else 2 * (math.log(self.alpha) - math.log(self.sigma))


def guide(
    denoiser: Any,
    conditioning: Conditioning,
    references: Sequence[tuple[Any, Conditioning]],
    weight: Any,
    combine: Any,
    point: Callable[[float], tuple[float, float]],
) -> Ask:
    """The guided denoiser of one run, as questions to answer.

    references: (denoiser, conditioning) pairs to move away from: the same denoiser without the condition, or a weaker one with it.
    weight, combine: settings from `weights` and `combines`. point: t -> (alpha, sigma).
    All questions of a time are put at once; where the weight is 1 only the conditional one.
    """
    weigh, join = weight.begin(), combine.begin()

    def ask(x: Tensor, t: float) -> Asking[Prediction]:
        moment = Moment(t, *point(t))
        first = Query(denoiser, x, t, conditioning)
        if not references or not (combine.always or weight.active(moment)):
            return (yield [first])[0]
        predictions = yield [first, *(Query(who, x, t, given) for who, given in references)]
        w = weigh(moment, predictions[0], predictions[1])
        return join(x, moment, predictions, w)

    return ask
