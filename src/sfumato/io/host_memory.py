"""Resident memory of this process, and pages of memory-mapped files.

A tensor of a memory-mapped file takes memory only where it was read. `drop_pages` (madvise's
MADV_DONTNEED) returns its pages to the system; the next access reads the same values from the page
cache or the disk. `prefetch_pages` (MADV_WILLNEED) makes the disk read ahead into the page cache.
Both need Linux (madvise(2), proc(5)), see `can_drop_pages`.
"""

import ctypes
import mmap
import os
import re
import sys
from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Folder of the control group's limits (cgroups(7))."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*")


def parse_size(size: int | str, name: str = "memory") -> int:
    """Parse a size in bytes: an integer, or a text such as "3GB" (10^9), "1.5GiB" or "800 MB".

    Args:
        size: at least 1 byte.
        name: of the setting, for the message.

    Raises:
        UserError: anything else, sizes below 1 byte, and a text without a unit, which people mean
            in gigabytes and programs in bytes.
    """
    if isinstance(size, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", size):
        raise UserError(
            f"{name} {size!r} has no unit: expected one, as in {size.strip()}GB or 800MB"
        )
    match = _SIZE.fullmatch(size.upper()) if isinstance(size, str) else None
    if match is not None and match[2] in _UNITS:
        count = int(float(match[1]) * _UNITS[match[2]])
    else:
        count = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if count < 1:
        raise UserError(
            f"{name} {size!r}: expected a number of bytes, or a text such as '3GB' or '800MB'"
        )
    return count


def resident_bytes(peak: bool = False) -> int | None:
    """Return the resident bytes of this process, or their peak; None where unavailable.

    Pages of mapped files count too.
    """
    if sys.platform == "linux":
        name = "VmHWM:" if peak else "VmRSS:"
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next((line for line in lines if line.startswith(name)), None)
        return None if line is None else int(line.split()[1]) * 1024
    if sys.platform == "darwin" and peak:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def trim() -> None:
    """Return free memory of the C library's heap to the system, where it can (glibc)."""
    call = _malloc_trim()
    if call is not None:
        call(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def return_large_blocks() -> None:
    """Let the C library (glibc) return blocks from 1 MiB on to the system when freed.

    Else blocks up to 32 MiB stay in its heap between others that are in use: hundreds of megabytes
    in a run of Stable Diffusion. It holds for the whole process, until its end.
    """
    try:
        call = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    call(_MMAP_THRESHOLD, 2**20)


_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of mallopt(3), which glibc raises by itself where it is not set."""


def available_bytes() -> int | None:
    """Return the bytes that can be allocated without swapping; None where unavailable.

    This is MemAvailable, limited by the control group.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limits += [total - used for total, used in _group_bytes()]
    return max(min(limits), 0) if limits else None


def total_bytes() -> int | None:
    """Return the bytes of this machine's memory; None where unavailable.

    This is the physical memory, limited by the control group.
    """
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    return min([physical, *(total for total, _ in _group_bytes())])


def _group_bytes() -> list[tuple[int, int]]:
    """The limit of the control group, version 2 or 1, and the bytes that it uses."""
    groups = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            total, taken = (int((CONTROL_GROUP / file).read_text()) for file in (limit, used))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        groups.append((total, taken))
    return groups


# ---- pages of files ------------------------------------------------------------------------------


@cache
def _madvise() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return call


def can_drop_pages() -> bool:
    """Return True where pages of mapped files can be dropped."""
    return sys.platform == "linux" and _madvise() is not None


class MappedRanges:
    """Address ranges of this process that map files, taken when the object is made."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if can_drop_pages():
            for line in Path("/proc/self/maps").read_text().splitlines():
                addresses, _, _, _, inode, *rest = line.split(maxsplit=5)
                path = rest[0] if rest else ""
                if inode != "0" and path.startswith("/") and not path.startswith("/dev/"):
                    begin, end = addresses.split("-")
                    self._ranges.append((int(begin, 16), int(end, 16)))

    def __contains__(self, tensor: "torch.Tensor") -> bool:
        """Return True for a contiguous tensor in a mapped file, so that dropping loses nothing."""
        if not tensor.is_cpu or not tensor.is_contiguous() or not tensor.nbytes:
            return False
        begin = tensor.data_ptr()
        at = bisect_right(self._ranges, (begin, sys.maxsize)) - 1
        return at >= 0 and begin + tensor.nbytes <= self._ranges[at][1]


def drop_pages(tensor: "torch.Tensor") -> None:
    """Drop the pages of a tensor in `MappedRanges`. Values of other tensors would be lost."""
    _advise(tensor, mmap.MADV_DONTNEED)


def prefetch_pages(tensor: "torch.Tensor") -> None:
    """Prefetch the pages of a tensor in `MappedRanges` from the disk."""
    _advise(tensor, mmap.MADV_WILLNEED)


def _advise(tensor: "torch.Tensor", advice: int) -> None:
    call, begin, page = _madvise(), tensor.data_ptr(), mmap.PAGESIZE
    assert call is not None, "see can_drop_pages"
    end = begin + tensor.nbytes
    begin -= begin % page
    # Whole pages, including those shared with neighbours in the file, which are read again too.
    if call(begin, -(-(end - begin) // page) * page, advice) != 0 and advice == mmap.MADV_DONTNEED:
        raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")
