"""The tests of invariance, run again in child processes that compute as other processors do.

A kind is a set of environment variables that the libraries below torch read when they choose their kernels, or a number of threads. A kind
that computes the same bits as this process is had already, and is skipped: the reason says what was tried. All kinds together are what
this one processor can do in place of those on which nobody runs the tests.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
TESTS = Path(__file__).parents[1]

VENDOR = {"PYTEST_ADDOPTS": "-p other_vendor"}
AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
KINDS: dict[str, dict[str, str]] = {
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "12 threads": {"OMP_NUM_THREADS": "12", "OMP_WAIT_POLICY": "PASSIVE"},
    "the other vendor's MKL": VENDOR,
    "the other vendor's MKL, 2 threads": VENDOR | {"OMP_NUM_THREADS": "2"},
    "AVX2": AVX2,
    "AVX2, the other vendor's MKL": AVX2 | VENDOR,
    "MKL's compatible kernels": {"MKL_CBWR": "COMPATIBLE"},
    "MKL's strict kernels": {"MKL_CBWR": "AVX2,STRICT"},
    "oneDNN without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX": {"MKL_ENABLE_INSTRUCTIONS": "AVX", "ONEDNN_MAX_CPU_ISA": "AVX", "ATEN_CPU_CAPABILITY": "default"},
    "SSE": VENDOR | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}


def environment(kind: str) -> dict[str, str]:
    """The environment of a child process; variables of this process that choose kernels are left out."""
    chosen = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "PYTEST_ADDOPTS")
    kept = {name: value for name, value in os.environ.items() if name not in chosen and not name.startswith("PYTEST_XDIST")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS), **KINDS.get(kind, {})}


@cache
def fingerprint(kind: str) -> str:
    """The hash of a child's arithmetic; an empty string where the child fails."""
    plugins = re.findall(r"-p (\w+)", KINDS.get(kind, {}).get("PYTEST_ADDOPTS", ""))
    command = [sys.executable, str(HELPERS / "fingerprint.py"), *plugins]
    return subprocess.run(command, env=environment(kind), capture_output=True, text=True).stdout.strip()


def files() -> list[str]:
    """The files with tests of invariance, by their marker."""
    return sorted(str(f) for f in TESTS.rglob("test_*.py") if "mark.invariance" in f.read_text() and f != Path(__file__))


def test_kinds_differ() -> None:
    """The fingerprint shows other kernels where there are some: on x86, MKL's compatible kernels are others than its own choice."""
    import torch

    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    assert fingerprint("") and fingerprint("") != fingerprint("MKL's compatible kernels")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_invariance(kind: str) -> None:
    variables = " ".join(f"{name}={value}" for name, value in KINDS[kind].items())
    if not fingerprint(kind):
        pytest.skip(f"tried {variables}: this machine or this torch cannot be made to compute so")
    if "threads" not in kind and fingerprint(kind) in {fingerprint("")}:
        pytest.skip(f"tried {variables}: the same bits as without it on this machine")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "invariance", "-n0", "-p", "no:cacheprovider", *files()]
    run = subprocess.run(command, env=environment(kind), capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, f"{variables}\n{run.stdout[-4000:]}{run.stderr[-2000:]}"
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100, run.stdout[-1000:]  # type: ignore[index]
