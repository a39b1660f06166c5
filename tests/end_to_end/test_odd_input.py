"""Odd bytes, terminals, environments, files and JSON: a result or one sentence, never a crash."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sfumato
from helpers.errors import assert_one_sentence
from helpers.models import tiny_model
from helpers.pipelines import tiny_pipeline
from helpers.processes import environment, run_python
from sfumato.checkpoints.formats.folder import WEIGHTS
from sfumato.cli import main
from sfumato.cli._options import parse
from sfumato.cli.edit import Edit
from sfumato.cli.generate import Generate
from sfumato.cli.info import Info
from sfumato.cli.interpolate import Interpolate
from sfumato.cli.train import Export
from sfumato.cli.tune_timesteps import TuneTimesteps
from sfumato.errors import NumericalError, UserError, system_error
from sfumato.io.atomic import read_json
from sfumato.io.paths import expand_user
from sfumato.io.signatures import another_kind

ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
    "PYTHONCOERCECLOCALE": "0",
}
PROGRAM = [sys.executable, "-m", "sfumato"]


# ---- terminals and environments ------------------------------------------------------------------


def start(*words: str | bytes, redirect: str = "", **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, through a shell that redirects."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *PROGRAM, *words]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode("ascii", "replace"), done.stderr.decode()


@pytest.mark.parametrize("variables", [ASCII, {"COLUMNS": "1"}, {"COLUMNS": "0"}, {"TERM": ""}])
def test_help_in_every_terminal(variables: dict[str, str]) -> None:
    code, out, err = start("generate", "--help", **variables)
    assert (code, err) == (0, "") and "--negative-prompt" in out


@pytest.mark.parametrize("variables", [{}, ASCII])
def test_a_prompt_that_is_no_text_is_refused_at_once(variables: dict[str, str]) -> None:
    code, out, err = start("generate", b"boot \xff\xfe", **variables)
    assert (code, out) == (2, "") and "prompt b'boot \\xff\\xfe' is not UTF-8 text" in err
    assert_one_sentence(UserError(err.strip()))


def test_names_that_the_terminal_cannot_show_are_escaped() -> None:
    code, _, err = start("stiefel-ö", **ASCII)
    assert code == 2 and "unknown command 'stiefel-\\u" in err.replace("\\udc", "\\u")
    code, _, err = start(b"\xff")
    assert code == 2 and "unknown command" in err


@pytest.mark.parametrize(
    ("redirect", "code", "words"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 2, "the output, cannot be read or written (No space left on device)"),
    ],
)
def test_streams_that_are_closed_or_full(redirect: str, code: int, words: str) -> None:
    for arguments in (["--help"], ["info", "--help"], ["--version"]):
        status, _, err = start(*arguments, redirect=redirect)
        assert status == code and words in err and len(err.splitlines()) == bool(words)


def test_texts_are_utf8_in_a_locale_of_another_encoding() -> None:
    """ASCII's locale hands the bytes over as surrogates."""
    words = ["b\udcc3\udcb6", "--negative-prompt", "\udce2\udc98\udc83", "--model", "m\udcff"]
    options = parse(Generate, words, "generate")
    assert (options.prompt, options.negative_prompt) == ("bö", "☃")
    assert options.model == "m\udcff", "paths stay as the system writes them"


# ---- dashes --------------------------------------------------------------------------------------


def test_texts_that_begin_with_a_dash() -> None:
    for flag, value in (
        ("--negative-prompt", "-blurry"),
        ("--negative-prompt", "--ugly, blurry"),
        ("--negative-prompt", "-1 stars"),
        ("--negative-prompt", "- rain"),
        ("--out", "-out.png"),
        ("--from", "-in.png"),
        ("--sampler", "-x"),
    ):
        parsed = vars(parse(Generate, [flag, value, "--n", "2"], "generate"))
        name = {"--from": "source"}.get(flag, flag[2:].replace("-", "_"))
        assert str(parsed[name]) == value and parsed["n"] == 2
    assert parse(Generate, ["--n", "2", "--", "-5 boots"], "generate").prompt == "-5 boots"
    assert parse(Generate, ["--seed", "3", "--", "--n"], "generate").prompt == "--n"
    assert parse(Generate, ["--negative-prompt=--ugly"], "generate").negative_prompt == "--ugly"
    assert parse(Edit, ["a.png", "--", "-b"], "edit").prompt == "-b"
    assert parse(Generate, ["--timesteps", "1", "-0.5", "--n", "2"], "generate").n == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-blurry"], "after --, as in: sfumato generate ... -- '-blurry'"),
        (["--ugly, blurry"], "after --, as in: sfumato generate ... -- '--ugly, blurry'"),
        (["--negative-prompt", "--ugly"], "write --negative-prompt=--ugly if it is the text"),
    ],
)
def test_a_dash_that_cannot_be_understood_says_how_to_write_it(
    words: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        parse(Generate, words, "generate")
    assert_one_sentence(caught.value, message)


@pytest.mark.parametrize(("kind", "command"), [(Info, "info"), (TuneTimesteps, "tune-timesteps")])
def test_a_dash_of_a_command_without_a_prompt(kind: type, command: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(kind, ["-blurry"], command)
    assert_one_sentence(caught.value, f"`sfumato {command} --help` lists the flags")
    assert "prompt" not in str(caught.value)


def test_help_in_place_of_a_value() -> None:
    """It is no value, as other flags are none."""
    for flag in ("-h", "--help"):
        with pytest.raises(UserError, match=r"--negative-prompt has no value.* --help` expl"):
            parse(Generate, ["--negative-prompt", flag], "generate")


@pytest.mark.parametrize(
    ("line", "start", "expected"),
    [
        ("generate --negative-prompt --n 3", "--negative-prompt has no value", "a text"),
        ("generate --negative-prompt", "--negative-prompt has no value", "a text"),
        ("generate --out --grid", "--out has no value", "a text"),
        ("generate --sampler --no-grid", "--sampler has no value", "a text"),
        ("generate bag --memory --n 2", "--memory has no value", "a size such as 3GB;"),
        ("generate bag --guidance high", "--guidance 'high': expected a number, the", "'high'"),
        ("generate bag --n -- 3", "--n has no value", "a whole number;"),
        ("generate bag --seed 1e3", "--seed '1e3'", "a whole number or random"),
        ("generate bag --seed -1", "--seed=-1", "a whole number from 0 to 2^64 - 1"),
        ("generate bag --n 1.5", "--n '1.5'", "a whole number;"),
        ("generate bag --steps= --n 2", "--steps ''", "a whole number;"),
        ("generate bag --steps None", "--steps 'None'", "a whole number;"),
        ("generate bag --distilled_guidance high", "--distilled-guidance 'high'", "a number;"),
        ("generate bag --timesteps 3 x", "--timesteps 'x'", "a number"),
        ("generate bag --dtype int8", "--dtype 'int8'", "fp32, bf16 or fp16;"),
        ("generate bag --dtype FP16", "--dtype 'FP16'", "did you mean fp16? "),
        ("generate bag --grid=3", "'--grid=3'", "write --grid, or --no-grid"),
        ("upscale --steps 3", "IMAGE is missing", "sfumato upscale IMAGE ..."),
        ("convert a", "TARGET is missing", "sfumato convert SOURCE TARGET ..."),
        ("evaluate", "MODEL and --data TEXT are missing", "sfumato evaluate MODEL --data TEXT"),
        ("info --clip-skip x", "--clip-skip 'x'", "a whole number;"),
        ("outpaint a.png --left a", "--left 'a'", "a whole number;"),
        ("tune-timesteps fashion --steps 3 x", "--steps 'x'", "a whole number;"),
        ("train mode fashion_mnist", "STAGE 'mode'", "autoencoder or denoiser;"),
        ("train export", "RUN is missing", "sfumato train export RUN ..."),
        ("train denoiser fashion_mnist --loop.lr abc", "--loop.lr 'abc'", "a number;"),
        ("train denoiser fashion_mnist --out --batch-size", "--out has no value", "a path;"),
        ("train denoiser fashion_mnist --data.on-error x", "--data.on-error 'x'", "raise or skip"),
    ],
)
def test_values_that_do_not_parse(
    line: str, start: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that begins with the setting and its value, not the parser's box."""
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    sentence = err.splitlines()[-1]
    assert sentence.startswith(f"sfumato: {start}") and expected in sentence, err
    assert not out and not any("\u2500" <= sign <= "\u257f" for sign in err)
    assert len(err.splitlines()) == 1 + line.startswith("train denoiser"), "its recipe is named"


# ---- errors of the system ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b cannot be read or written (Perm"),
        (OSError(36, "File name too long", "x" * 9), "(File name too long)"),
        (OSError("no usable temporary folder"), "(no usable temporary folder)"),
        (UnicodeEncodeError("ascii", "ö", 0, 1, "ordinal not in range"), "PYTHONUTF8=1"),
        (MemoryError(), "the memory does not suffice (none is left)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "fewer images"),
        (torch.OutOfMemoryError("CUDA out of memory."), "fewer images"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "fewer images"),
    ],
)
def test_errors_of_the_system_are_explained(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("sfumato.cli.info.info", fail)
    assert main(["info"]) == 2
    err = capsys.readouterr().err
    assert words in err and "unforeseen" not in err
    assert_one_sentence(UserError(err.removeprefix("sfumato: ").strip()))


def test_other_errors_are_not_taken_for_the_systems() -> None:
    for error in (RuntimeError("deep inside"), UserError("a: b"), KeyboardInterrupt(), KeyError()):
        assert system_error(error) is None


def test_the_home_folder_of_nobody() -> None:
    with pytest.raises(UserError, match="~nobody-of-this-name/m begins with a home folder"):
        expand_user("~nobody-of-this-name/m")
    assert expand_user("~/m") == Path.home() / "m" and expand_user("a~b") == Path("a~b")


def test_the_home_folder_in_a_flag(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves ~ in --out=~/a: what is checked is what is written."""
    home = working_folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert main(["train", "copy", "photographs", "--out=~/mine.py"]) == 0
    assert (home / "mine.py").is_file() and not Path("~").exists()
    options = parse(Interpolate, ["--images", "~/a.png", "b.png"], "interpolate")
    assert options.images == (home / "a.png", Path("b.png"))
    assert parse(Export, ["~/run"], "train export").run == home / "run"
    assert main(["train", "copy", "photographs", "--out=~nobody-x/mine.py"]) == 2
    assert "home folder that is not known" in capsys.readouterr().err


# ---- files of another kind -----------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KINDS: dict[str, tuple[bytes, str]] = {
    "LFS": (LFS, "it is a pointer of Git LFS, not the file itself: run `git lfs pull`"),
    "annex": (b"/annex/objects/SHA256E-s1--1.safetensors\n", "git annex get"),
    "empty": (b"", "it is an empty file"),
    "page": (b"\n<!DOCTYPE html><html><title>Log in</title>", "it is a web page"),
    "old page": (b"<HTML><BODY>", "it is a web page"),
    "cloud storage": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "it is a web page"),
    "message": (b"Invalid username or password.", "that begins 'Invalid username or password.'"),
    "message in another language": (
        "Zugriff verweigert: Passwort ungültig".encode(),
        "a text that",
    ),
    "JSON": (b'{"error":"Repository not found"}', "perhaps a server's message"),
    "zip": (b"PK\x03\x04" + bytes(140), "it is a zip archive: unpack it"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "it is a gzip archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5 file (Keras, TensorFlow)"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "it is an ONNX model"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(40), "it is a PNG image: "),
    "tar": (b"a" * 5 + bytes(252) + b"ustar", "it is a tar archive"),
    "pickle": (b"\x80\x02}q\x00.", "it is a pickle of torch"),
    "zeros": (bytes(900), "begins with zeros alone"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sound"
    tiny_model().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_bytes_tell_the_kind_of_a_file(kind: str, folder: Path, tmp_path: Path) -> None:
    """Whatever its name says, and wherever it lies."""
    content, words = KINDS[kind]
    weights = folder / "unet" / WEIGHTS
    others = [f"one{ending}" for ending in (".safetensors", ".ckpt", ".gguf", ".onnx", "")]
    for name in others[2:] if kind == "pickle" else others:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            sfumato.load(tmp_path / name)
        if not (kind == "message" and name.endswith(".ckpt")):
            assert_one_sentence(caught.value, tmp_path / name, words)
    weights.write_bytes(content)
    with pytest.raises(UserError) as caught:
        sfumato.load(folder)
    assert_one_sentence(caught.value, weights, words)
    if kind in ("LFS", "empty", "page", "gzip", "PNG"):
        config = folder / "vae" / "config.json"
        config.write_bytes(content)
        with pytest.raises(UserError) as caught:
            sfumato.load(folder)
        assert_one_sentence(caught.value, config, words)


def test_the_remedy_fits_the_kind_that_was_expected(tmp_path: Path) -> None:
    """The first bytes of every kind under names of weights, texts and images."""
    place = tmp_path / "one"
    for start, name, remedies in (
        (KINDS["PNG"][0], "a PNG image", ("give model weights", "download it again", None)),
        (KINDS["pickle"][0], "a pickle of torch", (".ckpt", "download it again", "give an image")),
        (KINDS["HDF5"][0], "an HDF5 file", ("convert it", "download it again", "give an image")),
        (KINDS["zip"][0], "a zip archive", ("unpack it first",) * 3),
        (b"PAR1", "a Parquet table", ("give model weights", "download it again", "a data set")),
    ):
        place.write_bytes(start)
        for expected, remedy in zip(("weights", "text", "image"), remedies, strict=True):
            kind = another_kind(place, expected)
            assert remedy is None or (kind is not None and f"is {name}" in kind and remedy in kind)


def test_sound_files_under_wrong_names_open(folder: Path, tmp_path: Path) -> None:
    """Safetensors, wherever weights may lie: it runs no code."""
    expected = sfumato.load(folder).hash
    tiny_model().save(tmp_path / "one.safetensors")
    for ending in (".ckpt", ".gguf", ".txt"):
        copy = shutil.copy(tmp_path / "one.safetensors", tmp_path / f"one{ending}")
        assert sfumato.load(copy).hash == expected
        assert another_kind(copy) == (
            "it is a safetensors file: give it a name that ends in .safetensors"
        )
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert sfumato.load(folder).hash == expected


def test_json_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + '{"name": "ö"}'.encode())
    assert read_json(file) == {"name": "ö"}
    for content in (
        "[" * 100000,
        "1" * 5000,
        "{'a': 1}",
        '{"a": 1}'.encode("utf-16").decode("latin-1"),
    ):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="is not valid JSON") as caught:
            read_json(file)
        assert_one_sentence(caught.value, file)


def test_places_that_are_no_files(folder: Path, tmp_path: Path) -> None:
    """Folders, loops of links, pipes, names that are too long: none hangs, none crashes."""
    weights = folder / "unet" / WEIGHTS
    weights.unlink()
    weights.mkdir()
    with pytest.raises(UserError, match=r"is a folder|has no weights"):
        sfumato.load(folder)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "gone")
    names = ["loop", "pipe", "dangling.safetensors", "x" * 5000, "a\nb", "/dev/null", "~nobody-x/m"]
    for name in names:
        place = name if name.startswith(("/", "~")) else str(tmp_path / name)
        assert main(["info", place]) == 2
        assert main(["convert", place, str(tmp_path / "new")]) == 2


# ---- JSON ----------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, [], {}, "x", "", -1, 0, 1, 2.5, 1e300, float("nan"), float("inf"), 10**30, True),
    *(["x"], [0], [None], [[1]], {"a": 1}, "\ud800", "a\0b", "é" * 300, [[[[[[]]]]]], 2**63),
    *([1, 2, 3], "../x", {"_class_name": [1]}, 64, ["my_pipeline", "MyPipeline"]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON."""
    yield path
    inside = dict(enumerate(value)) if isinstance(value, list) else value
    for key, part in inside.items() if isinstance(inside, dict) else ():
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON with another value in one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def models(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("fuzzed")
    for kind in ("SD 1", "SDXL"):
        tiny_pipeline(kind).save_pretrained(place / kind)
    shutil.copytree(saved, place / "own")
    return {kind: place / kind for kind in ("own", "SD 1", "SDXL")}


@pytest.mark.parametrize("kind", ["own", "SD 1", "SDXL"])
def test_any_value_anywhere_in_a_models_json(kind: str, models: dict[str, Path]) -> None:
    """The model opens and draws, or one sentence says why it does not."""
    folder, dice = models[kind], random.Random(kind)
    files = [f for f in sorted(folder.rglob("*.json")) if f.stat().st_size < 10000]
    prompt, opened = None if kind == "own" else "a cat", 0
    for _ in range(25):
        file = dice.choice(files)
        whole = file.read_bytes()
        values = json.loads(whole)
        path, new = dice.choice(list(places(values))), dice.choice(VALUES)
        file.write_text(json.dumps(changed(values, path, new)))
        try:
            sfumato.load(folder).generate(prompt, steps=1, output="latent")
            opened += 1
        except (UserError, NumericalError) as error:
            assert "\n" not in str(error), (file, path, new)
        except Exception as error:
            raise AssertionError(f"{file} {path} {new!r}: {error!r}") from error
        finally:
            file.write_bytes(whole)
    assert opened < 25
    sfumato.load(folder).generate(prompt, steps=1, output="latent")


def test_a_pipeline_of_the_community(models: dict[str, Path], tmp_path: Path) -> None:
    """Its class is [file, class]; the parts are those of the model all the same."""
    folder = Path(shutil.copytree(models["SD 1"], tmp_path / "model"))
    expected = sfumato.load(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in (["my_pipeline", "StableDiffusionPipeline"], ["my_pipeline", "MyPipeline"]):
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        model = sfumato.load(folder)
        assert (model.hash, model.defaults) == (expected.hash, expected.defaults)
        assert main(["info", str(folder)]) == 0


def test_output_before_an_error_of_the_system_is_kept() -> None:
    program = """
import sys
from sfumato import cli
def fail(words):
    print("before")
    raise PermissionError(13, "Permission denied", "/a")
cli._dispatch = fail
sys.exit(cli.main([]))
"""
    done = run_python("-c", program, check=False)
    assert (done.returncode, done.stdout) == (2, "before\n")
    assert "/a cannot be read or written" in done.stderr
