"""The guided denoiser: call the denoiser, call the baselines where they count, combine."""

import math
from collections.abc import Callable, Sequence

from jaxtyping import Bool
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, DenoiserLike
from sfumato.errors import UserError
from sfumato.predict.guidance.moment import Moment
from sfumato.predict.guidance.rules import Rule
from sfumato.predict.guidance.weights import Weight
from sfumato.prediction import Selected
from sfumato.types import Conditioning, Prediction


def guide(
    denoiser: DenoiserLike,
    conditioning: Conditioning,
    baselines: Sequence[tuple[DenoiserLike, Conditioning]],
    weight: Weight,
    rule: Rule,
    point: Callable[[float], tuple[float, float]],
    unguided: Bool[Tensor, " B"] | None = None,
) -> DenoiseFn:
    """Return the guided denoiser of one run.

    All denoisers are called at once, so that they share a forward pass. Where the weight is 1 the
    conditional one is called alone, unless the rule needs the baselines `always`. The variance, of
    networks that predict one, is the conditional prediction's (as in DiT's code, Peebles & Xie
    2023, arXiv:2212.09748).

    Args:
        denoiser: The denoiser to guide.
        conditioning: Its conditioning.
        baselines: (denoiser, conditioning) to move away from: the same denoiser without the
            condition, or a weaker one with it; as many as the rule takes, or none for no guidance.
        weight: Settings from `weights`.
        rule: Settings from `rules`.
        point: The schedule's t -> (alpha, sigma).
        unguided: Images without a baseline, such as draws without a condition. Each is as it is
            alone, to the last bit.

    Raises:
        UserError: For another number of baselines than the rule takes.
    """
    if baselines and len(baselines) != rule.num_baselines:
        raise UserError(f"{len(baselines)} baselines for {rule}: it takes {rule.num_baselines}")
    weight_at, combine = weight.begin(), rule.begin()
    index, visited = -1, math.nan

    def guided_denoise(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        nonlocal index, visited
        if t != visited:  # a sampler may call twice at one time
            index, visited = index + 1, t
        moment = Moment(t, *point(t), index)
        conditional = DenoiserCall(denoiser, x, t, conditioning)
        count = rule.active_baselines(moment)
        always = rule.always and count == rule.num_baselines
        if not baselines or not (always or weight.active(moment)):
            return (yield [conditional])[0]
        predictions = yield [
            conditional,
            *(DenoiserCall(baseline, x, t, cond) for baseline, cond in baselines[:count]),
        ]
        w = weight_at(moment, predictions[0], predictions[1])
        guided = combine(x, moment, predictions, w)
        if not always:
            guided = _conditional_where_off(predictions[0], guided, w)
        if unguided is not None:
            guided = Selected(unguided.reshape(-1, 1, 1, 1), predictions[0], guided)
        return guided.with_variance(predictions[0].variance)

    return guided_denoise


def _conditional_where_off(
    conditional: Prediction, guided: Prediction, w: float | Tensor
) -> Prediction:
    """Return the conditional prediction itself, to the last bit, for images whose w is 1."""
    if not isinstance(w, Tensor):
        return conditional if w == 1 else guided
    return Selected(w == 1, conditional, guided)
