"""Child processes that run the checkout's library without the tests' shape checks."""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment with the checkout's library on the path."""
    return {**os.environ, "PYTHONPATH": str(SOURCE), **variables}


def run_python(
    *arguments: str | Path, cwd: Path | None = None, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end.

    Args:
        arguments: of the interpreter: "-c", program ... or "-m", module ...
        cwd: the child's folder; this process's by default.
        check: assert that the exit code is 0.
        variables: further environment variables.

    Returns:
        Exit code, stdout and stderr as text.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**variables), cwd=cwd, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done
