"""The contract of the documentation: tables match registries, examples run, links resolve."""

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sfumato.diffuse.parameterization import PARAMETERIZATIONS
from sfumato.diffuse.samplers import traits_of
from sfumato.diffuse.schedule import SCHEDULES, schedule
from sfumato.diffuse.timesteps import SPACINGS
from sfumato.registry import find, module_of, names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
IDS = [str(p.relative_to(ROOT)) for p in PAGES]
SAMPLERS = names("diffuse.samplers")
PARTS = [
    (folder, name)
    for folder in ("predict.guidance.weights", "predict.guidance.rules", "predict.guidance_models")
    for name in names(folder)
]
FACE = {
    "sfumato",
    *(f"sfumato.{p}" for p in ("checkpoints", "compress", "decode", "diffuse", "evaluate")),
    *(f"sfumato.{p}" for p in ("predict", "tasks", "train")),
}


# ---- tables -------------------------------------------------------------------------------------


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
    """Rows of the sampler table that are missing, superfluous, or at odds with the traits."""
    rows, faults = table(text, "## Samplers"), []
    faults += [f"{name}: a row without a sampler" for name in rows.keys() - set(SAMPLERS)]
    for name in SAMPLERS:
        promised = traits_of(find("diffuse.samplers", name))
        expected = {
            "order": str(promised.order),
            "calls": str(promised.calls),
            "noise": "yes" if promised.noise else "no",
        }
        if name not in rows:
            faults.append(f"{name}: no row")
            continue
        cells = {
            column: re.split(r"[ ,]", rows[name][column])[0] for column in expected
        }  # "2, then 1" is at most 2
        faults += [
            f"{name}: {column} is {expected[column]}, not {cells[column]}"
            for column in expected
            if cells[column] != expected[column]
        ]
        faults += [
            f"{name}: {column} is empty"
            for column in ("formula", "paper", "when")
            if not rows[name][column]
        ]
    return faults


def test_every_sampler_has_a_row_with_its_traits() -> None:
    assert not mistakes((DOCS / "reference" / "samplers.md").read_text())


def test_the_check_can_fail() -> None:
    text = (DOCS / "reference" / "samplers.md").read_text()
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
    ("page", "heading", "registry"),
    [
        ("spacings.md", "## Spacings", SPACINGS),
        ("schedules.md", "## Schedules", SCHEDULES),
        ("schedules.md", "## Parameterizations", PARAMETERIZATIONS),
    ],
)
def test_every_spacing_schedule_and_parameterization_has_a_row(
    page: str, heading: str, registry: dict
) -> None:
    assert table((DOCS / "reference" / page).read_text(), heading).keys() == registry.keys()


@pytest.mark.parametrize(
    ("folder", "name"), PARTS, ids=[f"{folder}.{name}" for folder, name in PARTS]
)
def test_every_part_of_guidance_is_named(folder: str, name: str) -> None:
    text = (DOCS / "reference" / "guidance.md").read_text()
    assert re.search(rf"\b{name}\b", text), f"{folder}.{name} is not named there"


def test_every_task_has_a_row_and_every_command_is_on_its_page() -> None:
    assert table((DOCS / "guides" / "tasks.md").read_text(), "## All tasks").keys() == set(
        names("tasks")
    )
    assert {command for _, command in commands(DOCS / "reference" / "commands.md")} == {
        n.replace("_", "-") for n in names("cli")
    }


# ---- README -------------------------------------------------------------------------------------


def test_the_readme_is_short_and_counts_the_samplers() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert f"{len(SAMPLERS)} samplers" in text
    lengths = [
        len(Path(module_of("diffuse.samplers", name).__file__ or "").read_text().splitlines())
        for name in SAMPLERS
    ]
    assert all(15 <= length <= 120 for length in lengths), "the README says 20 to 100 lines"


def test_every_figure_of_the_readme_stands_on_the_page_it_links_to() -> None:
    section = (ROOT / "README.md").read_text().partition("## How good\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        (page,) = re.findall(r"\]\((docs/[^)#]+)", row)
        cells = row.split("|")[2:4]
        missing = [
            figure
            for figure in re.findall(r"\d+\.\d+", " ".join(cells))
            if figure not in (ROOT / page).read_text()
        ]
        assert not missing, f"{page} does not have {missing}, which README.md says of it"


# ---- links and imports --------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_to_a_file(page: Path) -> None:
    """README and CONTRIBUTING are outside of the site's own check; `../../` is the host's."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not link.startswith(("http", "../../actions/"))]
    assert not [link for link in local if not (page.parent / link).exists()]


def imported(text: str) -> list[str]:
    """The modules of sfumato that a page's examples import."""
    return re.findall(r"^\s*(?:from|import) (sfumato[\w.]*)", text, re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.name != "CONTRIBUTING.md"],
    ids=[i for i in IDS if i != "CONTRIBUTING.md"],
)
def test_examples_import_from_the_public_packages_alone(page: Path) -> None:
    assert set(imported(page.read_text())) <= FACE


# ---- examples and commands ----------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/concepts.md"])
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_indented_examples_are_python(page: Path) -> None:
    """Lines that look like Python parse, so that no bracket or quote is lost."""
    text = page.read_text()
    lines = [
        line.strip()
        for line in re.findall(
            r"^    (?:[\w.]+ = )?[\w.]+\(.*\)(?:\[0\])?(?:  +#.*)?$", text, re.MULTILINE
        )
    ]
    for line in lines:
        ast.parse(line)


def commands(page: Path) -> list[tuple[str, str]]:
    """(line, command) of each `sfumato COMMAND ...` in a page's code blocks."""
    joined = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (sfumato [a-z].*)$", joined, re.MULTILINE)
    return [(line, line.split()[1]) for line in lines]


ALL_COMMANDS = sorted({(line, command) for page in PAGES for line, command in commands(page)})


def test_there_are_commands_to_check() -> None:
    assert {command for _, command in ALL_COMMANDS} == {
        name.replace("_", "-") for name in names("cli")
    }


class Parsed(Exception):
    """The arguments are good."""


@pytest.mark.parametrize("line", [line for line, _ in ALL_COMMANDS])
def test_every_command_parses(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its options exist and take such values; nothing is run."""
    command, *arguments = shlex.split(line, comments=True)[1:]
    name = command.replace("-", "_")
    module = module_of("cli", name)
    parse = module.parse

    def parse_only(*args: Any, **options: Any) -> Any:
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse_only)
    monkeypatch.chdir(ROOT)  # recipes are found by name
    with pytest.raises((Parsed, SystemExit)) as caught:
        find("cli", name)(arguments)
    is_help = (
        isinstance(caught.value, SystemExit) and caught.value.code == 0 and "--help" in arguments
    )
    assert caught.type is Parsed or is_help, capsys.readouterr().err


# ---- CONTRIBUTING's recipes ---------------------------------------------------------------------


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> ModuleType:
    """The example of CONTRIBUTING.md that defines a name, as a module."""
    block = next(
        b
        for b in python_blocks(ROOT / "CONTRIBUTING.md")
        if re.search(rf"^(?:def|class) {request.param}\b", b, re.MULTILINE)
    )
    file = tmp_path / f"example_{request.param.lower()}.py"
    file.write_text(block)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", ["midpoint"], indirect=True)
def test_the_sampler_of_contributing_is_of_order_two(recipe: ModuleType) -> None:
    """The exact denoiser of two normal distributions around -1 and 1, deviation 0.5, a flow."""
    from sfumato.types import Prediction

    flow = schedule("flow")

    def denoise(x: torch.Tensor, t: float) -> Prediction:
        alpha, sigma = flow.point(t)
        variance = 0.25 * alpha**2 + sigma**2
        x0 = (0.25 * alpha * x + sigma**2 * (alpha / variance * x).tanh()) / variance
        return Prediction(x0, (x - alpha * x0) / sigma)

    def end(steps: int) -> torch.Tensor:
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
        run = recipe.midpoint(
            x, [0.95 - 0.8 * k / steps for k in range(steps + 1)], flow, torch.empty
        )
        call = next(run)
        try:
            while True:
                call = run.send(denoise(*call))
        except StopIteration as stop:
            return stop.value

    exact, coarse, fine = end(1024), end(32), end(64)
    ratio = float((coarse - exact).norm() / (fine - exact).norm())
    assert 3.5 < ratio < 4.6, ratio


@pytest.mark.parametrize("recipe", ["Renorm"], indirect=True)
def test_the_rule_of_contributing_bounds_the_norm(recipe: ModuleType) -> None:
    from sfumato.predict.guidance.rules import Moment, Prediction, Rule

    draw = torch.Generator().manual_seed(0)
    x, first, second = (
        torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    moment = Moment(0.4, 0.6, 0.4)
    conditional, baseline = (
        Prediction(x0, (x - moment.alpha * x0) / moment.sigma) for x0 in (first, second)
    )
    assert issubclass(recipe.Renorm, Rule)
    guided = recipe.Renorm().begin()(x, moment, [conditional, baseline], 3.0)
    torch.testing.assert_close(recipe.norm(guided.x0), recipe.norm(conditional.x0))
    torch.testing.assert_close(moment.alpha * guided.x0 + moment.sigma * guided.eps, x)
    plain = recipe.Renorm().begin()(
        x, moment, [conditional, Prediction(first / 2, baseline.eps)], 0.5
    )
    torch.testing.assert_close(plain.x0, 0.75 * first)  # shorter already


@pytest.mark.parametrize("recipe", ["colourise"], indirect=True)
def test_the_task_of_contributing_makes_a_request(recipe: ModuleType) -> None:
    import sfumato

    model = sfumato.load("fashion")
    image = model.generate("bag", steps=2)[0]
    plan = recipe.colourise(model, image, sfumato.Request("bag", n=2, steps=10), strength=0.5)
    assert (plan.height, plan.width, plan.prompts, plan.n) == (28, 28, ("bag", "bag"), 2)
    assert len(model.run(plan)) == 2


# ---- docstrings of the site ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    """docs/_ext/docstrings.py, which needs no Sphinx to convert."""
    spec = importlib.util.spec_from_file_location(
        "docstrings_of_the_site", DOCS / "_ext" / "docstrings.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = a*z + b*eps", r"x = a\*z + b\*eps"),
        ("|x| of x_ and x_t", r"\|x\| of x\_ and x_t"),
        ("`Prediction`s of `x_`", r"``Prediction``\ s of ``x_``"),
        ("(arXiv:2206.00364)", "(`arXiv:2206.00364 <https://arxiv.org/abs/2206.00364>`__)"),
        ("* an item", "* an item"),
    ],
)
def test_markup_of_docstrings_survives(docstrings: ModuleType, text: str, expected: str) -> None:
    assert docstrings.inline(text) == expected


def test_code_blocks_and_columns_stay_literal_and_sections_stay_sections(
    docstrings: ModuleType,
) -> None:
    assert docstrings.convert(["Text:", "    a  b", "", "x    y"]) == [
        "Text:",
        "",
        "::",
        "",
        "        a  b",
        "",
        "::",
        "",
        "    x    y",
    ]
    assert (
        docstrings.convert(["    import sfumato", "    sfumato.load('fashion')"])[0]
        == ".. code-block:: python"
    )
    items = ["Two:", "- a*b", "    and c", "- d"]
    assert docstrings.convert(items) == ["Two:", "", r"- a\*b", "  and c", "- d"]
    lines = [
        "Args:",
        "    a: A |value|.",
        "        More.",
        "    b, c: Others.",
        "",
        "Example:",
        "    f(1)",
        "",
        "Text.",
    ]
    assert docstrings.convert(lines) == [
        *("Args:", r"    a: A \|value\|.", "        More.", "    b, c: Others.", ""),
        *("Example:", "", "    ::", "", "        f(1)", "", "Text."),
    ]
    assert docstrings.documented(lines) == ["a", "b", "c"]
    assert docstrings.unknown_parameters(lambda a, b: None, lines) == ["c"]
    assert docstrings.unknown_parameters(lambda a, **fields: None, lines) == []
