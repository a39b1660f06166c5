"""The same network under another condition: none, or a negative prompt (Ho & Salimans 2022,
arXiv:2207.12598).
"""

from dataclasses import dataclass
from typing import Any

from sfumato.types import Conditioning


@dataclass(frozen=True)
class Condition:
    """No options: the caller says which condition."""

    condition = True

    def pair(
        self, denoiser: Any, conditioning: Conditioning, reference: Conditioning, weaker: Any
    ) -> tuple[Any, Conditioning]:
        return denoiser, reference
