"""The number of threads of a network's calls, adapted to what the machine has to spare.

Threads wait for one another after every layer. Beside a busy process one of them may lose its
processor for milliseconds, at each of thousands of layers: two threads then take twenty times as
long as one. Small layers gain little from threads in any case.

The first call of a process takes as many threads as add to the speed of a small computation at that
moment, timed for some milliseconds. Without it the first image would wait.

A network call has waited if its threads together used less than `_USED` of the processors' time, or
were interrupted more than `_INTERRUPTED` times a second. The same call is then made once more with
half as many threads. If that is faster, the rest of the run uses that many; after some calls more
threads are tried again, if they help the small computation.

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

try:
    import resource
except ImportError:  # no Unix
    resource = None

_USED = 0.75  # share of the threads' processor time below which fewer threads are tried
_INTERRUPTED = 150.0  # interruptions a second from which fewer threads are tried
_GAIN = 0.9  # share of the time that another number of threads must take to be used
_LONG = 2.0  # seconds of a call from which threads stay: its layers are longer than the waiting
_FIRST, _LAST = 8, 1024  # calls until the next trial, doubled by each trial that changed nothing
_WAITED = 16  # most calls until the next trial of fewer threads: one trial may have bad luck
_WARM = 0.1  # seconds of a call below which a number of threads is warmed up before its trial
_PROBE = 0.005  # seconds of one measurement of the small computation
_PART = 2**15  # its elements per thread: the least that torch gives to a thread
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
    """Calls of one kind: their number of threads, and when it is tried again."""

    threads: int
    left: int  # calls until the next trial
    wait: int = _FIRST
    warm: set[int] = field(default_factory=set)  # numbers of threads that have made calls
    differ: set[frozenset[int]] = field(default_factory=set)


class ThreadChoice:
    """Calls of functions on the CPU with an adapted number of threads.

    Nothing is adapted outside `adapted_threads`, nor with one thread.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[Hashable, int], _Kind] = {}
        self._latest: dict[int, int] = {}  # largest number of threads -> that of the latest call

    def __call__(self, kind: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return compute().

        Args:
            kind: Calls of one kind take about as long: the shape of the input.
            compute: Float32 computation on the CPU without gradient or side effect.
        """
        most = _MOST.get()
        if most is None or most == 1:
            return compute()
        if most not in self._latest:
            self._latest[most] = _useful_threads(most, most)
        state = self._kinds.get((kind, most))
        if state is None:
            threads = self._latest[most]
            # the first call warms up; a machine that was busy a moment ago is tried later
            left = 1 if threads == most else _FIRST
            state = self._kinds[kind, most] = _Kind(threads, left)
        if torch.get_num_threads() != state.threads:
            _set_here(state.threads, most)
        y, seconds, waited = _timed(compute)
        state.warm.add(state.threads)
        if seconds >= _LONG:
            state.threads = most
        elif state.left > 0:
            state.left -= 1
        elif waited and state.threads > 1:
            self._try(state, state.threads // 2, most, compute, y, seconds)
        elif state.threads < most:
            more = min(most, 2 * state.threads)
            if _useful_threads(more, most) == more:
                self._try(state, more, most, compute, y, seconds)
            else:
                state.left = state.wait = min(_LAST, 2 * state.wait)
        self._latest[most] = state.threads
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
            if seconds < _WARM and threads not in state.warm:
                compute()
                state.warm.add(threads)
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


def _useful_threads(threads: int, most: int) -> int:
    """Return the largest of threads, threads / 2, ..., 1 that beats one thread at this moment."""
    before = torch.get_num_threads()
    one = _rate(1, most)
    # two tries: the system may begin two threads on one processor, and part them later
    while threads > 1 and not any(_rate(threads, most) > one for _ in range(2)):
        threads //= 2
    _set_here(before, most)
    return threads


def _rate(threads: int, most: int) -> float:
    """Return how many small computations a second that many threads make."""
    _set_here(threads, most)
    x = torch.zeros(_PART * most)
    y = torch.sin(x)  # starts the threads
    count, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < _PROBE:
        torch.sin(x, out=y)
        count += 1
    return count / seconds


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


def _timed(compute: Callable[[], Tensor]) -> tuple[Tensor, float, bool]:
    """Return the result, the seconds, and whether the threads have waited."""
    start, used, interrupted = time.perf_counter(), time.process_time(), _interruptions()
    y = compute()
    seconds = time.perf_counter() - start
    waited = (
        time.process_time() - used < _USED * torch.get_num_threads() * seconds
        or _interruptions() - interrupted > max(1.0, _INTERRUPTED * seconds)
    )
    return y, seconds, waited


def _interruptions() -> int:
    """Return how often threads of this process lost a processor that they could use."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
