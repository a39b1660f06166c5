"""The contract of the documentation: what a registry holds has a row on its page, and the row says
what the code promises.
"""

import re
from pathlib import Path

import pytest

from sfumato.diffuse.parameterization import PARAMETERIZATIONS
from sfumato.diffuse.samplers import traits_of
from sfumato.diffuse.schedule import SCHEDULES
from sfumato.diffuse.timesteps import SPACINGS
from sfumato.registry import find, names

DOCS = Path(__file__).resolve().parents[2] / "docs"
SAMPLERS = names("diffuse.samplers")
PARTS = [
    (folder, name)
    for folder in ("predict.guidance.weights", "predict.guidance.rules", "predict.guidance_models")
    for name in names(folder)
]


def table(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table below a heading: {name in backticks: {column: cell}}."""
    section = text.partition(f"\n{heading}\n")[2]
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    rows = {}
    for cells in lines[2:]:
        if not cells[0].startswith("`"):
            break  # another table
        rows[cells[0].strip("`")] = dict(zip(lines[0], cells, strict=True))
    return rows


def mistakes(text: str) -> list[str]:
    """What the page's sampler table says otherwise than the traits do, or does not say."""
    rows, found = table(text, "## Samplers"), []
    found += [f"{name}: a row without a sampler" for name in rows.keys() - set(SAMPLERS)]
    for name in SAMPLERS:
        promised = traits_of(find("diffuse.samplers", name))
        expected = {
            "order": str(promised.order),
            "calls": str(promised.calls),
            "noise": "yes" if promised.noise else "no",
        }
        if name not in rows:
            found.append(f"{name}: no row")
            continue
        # "2, then 1" says at most 2
        said = {column: re.split(r"[ ,]", rows[name][column])[0] for column in expected}
        found += [
            f"{name}: {column} is {expected[column]}, not {said[column]}"
            for column in expected
            if said[column] != expected[column]
        ]
        found += [
            f"{name}: {column} is empty"
            for column in ("formula", "paper", "when")
            if not rows[name][column]
        ]
    return found


def test_every_sampler_has_a_row_that_says_what_its_traits_promise() -> None:
    assert not mistakes((DOCS / "samplers.md").read_text())


def test_the_check_can_fail() -> None:
    text = (DOCS / "samplers.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `unipc` |"))
    assert mistakes(text.replace(row + "\n", "", 1)) == ["unipc: no row"]
    assert mistakes(text.replace(row, row.replace("| 2 | 1 | no |", "| 3 | 1 | yes |"), 1)) == [
        "unipc: order is 2, not 3",
        "unipc: noise is no, not yes",
    ]
    assert mistakes(text.replace(row, f"{row}\n{row.replace('unipc', 'unicorn')}", 1)) == [
        "unicorn: a row without a sampler"
    ]


@pytest.mark.parametrize(
    ("heading", "registry"),
    [
        ("## Spacings", SPACINGS),
        ("## Schedules", SCHEDULES),
        ("## Parameterizations", PARAMETERIZATIONS),
    ],
)
def test_every_spacing_schedule_and_parameterization_has_a_row(
    heading: str, registry: dict
) -> None:
    assert table((DOCS / "samplers.md").read_text(), heading).keys() == registry.keys()


@pytest.mark.parametrize(
    ("folder", "name"), PARTS, ids=[f"{folder}.{name}" for folder, name in PARTS]
)
def test_every_part_of_guidance_is_named(folder: str, name: str) -> None:
    page = DOCS / "guidance.md"
    if not page.exists():
        pytest.skip("docs/guidance.md is not written yet")
    assert re.search(rf"\b{name}\b", page.read_text()), (
        f"{folder}.{name} is not named in docs/guidance.md"
    )


def test_every_task_has_a_row_and_every_command_of_the_page_is_there() -> None:
    text = (DOCS / "tasks.md").read_text()
    assert table(text, "## All tasks").keys() == set(names("tasks"))
    commands = set(re.findall(r"sfumato ([a-z-]+)", text.replace("sfumato.", "")))
    assert commands and commands <= {name.replace("_", "-") for name in names("cli")}
