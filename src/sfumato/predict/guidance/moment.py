"""The time of a prediction, with the weights of its process."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A time of a run: x = alpha*z + sigma*eps.

    Attributes:
        t: Time in (0, 1].
        alpha: Weight of the clean latent.
        sigma: Weight of the noise.
        index: Number of times that the run has visited before.
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
