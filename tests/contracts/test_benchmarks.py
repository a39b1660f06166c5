"""Every benchmark and example can be imported: a module that moved is seen here, not by who runs
the command of a page.
"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("[!_]*.py"))
FILES = [*BENCHMARKS, *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_it_can_be_imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as Python does for a script: benchmarks share `_common` and `_models`
    monkeypatch.syspath_prepend(file.parent)
    names = runpy.run_path(str(file), run_name="imported")  # not "__main__": nothing is measured
    assert names["__doc__"]
    if file.parent.name == "benchmarks":
        assert f"benchmarks/{file.name}" in names["__doc__"], "a benchmark says how it is run"


def test_the_readme_has_a_line_for_every_benchmark() -> None:
    lines = (ROOT / "benchmarks" / "README.md").read_text()
    assert re.findall(r"^\| `(\w+\.py)", lines, re.MULTILINE) == [file.name for file in BENCHMARKS]
