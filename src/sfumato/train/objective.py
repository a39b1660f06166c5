"""What the loop asks of a thing to be trained: networks, a loss a phase, and what to show while it
trains.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image as PIL
from torch import Tensor, nn


class Draw:
    """The random numbers of a step: drawn for the whole batch, of which a process keeps the rows of
    its own examples.

    Every process draws them all from one seed, so that N processes train with the numbers that one
    process would use.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: slice = slice(None)):
        self.generator, self.total, self.rows = generator, total, rows

    def __call__(self, make: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """`make(n, generator)` returns n rows on the CPU for the n examples of the whole batch;
        ours are returned.
        """
        return make(self.total, self.generator)[self.rows]


class Objective(ABC):
    """A training problem. Phases are run in order within each step, one optimizer each; `main` is
    the network whose average is kept.
    """

    networks: dict[str, nn.Module]
    main: str
    stage: str

    @property
    @abstractmethod
    def size(self) -> int:
        """How many training examples there are."""

    @property
    def groups(self) -> tuple[range, ...]:
        """The numbers 0..size-1 in ranges that share a shape: a batch comes from one of them."""
        return (range(self.size),)

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides the outcome besides the loop's settings, as JSON: networks, weights of
        the loss, a hash of the data.

        A checkpoint keeps it; a run that differs in it is not resumed.
        """

    @abstractmethod
    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Examples of one group by number, on the CPU; random changes to them (mirroring) come from
        `draw`.
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
        """The loss of a phase (scalar, with gradient) and numbers to log: better scalar tensors
        where they are than floats, for which a step would wait. All randomness comes from
        `draw`.
        """

    def active(self, phase: str, step: int) -> bool:
        """Whether a phase takes part in a step."""
        return True

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> tuple[dict[str, float], dict[str, PIL.Image]]:
        """Held-out numbers and pictures from the averaged main network."""
        return {}, {}


def config_of(thing: Any) -> Any:
    """What a network or conditioner is, as JSON: its own config, or else the shapes of its
    weights.
    """
    if hasattr(thing, "to_config"):
        return thing.to_config()
    if isinstance(thing, nn.Module):
        return {name: list(tensor.shape) for name, tensor in thing.state_dict().items()}
    return type(thing).__name__
