"""A weight by the pull of the condition, image by image, and by the noise level.

    w = 1 + (scale - 1) g(log-SNR) f(d),  d = ||eps_c - eps_base|| / ||eps_base||
    g = 1 for low <= log-SNR <= high, else 0
    f = 1/(1 + (d/threshold)^power) where disagreement lowers w, and 1 minus that where it raises w

d is the condition's pull against that of the data itself. eps is -sigma times a score (Song et al.
2021, arXiv:2011.13456), so d = ||grad log p(c|x)|| / ||grad log p(x)||, a number without units. f
is monotone in d, lies in [0, 1] and is 1/2 at the threshold, so w lies between 1 and scale.

With power 1, where disagreement lowers w, the change of eps_c, (w - 1)||eps_c - eps_base||, stays
below (scale - 1) threshold ||eps_base|| for any disagreement. Where disagreement raises w, the
parts that the condition has settled are left alone (the observation of Castillo et al. 2023,
arXiv:2312.12487; Koulischer et al. 2025, arXiv:2506.06085, also let w follow the predictions).

The default threshold is the middle of d for the bundled model: d from 0.009 to 0.12, t from 0.95 to
0.05 (DDIM, 20 steps, scales 1 and 2, two images a class, seeds 0 to 19); 0 at t = 1, where eps is x
for any condition. Only outside of [low, high] is the second pass saved: inside, d needs it.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.guidance.algebra import ratio, total
from sfumato.predict.guidance.weights import Moment, Prediction, Weight, WeightFn
from sfumato.validate import number_in, one_of

DISAGREEMENT = ("lowers", "raises")


@dataclass(frozen=True)
class Adaptive(Weight):
    """w by the disagreement d of the conditional prediction and the baseline.

    Args:
        scale: 1 is off.
        disagreement: "lowers" w or "raises" it.
        threshold: The d at which half of the scale acts, above 0.
        power: Steepness of f, above 0.
        low: Least log-SNR, log(alpha^2/sigma^2), at which the weight acts; negative where there is
            more noise than signal.
        high: Largest log-SNR at which it acts.
    """

    disagreement: str = "lowers"
    threshold: float = 0.05
    power: float = 1.0
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("effect of disagreement on the guidance", self.disagreement, DISAGREEMENT)
        number_in("guidance adaptive threshold", self.threshold, above=0)
        number_in("guidance adaptive power", self.power, above=0)
        if not self.low <= self.high:
            raise UserError(
                f"guidance adaptive low={self.low}, high={self.high}: "
                "expected log-SNRs with low <= high"
            )

    def active(self, moment: Moment) -> bool:
        """Return True where the log-SNR lies between `low` and `high`."""
        return self.scale != 1 and self.low <= moment.log_snr <= self.high

    def begin(self) -> WeightFn:
        """Return w by the disagreement of the predictions; there is no memory."""

        def weigh(moment: Moment, conditional: Prediction, baseline: Prediction) -> float | Tensor:
            if not self.active(moment):
                return 1.0
            pull = total((conditional.eps - baseline.eps).square()).sqrt()
            d = ratio(pull, self.threshold * total(baseline.eps.square()).sqrt(), math.inf)
            lower = 1 / (1 + d**self.power)
            return 1 + (self.scale - 1) * (lower if self.disagreement == "lowers" else 1 - lower)

        return weigh
