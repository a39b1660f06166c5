"""Cooperative batching of denoiser calls.

A run is a coroutine (`DenoiseCalls`) that yields lists of `DenoiserCall` and is sent their
predictions. `gather` interleaves coroutines so that their calls share a forward pass; `drive` runs
one to completion. A function that evaluates the calls is passed to `drive`, so that samplers,
guidance and wrappers never hold a network.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from sfumato.types import Conditioning, Prediction

T = TypeVar("T")

DenoiserLike = Callable[[Tensor, float, Conditioning], Prediction]
"""(x, t, conditioning) -> prediction of B rows: a `Denoiser`, or any other."""


@runtime_checkable
class NetworkDenoiser(Protocol):
    """A denoiser made of a network, as `Denoiser` is."""

    @property
    def network(self) -> nn.Module:
        """(x, timestep, conditioning) -> y."""
        ...


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One denoiser evaluation: x (B, C, h, w) at one time t under B rows of conditioning.

    Calls of the same denoiser with equal shapes may share a forward pass.

    Attributes:
        denoiser: A `Denoiser`, or any other.
        x: The noisy latent.
        t: Its time in (0, 1]; 1 is noise.
        conditioning: B rows, or no rows for an unconditional network.
    """

    denoiser: "DenoiserLike | BatchingDenoiser"
    x: Tensor
    t: float
    conditioning: Conditioning


DenoiseCalls = Generator[list[DenoiserCall], list[Prediction], T]
"""Coroutine that yields calls, is sent their predictions in order, and returns a T."""

DenoiseFn = Callable[[Tensor, float], DenoiseCalls[Prediction]]
"""(x, t) -> prediction, as a coroutine. Guidance and wrappers take one and return one."""


class BatchingDenoiser(ABC):
    """A wrapper's denoiser, which evaluates several calls with work around the forward pass."""

    @property
    @abstractmethod
    def batch_key(self) -> Hashable:
        """Equal for denoisers whose calls are evaluated together."""

    @abstractmethod
    def evaluate_calls(
        self,
        calls: Sequence[DenoiserCall],
        forward: Callable[[list[DenoiserCall]], list[Prediction]],
    ) -> list[Prediction]:
        """Evaluate calls of denoisers with one `batch_key`.

        Args:
            calls: The calls.
            forward: Evaluates calls of one `Denoiser`.
        """


def gather(runs: Sequence[DenoiseCalls[T]]) -> DenoiseCalls[list[T]]:
    """Interleave coroutines: calls pending at the same moment are yielded as one list.

    Args:
        runs: The coroutines, none of them started.

    Returns:
        The result of each coroutine, in order.
    """
    if len(runs) == 1:
        return [(yield from runs[0])]
    results: list[Any] = [None] * len(runs)
    pending: dict[int, list[DenoiserCall]] = {}

    def resume(k: int, predictions: list[Prediction] | None) -> None:
        try:
            pending[k] = next(runs[k]) if predictions is None else runs[k].send(predictions)
        except StopIteration as stop:
            pending.pop(k, None)
            results[k] = stop.value

    try:
        for k in range(len(runs)):
            resume(k, None)
        while pending:
            batch = list(pending.items())
            predictions = yield [call for _, calls in batch for call in calls]
            for k, calls in batch:
                resume(k, predictions[: len(calls)])
                predictions = predictions[len(calls) :]
        return results
    finally:
        for run in runs:
            run.close()


def map_calls(
    run: DenoiseCalls[T], change: Callable[[list[DenoiserCall]], list[DenoiserCall]]
) -> DenoiseCalls[T]:
    """Yield the calls of a coroutine, changed.

    Args:
        run: The coroutine, not started.
        change: Calls -> as many others, in order.
    """
    try:
        calls = next(run)
        while True:
            calls = run.send((yield change(calls)))
    except StopIteration as stop:
        return stop.value
    finally:
        run.close()


def drive(run: DenoiseCalls[T], evaluate: Callable[[list[DenoiserCall]], list[Prediction]]) -> T:
    """Run a coroutine to completion.

    Args:
        run: The coroutine.
        evaluate: Calls -> their predictions, in order.

    Returns:
        The coroutine's result.
    """
    try:
        calls = next(run)
        while True:
            calls = run.send(evaluate(calls))
    except StopIteration as stop:
        return stop.value
    finally:
        run.close()
