"""House rules that a machine can check on every file of the library."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "sfumato"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(f.relative_to(SOURCE)) for f in FILES]
PARTS = ("conditioner", "autoencoder", "network", "denoiser")
"""Parts of a model, which have classes. transformers' models have none that is of use."""
WHEEL_LIMIT = 12 * 2**20  # bytes: what the wheel may weigh
PICKLERS = {
    ("torch", "save"),
    ("pickle", "dump"),
    ("pickle", "dumps"),
    ("joblib", "dump"),
    ("np", "save"),
    ("numpy", "save"),
}


def offences(text: str, *, may_print: bool = False) -> list[str]:
    """Places of a file's text that break a house rule, with line numbers."""
    tree = ast.parse(text)
    result = [] if ast.get_docstring(tree) else ["1: no docstring says what this file is"]
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            if name in PARTS and ast.unparse(node.annotation) == "Any":
                result.append(f"{node.lineno}: {name} is Any: annotate it by its class or protocol")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
            if any(isinstance(d, (ast.List, ast.Dict, ast.Set)) for d in defaults):
                result.append(f"{node.lineno}: {node.name} has a mutable default")
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("getattr", "hasattr") and node.args:
            probed = ast.unparse(node.args[0]).rpartition(".")[2]
            if probed in PARTS:
                result.append(f"{node.lineno}: {called.id} probes {probed}: ask its class")
        if isinstance(called, ast.Name) and called.id == "print" and not may_print:
            result.append(
                f"{node.lineno}: print belongs to the command line: use logging, or return the text"
            )
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            pair = (called.value.id, called.attr)
            if pair in PICKLERS:
                result.append(
                    f"{node.lineno}: {'.'.join(pair)} writes a pickle or a bare array: "
                    "write safetensors (sfumato.io.atomic.write_tensors)"
                )
            if pair == ("torch", "load") and not any(
                k.arg == "weights_only"
                and isinstance(k.value, ast.Constant)
                and k.value.value is True
                for k in node.keywords
            ):
                result.append(
                    f"{node.lineno}: torch.load without weights_only=True runs code from the file"
                )
    return result


def test_there_are_files_to_check() -> None:
    assert "errors.py" in NAMES


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_file_keeps_the_house_rules(file: Path) -> None:
    result = offences(file.read_text(), may_print=file.is_relative_to(SOURCE / "cli"))
    assert not result, "\n".join(f"{file.relative_to(SOURCE)}:{line}" for line in result)


@pytest.mark.parametrize(
    "bad",
    [
        "x = 1",
        '"""d"""\nprint(1)',
        '"""d"""\ndef f(a=[]): pass',
        '"""d"""\ndef f(*, a={}): pass',
        '"""d"""\ntorch.save(a, b)',
        '"""d"""\ntorch.load(a)',
        '"""d"""\ndef f(network: Any): pass',
        '"""d"""\nclass A:\n    conditioner: Any',
        '"""d"""\nhasattr(self.autoencoder, "space")',
        '"""d"""\ngetattr(network, "classes", 0)',
        '"""d"""\ntorch.load(a, weights_only=False)',
    ],
)
def test_the_check_can_fail(bad: str) -> None:
    assert len(offences(bad)) == 1


def test_the_check_lets_good_files_pass() -> None:
    assert not offences('"""d"""\ndef f(a=()): return torch.load(a, weights_only=True)')
    assert not offences('"""d"""\nprint(1)', may_print=True)


def test_files_of_the_wheel_are_small() -> None:
    files = [f for f in SOURCE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    total = sum(f.stat().st_size for f in files)
    assert total < WHEEL_LIMIT, (
        f"{total / 2**20:.1f} MiB under src/sfumato: the wheel may weigh {WHEEL_LIMIT / 2**20:.0f}"
    )


def test_bundled_files_are_of_kinds_that_are_packaged() -> None:
    bundled = SOURCE / "bundled"
    if not bundled.exists():
        pytest.skip("no model is bundled in this checkout yet")
    left_behind = [
        str(f.relative_to(bundled))
        for f in bundled.rglob("*")
        if f.is_file() and f.suffix not in (".json", ".safetensors", ".md")
    ]
    assert not left_behind, (
        f"pyproject.toml packages json, safetensors and md, these would stay behind: {left_behind}"
    )
