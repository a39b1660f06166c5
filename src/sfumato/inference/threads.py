"""The number of threads of a network's calls, adapted to what the machine has to spare.

Threads wait for one another after every layer. Beside a busy process one of them may lose its
processor for milliseconds, at each of thousands of layers: two threads then take twenty times as
long as one. Small layers gain little from threads in any case.

A network call whose threads together used less than `_USED` of the processors' time has waited. The
same call is then made once more with half as many threads. If that is faster, the rest of the run
uses that many; after some calls more threads are tried again.

The number of threads never shows in an image. Each change is made only where both calls agree bit
for bit, and all other layers have the same bits with any number of threads: that holds in float32
on the CPU (kernels/batch_invariant.py). Other networks keep their threads.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Thread

import torch
from torch import Tensor

_USED = 0.75  # share of the threads' processor time below which fewer threads are tried
_GAIN = 0.9  # share of the time that another number of threads must take to be used
_LONG = 2.0  # seconds of a call from which threads stay: its layers are longer than the waiting
_FIRST, _LAST = 8, 1024  # calls until the next trial, doubled by each trial that changed nothing
_WAITED = 16  # most calls until the next trial of fewer threads: one trial may have bad luck
_MOST: ContextVar[int | None] = ContextVar("threads that torch had when a run began", default=None)


@contextmanager
def adapted_threads() -> Iterator[None]:
    """Let `ThreadChoice` set the number of threads until the end of the `with` block.

    The number that torch had at its beginning is the largest, and is restored at its end.
    """
    if _MOST.get() is not None:
        yield  # the outer block restores the number
        return
    most = torch.get_num_threads()
    token = _MOST.set(most)
    try:
        yield
    finally:
        _MOST.reset(token)
        torch.set_num_threads(most)


@dataclass
class _Kind:
    """Calls of one kind: their number of threads and the calls until the next trial."""

    threads: int
    left: int = 1  # the first call warms up
    wait: int = _FIRST
    differ: set[frozenset[int]] = field(default_factory=set)


class ThreadChoice:
    """Calls of functions on the CPU with an adapted number of threads.

    Nothing is adapted outside `adapted_threads`, nor with one thread.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[Hashable, int], _Kind] = {}

    def __call__(self, kind: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return compute().

        Args:
            kind: Calls of one kind take about as long: the shape of the input.
            compute: Float32 computation on the CPU without gradient or side effect.
        """
        most = _MOST.get()
        if most is None or most == 1:
            return compute()
        state = self._kinds.setdefault((kind, most), _Kind(most))
        if torch.get_num_threads() != state.threads:
            _set_here(state.threads, most)
        y, seconds, used = _timed(compute)
        waited = used < _USED * state.threads * seconds
        if state.left > 0:
            state.left -= 1
        elif seconds < _LONG and waited and state.threads > 1:
            self._try(state, state.threads // 2, most, compute, y, seconds)
        elif seconds < _LONG and state.threads < most:
            self._try(state, min(most, 2 * state.threads), most, compute, y, seconds)
        return y

    def _try(
        self,
        state: _Kind,
        threads: int,
        most: int,
        compute: Callable[[], Tensor],
        y: Tensor,
        seconds: float,
    ) -> None:
        """Make the call with another number of threads, and keep that number if it is faster."""
        pair = frozenset((threads, state.threads))
        faster = False
        if pair not in state.differ:
            _set_here(threads, most)
            again, other_seconds, _ = _timed(compute)
            faster = other_seconds < _GAIN * seconds
            if not torch.equal(again, y):
                state.differ.add(pair)
                faster = False
        if faster:
            state.threads, state.wait = threads, _FIRST
        else:
            fewer = threads < state.threads and pair not in state.differ
            state.wait = min(_WAITED if fewer else _LAST, 2 * state.wait)
            _set_here(state.threads, most)
        # fewer threads may be better still; more are worth a trial later
        state.left = 0 if faster and threads > 1 else state.wait


def _set_here(threads: int, most: int) -> None:
    """Set the number of threads of this Python thread alone.

    torch sets that of this one, and of those that begin later: `most` is set again for them, by one
    that ends at once.
    """
    torch.set_num_threads(threads)
    if threads < most:
        reset = Thread(target=torch.set_num_threads, args=(most,))
        reset.start()
        reset.join()


def _timed(compute: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """Return the result, the seconds, and the seconds of processor time of all threads."""
    start, used = time.perf_counter(), time.process_time()
    y = compute()
    return y, time.perf_counter() - start, time.process_time() - used
