"""Baselines of guidance, one file each, found by name: the network to move away from.

That is the same network without the condition, or a weaker network with it. A baseline is a frozen
dataclass of settings.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from sfumato.batching import DenoiserLike
from sfumato.types import Conditioning

ALIASES = {"weaker_model": "model"}
"""Name in a line of guidance and in files, of a file with another name; either is read."""

Pair = tuple[DenoiserLike, Conditioning]
"""A denoiser and its conditioning."""


class Baseline(ABC):
    """The prediction to move away from.

    Attributes:
        takes_negative: True if its conditioning is the negative one: of no prompt, or of a negative
            prompt.
    """

    takes_negative: ClassVar[bool] = False

    @abstractmethod
    def pair(
        self,
        denoiser: DenoiserLike,
        conditioning: Conditioning,
        negative: Conditioning,
        guide_model: DenoiserLike | None,
    ) -> Pair:
        """Return the baseline's denoiser and conditioning.

        Args:
            denoiser: The denoiser to guide.
            conditioning: Its conditioning.
            negative: Conditioning of no prompt, or of a negative prompt.
            guide_model: Denoiser of another model, which only `weaker_model` takes.

        Raises:
            UserError: For a denoiser that has no such baseline.
        """
