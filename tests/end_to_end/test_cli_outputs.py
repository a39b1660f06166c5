"""The files of a run: none replaces an older one unless --overwrite says so, whichever command
writes it, and every name that a shell lets through is a file, a folder or one sentence.
"""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.images import pixels
from sfumato.cli import main
from sfumato.cli._output import target, write_image
from sfumato.errors import UserError
from sfumato.images import read_parameters, write_png
from sfumato.io.atomic import NotWritten

RUN = ("--steps", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "boot", "--n", "2", *RUN),
    "generate --no-grid": ("generate", "boot", "--n", "2", "--no-grid", *RUN),
    "edit": ("edit", "photo.png", "boot", "--strength", "1", *RUN),
    "edit --n 2": ("edit", "photo.png", "boot", "--strength", "1", "--n", "2", *RUN),
    "inpaint": ("inpaint", "photo.png", "boot", "--mask", "mask.png", *RUN),
    "outpaint": ("outpaint", "photo.png", "boot", "--left", "4", *RUN),
    "upscale": ("upscale", "photo.png", "boot", "--scale", "1", "--strength", "1", *RUN),
    "vary": ("vary", "photo.png", "boot", "--n", "2", "--strength", "1", *RUN),
    "interpolate": ("interpolate", "boot", "bag", "--n", "2", *RUN),
    "interpolate --no-grid": ("interpolate", "boot", "bag", "--n", "2", "--no-grid", *RUN),
}
FILES = {
    "generate": ["boot-seed3.png"],
    "generate --no-grid": ["boot-seed3.png", "boot-seed4.png"],
    "edit": ["photo-edit-seed3.png"],
    "edit --n 2": ["photo-edit-seed3.png", "photo-edit-seed4.png"],
    "inpaint": ["photo-inpaint-seed3.png"],
    "outpaint": ["photo-outpaint-seed3.png"],
    "upscale": ["photo-upscale-seed3.png"],
    "vary": ["photo-vary-seed3.png"],
    "interpolate": ["boot-interpolate-seed3.png"],
    "interpolate --no-grid": ["boot-interpolate-seed3-0.png", "boot-interpolate-seed3-1.png"],
}


@pytest.fixture(autouse=True)
def pictures(working_folder: Path) -> None:
    Image.effect_noise((16, 16), 60).save("photo.png")
    Image.new("L", (16, 16), 255).save("mask.png")


def contents() -> dict[str, bytes]:
    """The files of the current folder, without the inputs."""
    files = {str(p): p.read_bytes() for p in sorted(Path().rglob("*")) if p.is_file()}
    return {k: v for k, v in files.items() if k not in ("photo.png", "mask.png")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_leaves_the_images_of_the_first(
    tiny: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMANDS[name], "--model", str(tiny), "--seed", "3"]
    assert main(command) == 0
    first = contents()
    assert list(first) == FILES[name]
    assert capsys.readouterr().out.splitlines()[: len(first)] == FILES[name]
    assert main([*command, "--guidance", "3"]) == 0
    second = [name.replace(".png", "-2.png") for name in FILES[name]]
    assert capsys.readouterr().out.splitlines()[: len(first)] == second
    assert contents() == first | {name: Path(name).read_bytes() for name in second}
    assert main([*command, "--guidance", "3", "--overwrite"]) == 0
    after = contents()
    assert list(after) == sorted([*FILES[name], *second])
    for old, new in zip(FILES[name], second, strict=True):
        assert after[old] != first[old] and np.array_equal(pixels(old), pixels(new))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_is_taken_is_refused_before_the_model_is_opened(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("a.png", "a-1.png"):
        Path(file).write_bytes(b"older")
    command = [*COMMANDS[name], "--model", "there is none", "--out", "a.png"]
    assert main(command) == 2
    several = len(FILES[name]) > 1
    taken = "a-1.png" if several else "a.png"
    assert capsys.readouterr().err == (
        f"sfumato: {taken} exists and is left as it is: choose another --out, "
        "or add --overwrite to replace it\n"
    )
    assert main([*command, "--overwrite"]) == 2
    assert "model 'there is none' was not found" in capsys.readouterr().err
    assert contents() == {"a.png": b"older", "a-1.png": b"older"}


def test_an_image_drawn_again_has_a_name_of_its_own(tiny: Path) -> None:
    assert main([*COMMANDS["generate"], "--model", str(tiny), "--out", "a.png"]) == 0
    for _ in range(2):
        assert main(["generate", "--from", "a.png"]) == 0
    assert list(contents()) == ["a-again-2.png", "a-again.png", "a.png"]
    assert main(["generate", "--from", "a.png", "--out", "a.png"]) == 2


def test_prompts_of_one_name_do_not_meet(tiny: Path) -> None:
    run = ("--model", str(tiny), "--n", "1", *RUN)
    for prompt in ("bag", "Bag", None):
        words = [] if prompt is None else [prompt]
        assert main(["generate", *words, *run]) == 0
    assert list(contents()) == ["bag-seed0-2.png", "bag-seed0.png", "sfumato-seed0.png"]


PLACES = [
    ("new/", "new/x-seed0.png"),
    ("a/b/c.d/", "a/b/c.d/x-seed0.png"),
    ("there.png/", "there.png/x-seed0.png"),
    ("folder", "folder/x-seed0.png"),
    ("folder.png", "folder.png/x-seed0.png"),
    (".", "x-seed0.png"),
    ("./", "x-seed0.png"),
    ("folder/..", "folder/../x-seed0.png"),
    ("name", "name.png"),
    ("v1.5", "v1.5.png"),
    ("a.b.c", "a.b.c.png"),
    ("NAME.PNG", "NAME.PNG"),
    ("new/name.png", "new/name.png"),
    ("new/靴", "new/靴.png"),
    ("name ", "name .png"),
]


@pytest.mark.parametrize(("out", "file"), PLACES)
def test_a_name_is_a_file_or_a_folder(out: str, file: str) -> None:
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    chosen = target(out, "x", seed=0).files(1, several=False)
    assert [os.fspath(path) for path in chosen] == [file]
    written = write_image(chosen[0], Image.new("L", (2, 2)), {}, overwrite=False)
    assert written.is_file() and os.fspath(written) == file


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("a.jpg", "a.jpg ends in .jpg: images are written as PNG"),
        ("a.b.WEBP", "name it a.b.png"),
        ("photo.png/", "photo.png is not a folder"),
        ("photo.png/a.png", "photo.png is not a folder"),
        ("a" * 230, "has a name of 234 bytes: expected at most 220"),
        ("靴" * 75, "bytes: expected at most 220"),
        ("a" * 300 + "/b.png", "cannot be used (File name too long)"),
        ("pipe", "pipe.png is not a file"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_one_sentence(out: str, words: str) -> None:
    os.mkfifo("pipe.png")
    with pytest.raises(UserError, match=re.escape(words)):
        target(out, "x")


def test_long_names_of_inputs_are_cut(tiny: Path) -> None:
    name = "a" * 240 + ".png"
    Path("photo.png").rename(name)
    assert main(["edit", name, "boot", "--strength", "1", *RUN, "--model", str(tiny)]) == 0
    assert Path("a" * 100 + "-edit-seed0.png").is_file()


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("link", [os.link, no_links], ids=["links", "no links"])
def test_processes_at_the_same_name_lose_nothing(
    link: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that looked free and is taken when the file is written, as by another process."""
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    written = [
        write_image(Path("a.png"), Image.new("L", (2, 2), k), {"k": k}, overwrite=False)
        for k in range(3)
    ]
    assert [str(path) for path in written] == ["a.png", "a-2.png", "a-3.png"]
    assert [read_parameters(path)["k"] for path in written] == [0, 1, 2]
    assert list(contents()) == ["a-2.png", "a-3.png", "a.png"], "nothing is left over"
    write_image(Path("a.png"), Image.new("L", (2, 2), 9), {"k": 9}, overwrite=True)
    assert read_parameters("a.png")["k"] == 9


@pytest.mark.parametrize("name", ["generate", "edit", "interpolate"])
def test_a_random_seed_is_printed_and_recorded(
    tiny: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMANDS[name], "--model", str(tiny)]
    assert main([*command, "--seed", "random", "--out", "a.png"]) == 0
    match = re.search(r"images? from seed (\d+) in", capsys.readouterr().out)
    assert match is not None and read_parameters("a.png")["seed"] == int(match[1])
    assert main([*command, "--seed", match[1], "--out", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert main([*command, "--seed", "random", "--out", "c.png"]) == 0
    assert read_parameters("c.png")["seed"] != int(match[1])


def test_reports_and_models_of_earlier_runs_are_left(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there is none-evaluation").mkdir()
    Path("there is none-evaluation/report.json").write_text(json.dumps({}))
    assert main(["evaluate", "there is none", "--data", "nowhere"]) == 2
    assert "report.json is the report of an earlier run" in capsys.readouterr().err
    assert main(["evaluate", "there is none", "--data", "nowhere", "--overwrite"]) == 2
    assert "model 'there is none' was not found" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/model_index.json").write_text("{}")
    assert main(["tune-timesteps", str(tiny), "--out", "other"]) == 2
    assert "--out other exists and is left as it is" in capsys.readouterr().err
    assert Path("other/model_index.json").read_text() == "{}"


def test_a_write_where_a_file_has_the_name_of_the_folder_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Path] = []

    def write(path: Path, *rest: Any, **options: Any) -> Path:
        tried.append(path)
        assert len(tried) < 5
        return write_png(path, *rest, **options)

    Path("folder").write_bytes(b"")
    monkeypatch.setattr("sfumato.images.write_png", write)
    for overwrite in (False, True):
        tried.clear()
        with pytest.raises(NotWritten, match="folder is not a folder"):
            write_image(Path("folder/a.png"), Image.new("L", (2, 2)), {}, overwrite)
        assert tried == [Path("folder/a.png")]


def test_a_model_in_the_home_folder_is_left(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell does not expand --out=~/model."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("model").mkdir()
    Path("model/model_index.json").write_text("{}")
    assert (
        main(["tune-timesteps", str(tiny), "--steps", "2", "--images", "2", "--out=~/model"]) == 2
    )
    assert f"--out {Path.cwd() / 'model'} exists and is left" in capsys.readouterr().err
