"""Guidance as questions: ask the denoiser, ask the references where they count, combine the
answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall
from sfumato.errors import UserError
from sfumato.prediction import Selected
from sfumato.types import Conditioning, Prediction


@dataclass(frozen=True)
class Moment:
    """A time of a run and what is there: x = alpha*z + sigma*eps. `index` counts the times that the
    run has visited before it.
    """

    t: float
    alpha: float
    sigma: float
    index: int = 0

    @property
    def log_snr(self) -> float:
        """log(alpha^2/sigma^2); -inf without signal, inf without noise."""
        if self.alpha == 0 or self.sigma == 0:
            return -math.inf if self.alpha == 0 else math.inf
        return 2 * (math.log(self.alpha) - math.log(self.sigma))


def guide(
    denoiser: Any,
    conditioning: Conditioning,
    references: Sequence[tuple[Any, Conditioning]],
    weight: Any,
    combine: Any,
    point: Callable[[float], tuple[float, float]],
    unguided: Bool[Tensor, " B"] | None = None,
) -> DenoiseFn:
    """The guided denoiser of one run, as questions to answer.

    references: (denoiser, conditioning) pairs to move away from: the same denoiser without the
    condition, or a weaker one with it; as many as the combine takes (`UserError` otherwise), or
    none: then nothing is guided. weight, combine: settings from `weights` and `combines`. point: t
    -> (alpha, sigma). unguided: the images that have nothing to move away from, as a draw without a
    condition: each is as it is alone, to the last bit. The variance, of networks that predict one,
    is the conditional prediction's (as DiT's code has it, Peebles & Xie 2023, arXiv:2212.09748).
    All questions of a time are put at once; where the weight is 1 only the conditional one, unless
    the combine needs them `always`.
    """
    if references and len(references) != combine.references:
        raise UserError(
            f"{len(references)} references for {combine}: it takes {combine.references}"
        )
    weigh, join = weight.begin(), combine.begin()
    needed = getattr(combine, "needed", lambda moment: combine.references)
    index, visited = -1, math.nan

    def ask(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        nonlocal index, visited
        if t != visited:  # a sampler that asks twice at one time is still at that time
            index, visited = index + 1, t
        moment = Moment(t, *point(t), index)
        first = DenoiserCall(denoiser, x, t, conditioning)
        count = needed(moment)
        always = combine.always and count == combine.references
        if not references or not (always or weight.active(moment)):
            return (yield [first])[0]
        predictions = yield [
            first,
            *(DenoiserCall(who, x, t, given) for who, given in references[:count]),
        ]
        w = weigh(moment, predictions[0], predictions[1])
        found = join(x, moment, predictions, w)
        if not always:
            found = _off_is_off(predictions[0], found, w)
        found = (
            found
            if unguided is None
            else Selected(unguided.reshape(-1, 1, 1, 1), predictions[0], found)
        )
        return found.with_variance(predictions[0].variance)

    return ask


def _off_is_off(conditional: Prediction, found: Prediction, w: float | Tensor) -> Prediction:
    """The conditional prediction itself, to the last bit, for the images whose w is 1: as if nobody
    had asked the references.
    """
    if not isinstance(w, Tensor):
        return conditional if w == 1 else found
    return Selected(w == 1, conditional, found)
