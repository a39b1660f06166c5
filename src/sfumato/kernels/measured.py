"""Choice among kernels that compute the same, by a measurement on the machine at hand.

No rule of one processor holds on another: Winograd's sums pay where products are slow, and lose
where a matrix unit (AMX) makes products cheap. The first use of a kind of layer times its kernels,
which takes some tenths of a second. The times are kept in files,

    $XDG_CACHE_HOME/sfumato/kernels/MACHINE/KIND.json      (~/.cache by default)

MACHINE is a hash of the processor, its instruction sets, torch, the number of threads, and the
variables in the environment that limit them. Later processes read the files, so a request has the
same bits in each of them: kernels differ by rounding. A folder that cannot be written is
logged once, and each process measures for itself.

Kernels take turns, and the least time of each counts: a busy neighbour lengthens single turns. The
first kernel is the preferred one, and stays unless another takes less than nine tenths of its time.

`SFUMATO_KERNELS=fixed` measures nothing and takes the first kernel: for equal bits on several
machines of one kind.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import UserError
from sfumato.io.atomic import read_table, write_json
from sfumato.io.paths import cache_folder

LOG = logging.getLogger("sfumato")

LIMITS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
LIMITS += ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that change the kernels and threads of the libraries below torch."""

_TURNS = 4  # per kernel; the first is a warm-up
_GAIN = 0.9  # share of the first kernel's time from which another is taken
_VERSION = 1  # of the kernels: a change of their code makes earlier times meaningless

Prepare = Callable[[], Callable[[], object]]
"""() -> a call of the kernel, with its inputs and packed weights."""


def fastest(kind: str, kernels: Mapping[str, Prepare]) -> str:
    """Name the kernel to use for a kind of layer.

    Args:
        kind: Kind of layer with its dtype and sizes: the key of the measurement.
        kernels: Name -> preparation of a call to time. The first is preferred.

    Returns:
        A name of `kernels`.

    Raises:
        UserError: For another value of SFUMATO_KERNELS than "fixed" and "measured".
    """
    names = list(kernels)
    if len(names) == 1 or not _measures():
        return names[0]
    file = _file(kind)
    seconds = _SECONDS.get(file) or _read(file)
    if not set(names) <= set(seconds):
        LOG.info("timing the kernels of %s on this machine, once: %s", kind, ", ".join(names))
        seconds = _keep(kind, lambda: _measure(kernels))
    _SECONDS[file] = seconds
    best = min(names, key=lambda name: seconds[name])
    return best if seconds[best] < _GAIN * seconds[names[0]] else names[0]


def measurements() -> dict[str, dict[str, float]]:
    """Return the times kept for this machine: kind of layer -> kernel -> seconds."""
    times = {}
    for file in sorted(folder().glob("*.json")):
        if seconds := _read(file):
            times[str(read_table(file).get("kind"))] = seconds
    return dict(sorted(times.items()))


def folder() -> Path:
    """Return the folder of this machine's measurements, a file a kind of layer."""
    return cache_folder("kernels") / _machine(torch.get_num_threads())


def _measures() -> bool:
    setting = os.environ.get("SFUMATO_KERNELS", "measured")
    if setting not in ("fixed", "measured"):
        raise UserError(
            f"SFUMATO_KERNELS={setting!r}: expected 'measured', or 'fixed' for the kernels that "
            "are preferred on any processor"
        )
    return setting == "measured"


@torch.no_grad()
def _measure(kernels: Mapping[str, Prepare]) -> dict[str, float]:
    """Return the least seconds of each kernel's turns."""
    calls = {name: prepare() for name, prepare in kernels.items()}
    seconds = dict.fromkeys(calls, float("inf"))
    for turn in range(_TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


_SECONDS: dict[Path, dict[str, float]] = {}  # file -> kernel -> seconds, for this process


def _file(kind: str) -> Path:
    return folder() / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> dict[str, float]:
    """Return the file's times; none where it is absent, broken or of other kernels."""
    try:
        table = read_table(file)
    except (UserError, OSError):
        return {}
    seconds = table.get("seconds")
    if table.get("version") != _VERSION or not isinstance(seconds, dict):
        return {}
    sound = all(isinstance(s, float) and 0 < s < float("inf") for s in seconds.values())
    return seconds if sound else {}


def _keep(kind: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure a kind, write its file, and return the times that count.

    Another process may have measured the same meanwhile: its file counts for both.
    """
    file, seconds = _file(kind), measure()
    on_disk = _read(file)
    if set(on_disk) >= set(seconds):
        return on_disk
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        machine = _description(torch.get_num_threads())
        write_json(file, {"version": _VERSION, "kind": kind, "seconds": seconds, **machine})
    except (UserError, OSError) as error:
        _report_unwritten(str(error))
    return seconds


@cache
def _report_unwritten(error: str) -> None:
    LOG.warning(
        "measurements of kernels are not kept, so each process measures again and bits may differ "
        "between processes (%s): set XDG_CACHE_HOME to a folder that can be written, or "
        "SFUMATO_KERNELS=fixed",
        error,
    )


@cache
def _machine(threads: int) -> str:
    """Return the hash of all that times depend on, `threads` of torch included."""
    return hashlib.sha256(json.dumps(_description(threads)).encode()).hexdigest()[:16]


def _description(threads: int) -> dict[str, Any]:
    """Describe all that times depend on."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "processor": {name: str(value) for name, value in sorted(capabilities.items())},
        "model": _processor_model(),
        "torch": str(torch.__version__),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
    }


@cache
def _processor_model() -> list[str]:
    """Return the lines of Linux's first processor that name its model; none elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return []
    fields = ("vendor_id", "cpu family", "model", "model name", "stepping")
    lines = [line.split(":", 1) for line in first.splitlines() if ":" in line]
    return [value.strip() for name, value in lines if name.strip() in fields]
