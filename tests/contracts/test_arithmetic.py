"""The tests of invariance, run again in child processes that compute as other processors do.

A kind is a set of environment variables from which the libraries below torch choose their kernels,
or a number of threads. A kind that computes the same bits as this process is skipped, and the
reason names the variables. Tests beside diffusers, which takes long to import, run again for one
kind only: the networks that they compare are among those of tests/contracts/test_networks.py.
"""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sfumato.deploy.machine import LIMITS

HELPERS = Path(__file__).parents[1] / "helpers"
TESTS = Path(__file__).parents[1]

VENDOR = {"PYTEST_ADDOPTS": "-p other_vendor"}
AVX2 = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
SHARED = {"OMP_WAIT_POLICY": "PASSIVE"}  # the processors are shared with another test process
KINDS: dict[str, dict[str, str]] = {
    "2 threads": SHARED | {"OMP_NUM_THREADS": "2"},
    "5 threads": SHARED | {"OMP_NUM_THREADS": "5"},
    "the other vendor's MKL": VENDOR,
    "AVX2": AVX2,
    "AVX2, the other vendor's MKL, 2 threads, 1 of MKL": AVX2
    | VENDOR
    | SHARED
    | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "1"},
    "MKL's compatible kernels": {"MKL_CBWR": "COMPATIBLE"},
    "oneDNN without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX": {
        "MKL_ENABLE_INSTRUCTIONS": "AVX",
        "ONEDNN_MAX_CPU_ISA": "AVX",
        "ATEN_CPU_CAPABILITY": "default",
    },
    "SSE": VENDOR
    | {
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
    },
}

RARE = ("5 threads", "AVX2", "AVX", "MKL's compatible kernels")
"""Kinds whose libraries and numbers of threads others try too: with SFUMATO_ALL_KINDS=1 alone."""


def environment(kind: str) -> dict[str, str]:
    """The environment of a child process; variables of this process that choose kernels are left
    out.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*LIMITS, "PYTEST_ADDOPTS") and not name.startswith("PYTEST_XDIST")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS), **KINDS.get(kind, {})}


@cache
def fingerprint(kind: str) -> str:
    """The hash of a child's arithmetic; an empty string where the child fails."""
    plugins = re.findall(r"-p (\w+)", KINDS.get(kind, {}).get("PYTEST_ADDOPTS", ""))
    command = [sys.executable, str(HELPERS / "fingerprint.py"), *plugins]
    return subprocess.run(
        command, env=environment(kind), capture_output=True, text=True
    ).stdout.strip()


def marked(interop: bool) -> list[str]:
    """The tests of invariance, found by their marker: files whose tests all have it, and single
    tests as file::name.
    """
    result = []
    for file in sorted(TESTS.rglob("test_*.py")):
        if (
            file == Path(__file__)
            or (file.parent.name == "interop" and not interop)
            or "mark.invariance" not in file.read_text()
        ):
            continue
        nodes = ast.parse(file.read_text()).body
        if any(
            isinstance(node, ast.Assign) and "mark.invariance" in ast.unparse(node)
            for node in nodes
        ):
            result.append(str(file))
        tests = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        result += [
            f"{file}::{test.name}"
            for test in tests
            if any("mark.invariance" in ast.unparse(d) for d in test.decorator_list)
        ]
    return result


def test_kinds_differ() -> None:
    """The fingerprint shows other kernels where there are some: on x86, MKL's compatible kernels
    are others than its own choice.
    """
    import torch

    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    assert fingerprint("") and fingerprint("") != fingerprint("MKL's compatible kernels")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_invariance(kind: str) -> None:
    variables = " ".join(f"{name}={value}" for name, value in KINDS[kind].items())
    if kind in RARE and "SFUMATO_ALL_KINDS" not in os.environ:
        pytest.skip(f"{variables}: set SFUMATO_ALL_KINDS=1 to try it, a minute a kind")
    if not fingerprint(kind):
        pytest.skip(f"tried {variables}: this machine or this torch cannot be made to compute so")
    if "OMP_NUM_THREADS" not in KINDS[kind] and fingerprint(kind) == fingerprint(""):
        pytest.skip(f"tried {variables}: the same bits as without it on this machine")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-n0",
        "-p",
        "no:cacheprovider",
        *marked(interop=KINDS[kind] == VENDOR),
    ]
    run = subprocess.run(
        command, env=environment(kind), capture_output=True, text=True, cwd=TESTS.parent
    )
    assert run.returncode == 0, f"{variables}\n{run.stdout[-4000:]}{run.stderr[-2000:]}"
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100, run.stdout[-1000:]  # type: ignore[index]
