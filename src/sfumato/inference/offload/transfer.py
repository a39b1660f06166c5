"""Where weights are put when their turn comes: room in memory that is used again, and how numbers
get there, on the CPU and on a GPU.

Ring     places in a fixed room, handed out one after the other and round again: a new one takes the
         place of the oldest
Copies   numbers -> room, in the room's dtype; on a GPU from pinned memory on a stream of its own,
         beside what is being computed
"""

import mmap
from collections import deque
from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

LINE = 256
"""Bytes to whose multiples tensors begin: as torch's own do on either device."""


def room(size: int, device: torch.device) -> Tensor:
    """`size` bytes. On the CPU they are the system's again as soon as nobody holds them; the C
    library would keep them.
    """
    if device.type == "cpu":
        private = (
            {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        )
        return torch.frombuffer(mmap.mmap(-1, max(size, 1), **private), dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8, device=device)


def place(room: Tensor, at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The tensor that begins at a byte of a room."""
    return room[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def padded(size: int) -> int:
    """Bytes with what is left free so that the next place begins well."""
    return -(-size // LINE) * LINE


class Ring:
    """Who has which bytes of a room of `size`."""

    def __init__(self, size: int):
        self.size = size
        # (who, begin, end), the oldest first
        self._places: deque[tuple[Hashable, int, int]] = deque()
        self._at: dict[Hashable, int] = {}

    def find(self, who: Hashable) -> int | None:
        """Where somebody's bytes begin, if they are still there."""
        return self._at.get(who)

    def take(self, who: Hashable, size: int, keep: Hashable = None) -> int | None:
        """Where `size` bytes begin that are now somebody's; those that had them lose theirs. None
        if `keep` would lose its own.
        """
        assert size <= self.size, "a ring is made for the largest"
        if who in self._at:
            self._places = deque(p for p in self._places if p[0] != who)
            del self._at[who]
        end = self._places[-1][2] if self._places else 0
        begin = end if end + size <= self.size else 0
        kept = next((p for p in self._places if p[0] == keep), None)
        if kept is not None and begin < kept[2] and kept[1] < begin + size:
            return None
        for lost in [p for p in self._places if p[1] < begin + size and begin < p[2]]:
            self._places.remove(lost)
            del self._at[lost[0]]
        self._places.append((who, begin, begin + size))
        self._at[who] = begin
        return begin


class Copies(Protocol):
    """Numbers -> room."""

    ahead: bool
    """Whether copying goes on beside computing, so that it should begin early."""

    def mark(self) -> Any:
        """A moment for `write`: what has been asked to compute so far."""
        ...

    def write(self, pairs: list[tuple[Tensor, Tensor]], since: Any = None) -> Any:
        """Begins to copy (where to, what), once all that was asked to compute before `since` is
        done; None is now. Returns what `wait` is given.
        """
        ...

    def wait(self, copied: Any) -> None:
        """What is computed from now on finds the numbers there."""
        ...

    def finish(self) -> None:
        """Nothing is on its way any more: rooms may be let go."""
        ...


class OnCPU:
    """Copied at once: cores that convert numbers cannot compute meanwhile, and the disk is asked
    ahead by other means.
    """

    ahead = False

    def mark(self) -> None:
        """Nothing to mark."""

    def write(self, pairs: list[tuple[Tensor, Tensor]], since: None = None) -> None:
        """Copies."""
        for to, what in pairs:
            to.copy_(what)

    def wait(self, copied: None) -> None:
        """Nothing to wait for."""

    def finish(self) -> None:
        """Nothing is on its way."""


class OnGPU:
    """Through two pinned buffers in turns, on a stream of its own. `largest`: bytes of the largest
    list of tensors that is written at once.
    """

    ahead = True

    def __init__(self, device: torch.device, largest: int):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._read: list[Any] = [None, None]  # events: the buffer's numbers have gone to the device
        self._turn = 0

    def mark(self) -> Any:
        """An event on the computing stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def write(self, pairs: list[tuple[Tensor, Tensor]], since: Any = None) -> Any:
        """Converts into a pinned buffer on the CPU, from where the device fetches the numbers by
        itself.
        """
        mine, self._turn = self._turn, 1 - self._turn
        if self._read[mine] is not None:
            self._read[mine].synchronize()  # what was in the buffer before is on its way still
        at, waiting = 0, []
        for to, what in pairs:
            pinned = place(self._buffers[mine], at, to.dtype, to.shape)
            pinned.copy_(what)
            waiting.append((to, pinned))
            at += padded(to.nbytes)
        self.stream.wait_event(self.mark() if since is None else since)
        with torch.cuda.stream(self.stream):
            for to, pinned in waiting:
                to.copy_(pinned, non_blocking=True)
            self._read[mine] = self.stream.record_event()
        return self._read[mine]

    def wait(self, copied: Any) -> None:
        """The computing stream waits on the device; this thread goes on."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def finish(self) -> None:
        """This thread waits for the copies."""
        self.stream.synchronize()
