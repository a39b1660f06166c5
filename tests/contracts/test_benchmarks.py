"""Every benchmark and recipe can be imported: a module that moved is seen here, not by whoever runs
the command of a page.
"""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "recipes").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_it_can_be_imported(file: Path) -> None:
    names = runpy.run_path(str(file), run_name="imported")  # not "__main__": nothing is measured
    assert names["__doc__"]
    if file.parent.name == "benchmarks":
        assert f"benchmarks/{file.name}" in names["__doc__"], "a benchmark says how it is run"
