"""The command line as a user meets it: exit codes, one-sentence errors, fast help, and PNG files
that can be made again.
"""

import ast
import json
import os
import subprocess
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import pixels
from helpers.processes import SOURCE, environment, run_python
from sfumato.cli import main
from sfumato.cli.generate import slug
from sfumato.errors import NumericalError, UserError
from sfumato.images import read_parameters, to_pil, write_png
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.registry import names
from sfumato.sampling import Request


class StubPlan(dict[str, Any]):
    """A plan of a `StubModel`: its settings, and the fields of the request beside them."""

    spacing = "trailing"
    request = Request(decoding="whole")

    def to_json(self) -> dict[str, Any]:
        return {
            name: self[name]
            for name in ("n", "steps", "sampler", "spacing", "guidance", "height", "width")
        }

    def explicit_request(self) -> Request:
        return Request(timesteps=None)


class StubModel:
    """Stands for a model: pictures are noise that depends on every setting, so that a setting lost
    on the way shows.
    """

    def __init__(self, hash: str = "a" * 64) -> None:
        self.hash = hash
        self.requests: list[dict[str, Any]] = []

    defaults = types.SimpleNamespace(steps=3, guidance=2.0)
    conditioner = Unconditional()
    training_data: ClassVar[dict[str, Any]] = {}
    sample_size = 8

    def plan(self, request: Request) -> StubPlan:
        settings = {
            "steps": 3,
            "sampler": "ddim",
            "spacing": "trailing",
            "guidance": 2.0,
            "height": 8,
            "width": 8,
        }
        always = ("prompt", "n", "seed", "negative_prompt")
        changed = {
            f.name: value
            for f in fields(Request)
            if (value := getattr(request, f.name)) != f.default or f.name in always
        }
        if changed.get("decoding") == "whole":  # as without it
            del changed["decoding"]
        return StubPlan(settings | changed)

    def describe(self) -> dict[str, Any]:
        return {"image": {"channels": 1, "height": 8, "width": 8}}

    def optimized(self) -> "StubModel":
        return self

    def fitted(self, plan: StubPlan) -> StubPlan:
        return plan

    def run(
        self,
        plan: StubPlan,
        *,
        on_step: Callable[[object], bool | None],
        batch: int | None,
    ) -> list[Image.Image]:
        request = dict(plan)
        self.requests.append(request)
        prompt, n, seed = (request[name] for name in ("prompt", "n", "seed"))
        rest = {
            name: value for name, value in request.items() if name not in ("prompt", "n", "seed")
        }
        if prompt == "interrupt":
            raise KeyboardInterrupt
        if prompt == "nan":
            raise NumericalError("sample: step 2 of 3 gave NaN in float16")
        if prompt == "crash":
            raise RuntimeError("deep\ninside")
        if rest["sampler"] == "bogus":
            raise UserError("unknown sampler 'bogus': expected one of ddim")
        for k in range(rest["steps"]):
            assert on_step(types.SimpleNamespace(index=k, count=rest["steps"])) is None
        # n takes part: arithmetic may depend on the batch, so an image of a batch must be made
        # again with its batch.
        words = repr((prompt, n, seed, sorted(rest.items()))).encode()
        noise = torch.Generator().manual_seed(zlib.crc32(words))
        return to_pil(torch.rand(n, 1, rest["height"], rest["width"], generator=noise) * 2 - 1)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, working_folder: Path) -> Iterator[dict[str, Any]]:
    """Replaces sfumato.loading by stubs, by name, in a fresh folder."""
    models = {"fashion": StubModel(), "other": StubModel("b" * 64)}
    module = types.ModuleType("sfumato.loading")
    module.load = lambda name, **reading: models[name]  # type: ignore[attr-defined]
    module.open_model = lambda name, options: models[name]  # type: ignore[attr-defined]
    module.outline = lambda name, *reading, **more: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sfumato.loading", module)
    threads = torch.get_num_threads()
    yield models
    torch.set_num_threads(threads)


def run(*arguments: str) -> int:
    """main, with argparse-like exits turned into their codes."""
    try:
        return main(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


# ---- generate ------------------------------------------------------------------------------------


def test_generate_writes_a_grid_named_after_the_prompt(
    stub: dict[str, StubModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "Ankle boot!") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "ankle-boot-seed0.png"
    assert err == ""
    # 16 pictures of 8x8 with 2 pixels between
    assert pixels("ankle-boot-seed0.png").shape == (4 * 10 - 2, 4 * 10 - 2)
    for stage in ("import", "load", "sample", "decode", "write"):
        assert stage in out.splitlines()[1]
    assert stub["fashion"].requests == [
        {
            "prompt": "Ankle boot!",
            "n": 16,
            "seed": 0,
            "negative_prompt": None,
            "steps": 3,
            "sampler": "ddim",
            "spacing": "trailing",
            "guidance": 2.0,
            "height": 8,
            "width": 8,
        }
    ]


def test_every_flag_reaches_the_model_and_the_png(stub: dict[str, StubModel]) -> None:
    flags = (
        "--model other --n 2 --steps 5 --sampler heun --spacing karras:rho=5 --guidance 1.5 "
        "--negative-prompt sole --height 4 --width 6 --seed 9 --out a/b.png"
    )
    assert run("generate", "boot", *flags.split()) == 0
    request = {
        "prompt": "boot",
        "negative_prompt": "sole",
        "n": 2,
        "seed": 9,
        "steps": 5,
        "sampler": "heun",
        "spacing": "karras:rho=5",
        "guidance": 1.5,
        "height": 4,
        "width": 6,
    }
    assert stub["other"].requests == [request]
    recorded = read_parameters("a/b.png")
    assert request.items() <= recorded.items()
    assert {
        "index": None,
        "grid": True,
        "model": "other",
        "model_hash": "b" * 64,
        "version": "0.1.0",
    }.items() <= recorded.items()


def test_no_grid_writes_one_png_a_picture(
    stub: dict[str, StubModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "boot", "--n", "3", "--no-grid") == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "boot-seed0.png",
        "boot-seed1.png",
        "boot-seed2.png",
    ]
    assert [read_parameters(f"boot-seed{k}.png")["index"] for k in range(3)] == [0, 1, 2]
    assert pixels("boot-seed0.png").shape == (8, 8)


def test_from_makes_a_grid_again_without_touching_the_source(stub: dict[str, StubModel]) -> None:
    assert (
        run(
            "generate",
            "boot",
            "--n",
            "5",
            "--seed",
            "3",
            "--steps",
            "7",
            "--guidance",
            "3",
            "--out",
            "boots.png",
        )
        == 0
    )
    before = Path("boots.png").read_bytes()
    assert run("generate", "--from", "boots.png") == 0
    assert np.array_equal(pixels("boots.png"), pixels("boots-again.png"))
    assert read_parameters("boots.png") == read_parameters("boots-again.png")
    assert Path("boots.png").read_bytes() == before


def test_from_makes_one_picture_of_a_request_again(stub: dict[str, StubModel]) -> None:
    assert run("generate", "boot", "--n", "3", "--no-grid") == 0
    assert run("generate", "--from", "boot-seed1.png", "--out", "again.png") == 0
    assert np.array_equal(pixels("boot-seed1.png"), pixels("again.png"))
    assert not np.array_equal(pixels("boot-seed0.png"), pixels("again.png"))
    assert read_parameters("again.png") == read_parameters("boot-seed1.png")
    assert [r["n"] for r in stub["fashion"].requests] == [3, 3]


def test_flags_win_over_the_png(stub: dict[str, StubModel]) -> None:
    assert run("generate", "boot", "--n", "2", "--seed", "3") == 0
    assert (
        run(
            "generate",
            "bag",
            "--from",
            "boot-seed3.png",
            "--steps",
            "9",
            "--no-grid",
            "--out",
            "x.png",
        )
        == 0
    )
    second = stub["fashion"].requests[1]
    assert (second["prompt"], second["n"], second["seed"], second["steps"]) == ("bag", 2, 3, 9)
    assert sorted(p.name for p in Path().iterdir()) == ["boot-seed3.png", "x-0.png", "x-1.png"]
    # another request: all of its pictures
    assert run("generate", "--from", "x-1.png", "--n", "4", "--out", "y.png") == 0
    assert sorted(p.name for p in Path().glob("y*")) == [f"y-{k}.png" for k in range(4)]


def test_from_refuses_another_model_by_default(
    stub: dict[str, StubModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "boot") == 0
    stub["fashion"] = StubModel("c" * 64)
    capsys.readouterr()
    assert run("generate", "--from", "boot-seed0.png") == 2
    err = capsys.readouterr().err
    assert "aaaaaaaaaaaa" in err and "cccccccccccc" in err and "--allow-other-model" in err
    assert not Path("boot-seed0-again.png").exists()
    assert run("generate", "--from", "boot-seed0.png", "--allow-other-model") == 0
    assert read_parameters("boot-seed0-again.png")["model_hash"] == "c" * 64


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n": "many"}, "'n'"),
        ({"steps": None}, "'steps'"),
        ({"seed": True}, "'seed'"),
        ({"index": 99}, "99"),
        ({"grid": 1}, "'grid'"),
    ],
)
def test_from_a_png_with_odd_parameters_is_explained(
    stub: dict[str, StubModel],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    word: str,
) -> None:
    assert run("generate", "boot", "--out", "a.png") == 0
    write_png("a.png", Image.new("L", (2, 2)), {**read_parameters("a.png"), **change})
    assert run("generate", "--from", "a.png") == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("older", [True, False])
def test_from_an_older_png_warns_of_settings_read_otherwise(
    stub: dict[str, StubModel], capsys: pytest.CaptureFixture[str], older: bool
) -> None:
    seed = 5 * 2**32 + 7
    assert run("generate", "a BREAK b", "--n", "1", "--seed", str(seed), "--out", "a.png") == 0
    parameters = read_parameters("a.png")
    if older:
        del parameters["packed"]
    write_png("a.png", Image.new("L", (2, 2)), parameters)
    capsys.readouterr()
    again = ("generate", "--from", "a.png", "--overwrite")
    assert run(*again, "--prompt-weights", "lerp") == 0
    lines = capsys.readouterr().err.splitlines()
    words = [
        f"--seed {seed} draws another image now, --seed 7 the one",
        "BREAK, a word of its prompt",
    ]
    assert len(lines) == 2 * older
    assert all(word in line for word, line in zip(words, lines, strict=False))
    # neither BREAK nor the seed of the file is used
    assert run(*again, "--prompt-weights", "none", "--seed", "7") == 0
    assert run(*again, "another prompt", "--prompt-weights", "lerp", "--seed", "7") == 0
    assert capsys.readouterr().err == ""


def test_from_reads_the_parameters_of_older_pngs(stub: dict[str, StubModel]) -> None:
    """Literal parameters as they were written before a field was renamed."""
    old = {
        "prompt": "boot",
        "negative_prompt": None,
        "index": None,
        "grid": True,
        "seed": 3,
        "n": 2,
        "steps": 4,
        "sampler": "ddim",
        "spacing": "trailing",
        "guidance": 1.0,
        "height": 8,
        "width": 8,
        "learned_guidance": 3.0,
        "timesteps": None,
        "model": "fashion",
        "model_hash": "a" * 64,
        "version": "0.1.0",
        "torch": "2.0.0",
        "threads": 1,
    }
    write_png("old.png", Image.new("L", (2, 2)), old)
    assert run("generate", "--from", "old.png", "--out", "again.png") == 0
    request = stub["fashion"].requests[0]
    assert (
        request["distilled_guidance"],
        request["guidance"],
        request["steps"],
        request["seed"],
    ) == (3.0, 1.0, 4, 3)
    recorded = read_parameters("again.png")
    assert recorded["distilled_guidance"] == 3.0 and "learned_guidance" not in recorded


def test_threads_are_recorded_and_used_again(stub: dict[str, StubModel]) -> None:
    cores = os.cpu_count() or 1
    assert run("generate", "boot", "--threads", str(cores)) == 0
    assert read_parameters("boot-seed0.png")["threads"] == cores
    torch.set_num_threads(1)
    assert run("generate", "--from", "boot-seed0.png") == 0
    assert torch.get_num_threads() == cores


def test_out_may_be_a_folder_or_lack_its_ending(stub: dict[str, StubModel]) -> None:
    Path("folder").mkdir()
    assert run("generate", "boot", "--n", "1", "--out", "folder") == 0
    assert run("generate", "boot", "--n", "1", "--out", "name") == 0
    assert Path("folder/boot-seed0.png").exists() and Path("name.png").exists()


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Ankle boot!", "ankle-boot"),
        (None, "sfumato"),
        ("../../etc/passwd", "etc-passwd"),
        ("été 靴", "été-靴"),
        ("...", "sfumato"),
        ("a" * 500, "a" * 100),
        ("靴" * 100, "靴" * 33),
        ("cafe\u0301 हिन्दी", "café-हिन्दी"),
        ("?!-_,", "sfumato"),
        ("-rf", "rf"),
        ("two\nlines\tand\0more", "two-lines-and-more"),
        ("boot\udcff", "boot"),
    ],
)
def test_slug_is_a_safe_file_name(prompt: str | None, name: str) -> None:
    assert slug(prompt) == name


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("generate boot --n 0", 2, "--n 0"),
        ("generate boot --n -3", 2, "--n -3"),
        ("generate boot --steps 0", 2, "--steps 0"),
        ("generate boot --height 0", 2, "--height 0"),
        ("generate boot --threads 0", 2, "--threads 0"),
        ("generate boot --seed -1", 2, "--seed=-1"),
        ("generate boot --guidance nan", 2, "guidance=nan: expected a number"),
        ("generate boot --out boot.jpg", 2, "boot.png"),
        ("generate boot --out /dev/null/boot.png", 2, "/dev/null"),
        ("generate boot --out -", 2, "--out '-' is standard output"),
        ("generate boot --out /dev/stdout", 2, "--out '/dev/stdout' is standard output"),
        ("generate boot --out=/dev/null", 2, "--out '/dev/null' is a stream or a device"),
        ("evaluate fashion --data x --out -", 2, "--out '-' is standard output"),
        ("convert fashion /dev/null", 2, "TARGET '/dev/null' is a stream or a device"),
        ("generate --from nowhere.png", 2, "nowhere.png is missing"),
        ("generate boot --allow-other-model", 2, "--from"),
        ("generate boot --sampler bogus", 2, "unknown sampler 'bogus'"),
        ("generate nan", 3, "step 2 of 3"),
        ("generate interrupt", 130, "stopped"),
        ("generate crash", 1, "unforeseen RuntimeError: deep inside (SFUMATO_DEBUG=1"),
        ("generat boot", 2, "did you mean 'generate'"),
    ],
)
def test_an_error_is_one_sentence_and_a_code(
    stub: dict[str, StubModel],
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    words: str,
) -> None:
    assert run(*arguments.split()) == code
    out, err = capsys.readouterr()
    assert words in err
    assert len(err.splitlines()) == 1 and err.startswith("sfumato: ")
    assert out == ""
    assert not list(Path().iterdir()), "nothing may be written"


@pytest.mark.parametrize(
    "arguments",
    [
        "generate boot --n many",
        "generate boot --bogus 1",
        "generate boot bag",
        "generate boot --steps",
        "",
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(
    stub: dict[str, StubModel], capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert run(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert err and "Traceback" not in err and out == ""


def test_the_traceback_is_printed_on_request(
    stub: dict[str, StubModel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_DEBUG", "1")
    assert run("generate", "crash") == 1
    assert "Traceback" in capsys.readouterr().err


# ---- train ---------------------------------------------------------------------------------------

RECIPE = """
import json
from dataclasses import asdict, dataclass

from sfumato.train import AutoencoderRecipe

@dataclass(frozen=True)
class Network:
    width: int = 4

@dataclass(frozen=True)
class Settings(AutoencoderRecipe):
    steps: int = 10
    rate: float = 1e-3
    network: Network = Network()

    def run(self, out, resume=True):
        out.mkdir(parents=True)
        values = asdict(self)
        settings = {name: values[name] for name in ("steps", "rate", "network")}
        (out / "ran.json").write_text(json.dumps([settings, resume]))
        return out

autoencoder = Settings(steps=20, network=Network(width=8))
denoiser = "not settings"
"""


@pytest.mark.parametrize("by_name", [False, True])
def test_train_runs_the_recipes_settings_with_typed_changes(
    working_folder: Path, by_name: bool
) -> None:
    Path("recipes").mkdir()
    Path("recipes/toy.py").write_text(RECIPE)
    recipe = "toy" if by_name else "recipes/toy.py"
    assert run("train", "autoencoder", recipe) == 0
    assert json.loads(Path("runs/toy/ran.json").read_text()) == [
        {"steps": 20, "rate": 1e-3, "network": {"width": 8}},
        True,
    ]
    assert (
        run(
            "train",
            "autoencoder",
            recipe,
            "--network.width",
            "2",
            "--rate",
            "0.5",
            "--no-resume",
            "--out",
            "there",
        )
        == 0
    )
    assert json.loads(Path("there/ran.json").read_text()) == [
        {"steps": 20, "rate": 0.5, "network": {"width": 2}},
        False,
    ]


def test_train_lists_the_recipes_settings(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("toy.py").write_text(RECIPE)
    assert run("train", "autoencoder", "toy.py", "--help") == 0
    out = capsys.readouterr().out
    for words in ("--network.width", "(default: 8)", "--out", "--resume, --no-resume"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train denoiser toy.py", "denoiser"),
        ("train autoencoder nowhere.py", "nowhere.py"),
        ("train autoencoder tooy", "'tooy'"),
        ("train autoencoder toy.py --steps many", "--steps"),
        ("train autoencoder toy.py --stepz 3", "--stepz"),
        ("train decoder toy.py", "decoder"),
        ("train autoencoder", "RECIPE"),
        ("train", "STAGE"),
    ],
)
def test_train_explains_errors(
    working_folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    Path("toy.py").write_text(RECIPE)
    assert run(*arguments.split()) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert not Path("runs").exists()


# ---- evaluate (its values: test_cli_model.py) ----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data d --samples 3", "--samples 3"),
        ("--data d --unconditional-samples 2", "--unconditional-samples 2"),
        ("--data d --unconditional-steps 0", "--unconditional-steps 0"),
        ("--data d --out file", "--out file"),
        ("--data nowhere --features fashion", "nowhere"),
        ("--data d --features bogus", "'bogus'"),
    ],
)
def test_evaluate_explains_errors(
    stub: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    Path("file").touch()
    assert run("evaluate", "fashion", *arguments.split()) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


# ---- info ----------------------------------------------------------------------------------------


def test_info_prints_the_description_of_the_model(
    stub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder/vae").mkdir(parents=True)
    Path("folder/vae/weights.safetensors").write_bytes(bytes(1500))
    facts = {
        "parts": {"autoencoder": {"parameters": 1234567}},
        "latent_space": {"std": (1.0, 0.5)},
        "class_names": ["boot", "bag"],
    }
    stub["folder"] = types.SimpleNamespace(
        hash="e" * 64, class_names=("boot", "bag"), describe=lambda hash: facts
    )
    assert run("info", "folder", "--hash") == 0
    out = capsys.readouterr().out
    for words in (
        "1,234,567",
        "1, 0.5",
        "boot, bag",
        "e" * 20,
        "vae/weights.safetensors",
        "1.5 kB",
    ):
        assert words in out
    assert run("info", "folder", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parts"] == facts["parts"]


@pytest.mark.parametrize("count", [20, 21, 1000])
def test_info_names_classes_where_they_are_few(
    count: int,
    working_folder: Path,
    stub: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    names = [f"kind{k}" for k in range(count)]
    Path("folder").mkdir()
    stub["folder"] = types.SimpleNamespace(
        hash="e" * 64, class_names=tuple(names), describe=lambda hash: {"class_names": names}
    )
    assert run("info", "folder") == 0
    out = capsys.readouterr().out
    few = f"{count:,} classes: kind0, kind1, kind2, ..., kind{count - 1} ("
    assert (", ".join(names) in out) == (count <= 20) and (few in out) == (count > 20)
    assert run("info", "folder", "--json") == 0
    assert json.loads(capsys.readouterr().out)["class_names"] == names


# ---- the terminal --------------------------------------------------------------------------------


def test_a_bar_is_drawn_for_a_terminal_only() -> None:
    """The same program with stderr on a pseudo-terminal and on a pipe."""
    program = """
from sfumato.cli._output import progress
with progress("sampling") as update:
    for k in range(3):
        update(k + 1, 3)
"""
    pty = pytest.importorskip("pty")
    variables = {"TERM": "xterm", "COLUMNS": "80"}
    reader, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", program], env=environment(**variables), check=True, stderr=terminal
    )
    os.close(terminal)
    assert b"sampling" in os.read(reader, 65536)
    os.close(reader)
    assert run_python("-c", program, **variables).stderr == ""


# ---- help ----------------------------------------------------------------------------------------

COMMANDS = names("cli")


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert {"generate", "train", "evaluate", "info"} <= set(COMMANDS)
    for name in COMMANDS:
        assert f"\n  {name.replace('_', '-')} " in out
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("sfumato 0.1.0")


def test_no_help_text_opens_with_a_question_word() -> None:
    """Descriptions of commands and flags are noun phrases, or begin with a verb."""
    result = []
    for file in sorted((SOURCE / "sfumato" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                first = node.value.value.split(maxsplit=1)[0].strip(",:.")
                if first in ("What", "Who", "Whose", "Whether", "How", "Where", "Which"):
                    result.append(f"{file.name}:{node.lineno}: {node.value.value.splitlines()[0]}")
    assert not result, "\n".join(result)


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)]
)
def test_help_answers_without_torch(arguments: str) -> None:
    """A fresh interpreter; the time is the processor's (other work on the machine does not count),
    the best of three.
    """
    program = f"""
import contextlib, io, json, sys, time
start = time.process_time()
from sfumato.cli import main
with contextlib.redirect_stdout(io.StringIO()) as help_text:
    try:
        code = main({arguments.split()!r})
    except SystemExit as stop:
        code = stop.code
seconds = time.process_time() - start
heavy = [m for m in ("torch", "numpy", "PIL") if m in sys.modules]
print(json.dumps([code, seconds, len(help_text.getvalue()), heavy]))
"""
    answers = [json.loads(run_python("-c", program).stdout) for _ in range(3)]
    for code, _, length, heavy in answers:
        assert code in (0, None) and length > 10
        assert heavy == []
    assert min(seconds for _, seconds, _, _ in answers) < 0.5


def test_importing_sfumato_costs_nothing() -> None:
    watched = ("torch", "numpy", "PIL", "tyro", "rich", "sfumato")
    program = (
        "import sys, sfumato; print(sorted(m for m in sys.modules if m.split('.')[0] in "
        f"{watched}))"
    )
    assert run_python("-c", program).stdout.strip() == "['sfumato']"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-u", "-m", "sfumato", "--help"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize(("steps", "packs"), [(None, False), (4, False), (5, True)])
def test_weights_are_packed_where_steps_are_enough_to_pay_for_it(
    steps: int | None, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.cli import _options

    model, packed = StubModel(), StubModel()  # whose own steps are 3
    monkeypatch.setattr(model, "optimized", lambda: packed)
    monkeypatch.setattr("sfumato.loading.load", lambda source, **reading: model)
    load = _options.RunOptions(model="somewhere").load_for_sampling
    assert load(steps) == ((packed, True) if packs else (model, False))
    for pack in (True, False):  # as an image was drawn before
        expected = (packed, True) if pack else (model, False)
        assert load(steps, pack=pack) == expected
