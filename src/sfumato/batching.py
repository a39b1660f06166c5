"""Cooperative batching of denoiser calls.

A run is a coroutine (`DenoiseCalls`) that yields lists of `DenoiserCall` and is sent their
predictions. `gather` interleaves coroutines so that their calls share a forward pass; `drive` runs
one to completion. A function that evaluates the calls is passed to `drive`, so that samplers,
guidance and wrappers never hold a network.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from sfumato.types import Conditioning, Prediction

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One denoiser evaluation: x (B, C, h, w) at one time t under B rows of conditioning.

    Calls of the same denoiser with equal shapes may share a forward pass.

    Attributes:
        denoiser: a `Denoiser`, or any callable (x, t, conditioning) -> `Prediction` of B rows
        x: the noisy latent
        t: its time in (0, 1], 1 is noise
        conditioning: B rows, or no rows for an unconditional network
    """

    denoiser: Any
    x: Tensor
    t: float
    conditioning: Conditioning


DenoiseCalls = Generator[list[DenoiserCall], list[Prediction], T]
"""Coroutine that yields denoiser calls, is sent their predictions in order, and returns a T."""

DenoiseFn = Callable[[Tensor, float], DenoiseCalls[Prediction]]
"""(x, t) -> prediction, as a coroutine. Guidance and wrappers take one and return one."""


def gather(runs: Sequence[DenoiseCalls[T]]) -> DenoiseCalls[list[T]]:
    """Interleave coroutines: calls pending at the same moment are yielded as one list.

    Args:
        runs: the coroutines, none of them started

    Returns:
        what each coroutine returned, in order
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


def drive(run: DenoiseCalls[T], evaluate: Callable[[list[DenoiserCall]], list[Prediction]]) -> T:
    """Run a coroutine to completion.

    Args:
        run: the coroutine
        evaluate: calls -> their predictions, in order

    Returns:
        what the coroutine returned
    """
    try:
        calls = next(run)
        while True:
            calls = run.send(evaluate(calls))
    except StopIteration as stop:
        return stop.value
    finally:
        run.close()
