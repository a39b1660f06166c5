"""The same network under another condition: none, or a negative prompt.

(Ho & Salimans 2022, arXiv:2207.12598.)
"""

from dataclasses import dataclass
from typing import Any

from sfumato.types import Conditioning


@dataclass(frozen=True)
class Condition:
    """The denoiser under the negative conditioning; no options."""

    takes_negative = True

    def pair(
        self, denoiser: Any, conditioning: Conditioning, negative: Conditioning, guide_model: Any
    ) -> tuple[Any, Conditioning]:
        """Return the denoiser with the negative conditioning."""
        return denoiser, negative
