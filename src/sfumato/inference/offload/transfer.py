"""Buffers that offloaded weights are copied into, and the copies, on the CPU and on a GPU.

Ring       allocates from a fixed buffer in turn; a new allocation replaces the oldest
Transfer   copies tensors into the buffer, converted to its dtype; on a GPU from pinned memory on
           its own CUDA stream, overlapping with computation
"""

import mmap
from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

LINE = 256
"""Alignment of tensors in bytes, as torch's own on either device."""


def allocate(size: int, device: torch.device) -> Tensor:
    """Return `size` bytes.

    On the CPU they are an anonymous mapping, which is returned to the system as soon as it is
    unreferenced; the C library would keep the memory.
    """
    if device.type == "cpu":
        unix = hasattr(mmap, "MAP_PRIVATE")
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if unix else {}
        return torch.frombuffer(mmap.mmap(-1, max(size, 1), **private), dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8, device=device)


def view_at(buffer: Tensor, at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Return the tensor that begins at a byte of a buffer."""
    return buffer[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def aligned_size(size: int) -> int:
    """Round a size in bytes up to the alignment."""
    return -(-size // LINE) * LINE


class Ring:
    """Allocator of a buffer of `size` bytes that reuses the oldest allocations."""

    def __init__(self, size: int):
        self.size = size
        self._spans: dict[Hashable, tuple[int, int]] = {}  # (begin, end), oldest first

    def find(self, owner: Hashable) -> int | None:
        """Return the offset of an owner's bytes, None if they were replaced."""
        return self._spans[owner][0] if owner in self._spans else None

    def take(self, owner: Hashable, size: int, keep: Hashable = None) -> int | None:
        """Allocate `size` bytes for an owner; owners of overlapping bytes lose theirs.

        Returns:
            The offset, or None if `keep` would lose its bytes.
        """
        assert size <= self.size, "a ring is made for the largest"
        self._spans.pop(owner, None)
        _, end = next(reversed(self._spans.values()), (0, 0))
        begin = end if end + size <= self.size else 0
        lost = [k for k, (low, high) in self._spans.items() if low < begin + size and begin < high]
        if keep in lost:
            return None
        for other in lost:
            del self._spans[other]
        self._spans[owner] = begin, begin + size
        return begin


class Transfer(Protocol):
    """Copies tensors into buffers on a device."""

    ahead: bool
    """True if copies overlap with computation, so that they should begin early."""

    def mark(self) -> Any:
        """Return a marker of the computation queued so far, for `write`."""
        ...

    def write(self, pairs: list[tuple[Tensor, Tensor]], since: Any = None) -> Any:
        """Start copies (target, source) after the computation queued before `since`.

        Args:
            pairs: targets and sources.
            since: a marker of `mark`; None: now.

        Returns:
            The argument of `wait`.
        """
        ...

    def wait(self, copied: Any) -> None:
        """Make the compute stream wait for a copy."""
        ...

    def finish(self) -> None:
        """Wait until no copy is in flight, so that buffers may be freed."""
        ...


class CPUTransfer:
    """Immediate copies.

    Cores that convert cannot compute meanwhile, and pages are prefetched separately.
    """

    ahead = False

    def mark(self) -> None:
        """Do nothing: copies are immediate."""

    def write(self, pairs: list[tuple[Tensor, Tensor]], since: None = None) -> None:
        """Copy."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self, copied: None) -> None:
        """Do nothing: copies are immediate."""

    def finish(self) -> None:
        """Do nothing: copies are immediate."""


class GPUTransfer:
    """Copies through two alternating pinned buffers on a CUDA stream of their own.

    Args:
        device: the GPU.
        largest: bytes of the largest list of tensors that one `write` copies.
    """

    ahead = True

    def __init__(self, device: torch.device, largest: int):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent: list[Any] = [None, None]  # events: the buffer was copied to the device
        self._turn = 0

    def mark(self) -> Any:
        """Record an event on the compute stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def write(self, pairs: list[tuple[Tensor, Tensor]], since: Any = None) -> Any:
        """Convert into a pinned buffer and start an asynchronous copy to the device."""
        index, self._turn = self._turn, 1 - self._turn
        if self._sent[index] is not None:
            self._sent[index].synchronize()  # the buffer's last copy may still be in flight
        at, staged = 0, []
        for target, source in pairs:
            pinned = view_at(self._buffers[index], at, target.dtype, target.shape)
            pinned.copy_(source)
            staged.append((target, pinned))
            at += aligned_size(target.nbytes)
        self.stream.wait_event(self.mark() if since is None else since)
        with torch.cuda.stream(self.stream):
            for target, pinned in staged:
                target.copy_(pinned, non_blocking=True)
            self._sent[index] = self.stream.record_event()
        return self._sent[index]

    def wait(self, copied: Any) -> None:
        """Make the compute stream wait on the device; this thread continues."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def finish(self) -> None:
        """Block this thread until the copies are done."""
        self.stream.synchronize()
