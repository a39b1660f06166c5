"""A pytest plugin that makes MKL compute as on a processor of the other vendor.

MKL chooses its kernels by the vendor of the processor first, Intel or AMD, and its choice on Intel
needs no instruction that AMD lacks. The function that returns the vendor is replaced in memory,
before its first call, by one that returns the opposite. For x86-64 Linux and torch's own MKL.

    PYTHONPATH=tests/helpers python -m pytest -p other_vendor
"""

import ctypes
import mmap
from pathlib import Path

import torch


def vendor() -> str:
    """Return the vendor of this processor: GenuineIntel, AuthenticAMD, or an empty string."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def switch() -> None:
    """Replace both functions that return whether the processor is Intel's.

    Raises:
        OSError: the memory of the functions cannot be written.
        AttributeError: this torch has no such functions.
    """
    libraries = Path(torch.__file__).parent / "lib"
    torch_cpu, libc = (
        ctypes.CDLL(str(libraries / "libtorch_cpu.so")),
        ctypes.CDLL(None, use_errno=True),
    )
    # mov eax, 0 or 1; ret
    code = b"\xb8" + (vendor() != "GenuineIntel").to_bytes(4, "little") + b"\xc3"
    for name in ("mkl_serv_intel_cpu_true", "mkl_serv_intel_cpu"):
        address = ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value
        assert address is not None
        page = address - address % mmap.PAGESIZE
        size = ctypes.c_size_t(address + len(code) - page)
        if libc.mprotect(
            ctypes.c_void_p(page), size, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        ):
            raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memmove(address, code, len(code))
        libc.mprotect(ctypes.c_void_p(page), size, mmap.PROT_READ | mmap.PROT_EXEC)


switch()
