"""Memory by the page, as the system counts it: what a process holds, and how it gives back what it
can read again from a file.

A tensor of a memory-mapped file takes memory of the process only where it was read. `drop`
(madvise's MADV_DONTNEED) gives its pages back; who reads the tensor again finds the same numbers,
from the system's cache of files or from the disk. `ask` (MADV_WILLNEED) has the disk read ahead
into that cache. Both are Linux's (madvise(2), proc(5)); `can_drop` says whether they are there.
"""

import ctypes
import mmap
import os
import re
import sys
from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import UserError

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*")


def read_size(size: int | str) -> int:
    """Bytes of a size: a whole number, or a text such as "3GB" (10^9), "1.5GiB" (2^30), "800 MB".
    `UserError` for anything else, and for 0.
    """
    found = _SIZE.fullmatch(size.upper()) if isinstance(size, str) else None
    if found is not None and found[2] in _UNITS:
        count = int(float(found[1]) * _UNITS[found[2]])
    else:
        count = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if count < 1:
        raise UserError(
            f"memory {size!r}: expected a number of bytes, or a text such as '3GB' or '800MB'"
        )
    return count


def held(peak: bool = False) -> int | None:
    """Bytes of memory that this process holds, pages of files among them; or the most that it has
    held so far. None where that is not told.
    """
    if sys.platform == "linux":
        name = "VmHWM:" if peak else "VmRSS:"
        line = next(
            (
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(name)
            ),
            None,
        )
        return None if line is None else int(line.split()[1]) * 1024
    if sys.platform == "darwin" and peak:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def free() -> int | None:
    """Bytes that programs can still have without swapping (MemAvailable), no more than a control
    group leaves; None where that is not told.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next(
        (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")),
        None,
    )
    known = [] if line is None else [int(line.split()[1]) * 1024]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            known.append(
                int(Path("/sys/fs/cgroup", limit).read_text())
                - int(Path("/sys/fs/cgroup", used).read_text())
            )
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(min(known), 0) if known else None


# ---- pages of files ------------------------------------------------------------------------------


@cache
def _madvise() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return call


def can_drop() -> bool:
    """Whether pages of files can be given back here."""
    return sys.platform == "linux" and _madvise() is not None


class Mapped:
    """Which memory of this process is that of files, at the moment when this object is made."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if can_drop():
            for line in Path("/proc/self/maps").read_text().splitlines():
                addresses, _, _, _, inode, *path = line.split(maxsplit=5)
                if (
                    inode != "0"
                    and path
                    and path[0].startswith("/")
                    and not path[0].startswith("/dev/")
                ):
                    begin, end = addresses.split("-")
                    self._ranges.append((int(begin, 16), int(end, 16)))

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether all of a tensor's numbers lie in a file, one after the other, so that dropping
        them loses nothing.
        """
        if not tensor.is_cpu or not tensor.is_contiguous() or not tensor.nbytes:
            return False
        begin = tensor.data_ptr()
        at = bisect_right(self._ranges, (begin, sys.maxsize)) - 1
        return at >= 0 and begin + tensor.nbytes <= self._ranges[at][1]


def drop(tensor: Tensor) -> None:
    """Gives the pages of a tensor back that is `Mapped`. Never for others: their numbers would be
    lost.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def ask(tensor: Tensor) -> None:
    """Has the pages of a `Mapped` tensor read from the disk ahead of time."""
    _advise(tensor, mmap.MADV_WILLNEED)


def _advise(tensor: Tensor, advice: int) -> None:
    call, begin, page = _madvise(), tensor.data_ptr(), mmap.PAGESIZE
    assert call is not None, "see can_drop"
    end = begin + tensor.nbytes
    begin -= begin % page
    # Whole pages, also those that it shares with its neighbours in the file: they too are read
    # again when they are wanted.
    if call(begin, -(-(end - begin) // page) * page, advice) != 0 and advice == mmap.MADV_DONTNEED:
        raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")
