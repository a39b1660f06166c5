"""The number of threads that MKL counts on inside torch's parallel regions.

MKL divides a product by that number even where it may use one thread, so the order of a sum, and
the last bits, depend on it. The number is local to each thread: `torch.set_num_threads` sets it for
the caller and later, at the first nested region, for its other threads. Before that they use MKL's
default: `MKL_NUM_THREADS`, `OMP_NUM_THREADS` or the number of cores.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Make MKL count on one thread in every thread of torch, inside the `with` block.

    Does nothing where MKL or GNU's OpenMP is missing.
    """
    functions = _functions()
    if functions is None:
        yield
        return
    set_local, set_in_all = functions
    before = set_local(1)
    set_in_all(1)
    try:
        yield
    finally:
        # torch sets the same number in its other threads, at their first nested region.
        set_in_all(before)


def controlled() -> bool:
    """Return True where `one_thread` has an effect."""
    return _functions() is not None


@cache
def _functions() -> tuple[Callable[[int], int], Callable[[int], None]] | None:
    """Return two functions that set MKL's number of threads, None where they are missing.

    The first sets it for the calling thread and returns the number before. The second sets it for
    all threads of torch: one parallel region of OpenMP, whose threads each call MKL's function.
    """
    if not torch.backends.mkl.is_available():
        return None
    try:  # loaded already; the search includes the libraries that it is linked with
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        set_local, parallel = torch_cpu.MKL_Set_Num_Threads_Local, torch_cpu.GOMP_parallel
    except (OSError, AttributeError):
        return None
    address = ctypes.cast(set_local, ctypes.c_void_p)
    parallel.restype = None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    # 0: as many threads as torch's regions have; no flags
    return set_local, lambda number: parallel(address, number, 0, 0)
