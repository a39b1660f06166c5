"""The same network under another condition: none, or a negative prompt.

(Ho & Salimans 2022, arXiv:2207.12598.)
"""

from dataclasses import dataclass

from sfumato.batching import DenoiserLike
from sfumato.predict.guidance_models import Baseline, Pair
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Condition(Baseline):
    """The denoiser under the negative conditioning; no options."""

    takes_negative = True

    def pair(
        self,
        denoiser: DenoiserLike,
        conditioning: Conditioning,
        negative: Conditioning,
        guide_model: DenoiserLike | None,
    ) -> Pair:
        """Return the denoiser with the negative conditioning."""
        return denoiser, negative
