"""The language law: docstrings, help texts and names, as far as a machine can check.

    summary      one line of at most 88 characters, and an empty line after it
    opening      no docstring and no help text opens with What, Who, Whether, How or Where
    identifier   none has a word of `FORBIDDEN`: a name says what the value is

The library keeps all three rules. Tests, benchmarks, examples and the documentation's
extensions keep the last: names of other libraries (hypothesis' `given`) are theirs to choose.

Every file is read by its syntax tree, nothing is imported. ruff checks the rest (see
pyproject.toml): the length of lines (E501), and docstrings by Google's convention (D), with an
`Args` section that names all parameters or none.
"""

import ast
import builtins
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "src/sfumato"
OTHERS = ("tests", "benchmarks", "examples", "docs")


def python_files(*folders: str) -> list[str]:
    """Paths of all Python files in folders of the repository, relative to its root."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


FILES = {"library": python_files(LIBRARY), "others": python_files(*OTHERS)}
ROOTS = ("src", "tests", "benchmarks", "examples", "docs/_ext")
OWN = {path.stem for folder in ROOTS for path in (ROOT / folder).iterdir()}
"""Modules of this repository; names imported from others are not its own."""

SUMMARY = 88
OPENINGS = re.compile(r"(?:What|Who|Whether|How|Where)\b")
FORBIDDEN = {
    *("found", "given", "said", "told", "asked", "wanted", "known"),
    *("what", "thing", "theirs", "ours"),
}
TERMS = ("known_region", "KnownRegion")
"""Terms of the field that have such a word."""
HELP = ("help", "short_help", "description")
"""Arguments that are help texts of the command line."""

Rule = Callable[[ast.Module], Iterator[tuple[int, str]]]
"""Gives the line and a message of each place of a file that breaks the rule."""


def bad_summaries(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Docstrings whose first line is too long, or goes on in the next."""
    for line, docstring in docstrings(tree):
        summary, _, rest = docstring.strip().partition("\n")
        summary = summary.strip()
        if len(summary) > SUMMARY:
            yield (
                line,
                f"summary of {len(summary)} characters, expected at most {SUMMARY}: "
                f"{summary[:60]!r}...",
            )
        if rest.partition("\n")[0].strip():
            yield (
                line,
                f"summary that goes on in the next line, expected an empty line there: "
                f"{summary[:60]!r}",
            )


def bad_openings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Docstrings and help texts that open with a question word."""
    texts = [("docstring", *entry) for entry in docstrings(tree)]
    texts += [("help text", *entry) for entry in help_texts(tree)]
    for kind, line, text in texts:
        if opening := OPENINGS.match(text.strip()):
            yield (
                line,
                f"{kind} that opens with {opening[0]!r}, expected a noun or a verb: "
                f"{text.strip()[:60]!r}",
            )


def bad_identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers with a forbidden word; those of Python and other libraries may have one."""
    for line, name in sorted(set(identifiers(tree))):
        bad = sorted(words(name) & FORBIDDEN)
        if bad and not hasattr(builtins, name):
            yield line, f"identifier {name!r} has {', '.join(bad)!r}: name it by what it holds"


RULES = (bad_summaries, bad_openings, bad_identifiers)


def offences(text: str, rules: Iterable[Rule] = RULES) -> list[str]:
    """Places of a file's text that break a rule, each with its line number."""
    tree = ast.parse(text)
    return [f"{line}: {message}" for rule in rules for line, message in rule(tree)]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring: of the module, its classes, functions and attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


def help_texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every argument of `HELP`: a text, the begin of an f-string, or a constant."""
    constants = {
        target.id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in HELP:
            value = node.value
            if isinstance(value, ast.Name):
                value = constants.get(value.id)
            match value:
                case ast.Constant(value=str(text)):
                    yield node.value.lineno, text
                case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
                    yield node.value.lineno, text


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a file names, and of every name of this repository."""
    foreign = foreign_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name in foreign:
                pass
            case ast.Attribute(value=ast.Name(id=name), ctx=ast.Load()) if name in foreign:
                pass
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.keyword(arg=str(name), value=value):
                yield value.lineno, name
            case ast.alias(name=name, asname=other) if other or name not in foreign:
                yield node.lineno, other or name


def foreign_names(tree: ast.Module) -> set[str]:
    """Names that a file imports from other libraries under the names that they have there."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), level=0, names=aliases):
                modules = [module] * len(aliases)
            case ast.Import(names=aliases):
                modules = [alias.name for alias in aliases]
            case _:
                continue
        names |= {
            alias.name
            for alias, module in zip(aliases, modules, strict=True)
            if alias.asname is None and module.partition(".")[0] not in OWN
        }
    return names


def words(identifier: str) -> set[str]:
    """Words of a snake_case or CamelCase identifier, in lower case, without those of `TERMS`."""
    for term in TERMS:
        identifier = identifier.replace(term, "")
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


@pytest.mark.parametrize("name", FILES["library"])
def test_file_of_the_library_keeps_the_language_law(name: str) -> None:
    broken = offences((ROOT / name).read_text())
    assert not broken, "\n".join(f"{name}:{offence}" for offence in broken)


@pytest.mark.parametrize("name", FILES["others"])
def test_names_outside_the_library_keep_the_language_law(name: str) -> None:
    broken = offences((ROOT / name).read_text(), [bad_identifiers])
    assert not broken, "\n".join(f"{name}:{offence}" for offence in broken)


def test_all_files_are_read() -> None:
    library = ("__init__", "model", "cli/generate", "diffuse/samplers/ddim")
    assert {f"{LIBRARY}/{name}.py" for name in library} <= set(FILES["library"])
    assert {
        "tests/conftest.py",
        "tests/contracts/test_language.py",
        "tests/helpers/models.py",
        "benchmarks/behaviour.py",
        "benchmarks/_behaviour/names.py",
        "examples/fashion_classifier.py",
        "docs/_ext/docstrings.py",
    } <= set(FILES["others"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'"""{"x" * 89}"""', "1: summary of 89 characters"),
        (f'"""\n{"x" * 89}\n"""', "1: summary of 89 characters"),
        ('"""A summary that goes\non."""', "1: summary that goes on"),
        ('"""A summary.\nArgs: none."""', "1: summary that goes on"),
        ('def f():\n    """A summary\n    that goes on."""', "2: summary that goes on"),
        ('"""What a file is."""', "docstring that opens with 'What'"),
        ('"""\nWhether it rains.\n"""', "docstring that opens with 'Whether'"),
        ('class A:\n    """Who it is."""', "docstring that opens with 'Who'"),
        ('class A:\n    x: int\n    """How many."""', "3: docstring that opens with 'How'"),
        ('async def f():\n    """Where it is."""', "docstring that opens with 'Where'"),
        ('option(help="What to draw.")', "1: help text that opens with 'What'"),
        ('option(short_help="How many.")', "help text that opens with 'How'"),
        ('option(help="Where "\n"it is.")', "help text that opens with 'Where'"),
        ('option(help=f"What {x} is.")', "help text that opens with 'What'"),
        ('OUT = "Where to write."\noption(help=OUT)', "2: help text that opens with 'Where'"),
        ("found = 1", "1: identifier 'found' has 'found'"),
        ("def f(told): pass", "identifier 'told' has 'told'"),
        ("def said_so(): pass", "identifier 'said_so' has 'said'"),
        ("async def asked(): pass", "identifier 'asked' has 'asked'"),
        ("class TheirsOnly: pass", "identifier 'TheirsOnly' has 'theirs'"),
        ("x.is_known = 1", "identifier 'is_known' has 'known'"),
        ("f(wanted=1)", "identifier 'wanted' has 'wanted'"),
        ("for what in x: pass", "identifier 'what' has 'what'"),
        ("def f(*, one_thing): pass", "identifier 'one_thing' has 'thing'"),
        ("import a as ours", "identifier 'ours' has 'ours'"),
        ("from sfumato import GIVEN", "identifier 'GIVEN' has 'given'"),
        ("from helpers.models import known", "identifier 'known' has 'known'"),
        ("from . import told", "identifier 'told' has 'told'"),
        ("from hypothesis import given as asked", "identifier 'asked' has 'asked'"),
        ("from hypothesis import given\ngiven = 1", "2: identifier 'given' has 'given'"),
        ("import sfumato\nsfumato.found()", "2: identifier 'found' has 'found'"),
        ("import library\nlibrary.found = 1", "2: identifier 'found' has 'found'"),
        ("[0 for given_2 in x]", "identifier 'given_2' has 'given'"),
        ("try: pass\nexcept OSError as found: pass", "2: identifier 'found' has 'found'"),
        ("match x:\n    case [found]: pass", "2: identifier 'found' has 'found'"),
    ],
)
def test_the_language_law_can_be_broken(text: str, message: str) -> None:
    broken = offences(text)
    assert len(broken) == 1 and message in broken[0], broken


@pytest.mark.parametrize(
    "text",
    [
        f'"""{"x" * 88}"""',
        f'"""A summary.\n\n{"x" * 89}\n"""',
        '"""\nA summary.\n\nHow it works.\n"""',
        '"""Whatever it is."""',
        '"""However it is read."""',
        'x = "What is no docstring."',
        'f("What is no help text.")',
        'option(help="Number of images.")',
        "option(help=OUT)",
        "known_region = KnownRegion()",
        "foundation = unknown(familiar)",
        "raise FileNotFoundError",
        "from hypothesis import given\n@given()\ndef f(): pass",
        "from importlib import metadata\nraise metadata.PackageNotFoundError",
        '"""A file: what it found, told and said."""',
    ],
)
def test_right_texts_break_no_rule(text: str) -> None:
    assert not offences(text)
