"""The notebook runs: every code cell of every notebook in examples/, in order, in one namespace."""

import json
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def code(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_is_kept_executed(path: Path) -> None:
    for number, cell in enumerate(code(path), 1):
        assert cell["execution_count"] == number, (
            "execute the notebook from the top before it is committed"
        )
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    assert (
        sum(
            "image/png" in output.get("data", {})
            for cell in code(path)
            for output in cell["outputs"]
        )
        >= 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_runs(path: Path, fashion: object) -> None:
    from sfumato.data import open_images
    from sfumato.errors import UserError

    try:
        open_images("fashion-mnist", split="test")
    except UserError as error:
        pytest.skip(str(error))
    namespace: dict[str, object] = {}
    for cell in code(path):
        exec("".join(cell["source"]), namespace)
