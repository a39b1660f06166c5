"""What the loop asks of a thing to be trained: networks, a loss a phase, and what to show while it trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from PIL import Image as PIL
from torch import Tensor, nn


class Objective(ABC):
    """A training problem. Phases are run in order within each step, one optimizer each; `main` is the network whose average is kept."""

    networks: dict[str, nn.Module]
    main: str
    stage: str

    @property
    @abstractmethod
    def size(self) -> int:
        """How many training examples there are."""

    @abstractmethod
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Examples by number, on the CPU."""

    @abstractmethod
    def loss(
        self, phase: str, networks: Mapping[str, nn.Module], batch: dict[str, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a phase (scalar, with gradient) and numbers to log. All randomness comes from `generator` (CPU)."""

    def active(self, phase: str, step: int) -> bool:
        """Whether a phase takes part in a step."""
        return True

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> tuple[dict[str, float], dict[str, PIL.Image]]:
        """Held-out numbers and pictures from the averaged main network."""
        return {}, {}
