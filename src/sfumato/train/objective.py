"""Objective: a training problem, with its networks, a loss a phase, and previews."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image as PIL
from torch import Tensor, nn

Preview = tuple[dict[str, float], dict[str, PIL.Image]]
"""Held-out numbers and images, by name."""


class Draw:
    """The random numbers of a step, drawn for the whole batch; a process keeps its own rows.

    Every process draws them all from one seed, so that N processes train with the numbers that one
    process would use.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: slice = slice(None)):
        self.generator, self.total, self.rows = generator, total, rows

    def __call__(self, make: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Return this process's rows of `make(n, generator)`.

        Args:
            make: Returns n rows on the CPU, for the n examples of the whole batch.
        """
        return make(self.total, self.generator)[self.rows]


class Objective(ABC):
    """A training problem.

    Phases are run in order within each step, one optimizer each.

    Attributes:
        networks: The network of each phase.
        main: The phase whose network is averaged.
        stage: Title of the run: "train denoiser".
    """

    networks: dict[str, nn.Module]
    main: str
    stage: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of training examples."""

    @property
    def groups(self) -> tuple[range, ...]:
        """The indices 0..size-1 in ranges that share a shape: a batch comes from one of them."""
        return (range(self.size),)

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON of all that decides the outcome besides the loop's settings.

        It has the networks, the weights of the loss and a hash of the data. A checkpoint keeps it;
        a run that differs in it is not resumed.
        """

    @abstractmethod
    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Examples of one group by index, on the CPU.

        Random changes to them (mirroring) come from `draw`.
        """

    @abstractmethod
    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The loss of a phase (scalar, with gradient), and numbers to log.

        Scalar tensors on the network's device are better than floats, for which a step would wait.

        Args:
            phase: A key of `networks`.
            networks: The networks, in the wrappers of accelerate.
            batch: The result of `batch`, on the device.
            step: From 0.
            draw: The source of all randomness.
        """

    def active(self, phase: str, step: int) -> bool:
        """True where a phase takes part in a step."""
        return True

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> Preview:
        """Held-out numbers and images of the averaged main network."""
        return {}, {}
