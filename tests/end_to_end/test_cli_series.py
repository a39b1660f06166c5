"""Variations, series and the hand-over to a second model on the command line.

They are the library's tasks, recorded in their PNGs, or one sentence.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.images import pixels
from sfumato.cli import main
from sfumato.images import grid, read_parameters
from sfumato.loading import load
from sfumato.sampling import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.interpolate import interpolate, interpolate_images
from sfumato.tasks.refine import refine
from sfumato.tasks.variations import variations


@pytest.fixture(autouse=True)
def pictures(working_folder: Path) -> None:
    """A fresh current folder with two pictures of one size and one of another."""
    numbers = np.random.default_rng(0)
    for name, size in (("a", (16, 20)), ("b", (16, 20)), ("c", (16, 16))):
        Image.fromarray(numbers.integers(0, 256, size, np.uint8)).save(f"{name}.png")


def run(*words: str, model: Path) -> int:
    return main([*words, "--model", str(model)])


# ---- variations ----------------------------------------------------------------------------------


def test_variations_of_a_seed_and_the_same_again(tiny: Path) -> None:
    arguments = ("generate", "boot", "--seed", "7", "--n", "3", "--no-grid")
    assert (
        run(
            *arguments,
            "--variation-strength",
            "0.3",
            "--variation-seed",
            "50",
            "--out",
            "v.png",
            model=tiny,
        )
        == 0
    )
    assert run(*arguments, "--variation-strength", "0", "--out", "zero.png", model=tiny) == 0
    assert (
        run(
            *arguments,
            "--variation-strength",
            "1",
            "--variation-seed",
            "50",
            "--out",
            "one.png",
            model=tiny,
        )
        == 0
    )
    assert run("generate", "boot", "--seed", "7", "--n", "1", "--out", "own.png", model=tiny) == 0
    assert (
        run(
            "generate",
            "boot",
            "--seed",
            "50",
            "--n",
            "3",
            "--no-grid",
            "--out",
            "others.png",
            model=tiny,
        )
        == 0
    )
    for k in range(3):
        own, varied, other = pixels("own.png"), pixels(f"v-{k}.png"), pixels(f"others-{k}.png")
        assert np.array_equal(pixels(f"zero-{k}.png"), own) and np.array_equal(
            pixels(f"one-{k}.png"), other
        )
        assert 0 < np.abs(varied - own).mean() < np.abs(other - own).mean()
    noted = read_parameters("v-1.png")
    assert (
        noted["seed"],
        noted["variation_seed"],
        noted["variation_strength"],
        noted["index"],
    ) == (7, 50, 0.3, 1)
    assert read_parameters("zero-0.png")["variation_seed"] == 8
    assert "variation_strength" not in read_parameters("own.png")
    assert main(["generate", "--from", "v-1.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("v-1.png"))


def test_variations_of_a_picture(tiny: Path) -> None:
    model, words = load(tiny).optimized(), Request("boot", n=4, steps=10)
    for way, more in (("noise", ["--strength", "0.5"]), ("inversion", ["--way", "inversion"])):
        assert (
            run("vary", "a.png", "boot", "--steps", "10", *more, "--out", f"{way}.png", model=tiny)
            == 0
        )
        request = variations(
            model, Image.open("a.png"), words, strength=0.5 if way == "noise" else 0.3, way=way
        )
        assert np.array_equal(pixels(f"{way}.png"), pixels(grid(model.run(request))))
        noted = read_parameters(f"{way}.png")
        assert (noted["task"], noted["way"], noted["picture"], noted["strength"]) == (
            "vary",
            way,
            "a.png",
            0.5 if way == "noise" else 0.3,
        )
    assert main(["generate", "--from", "noise.png"]) == 2


# ---- series --------------------------------------------------------------------------------------


def cells(path: str, count: int, columns: int, width: int, height: int) -> list[np.ndarray]:
    sheet = pixels(path)
    assert sheet.shape == ((height + 2) * (-(-count // columns)) - 2, (width + 2) * columns - 2)
    places = [(k // columns * (height + 2), k % columns * (width + 2)) for k in range(count)]
    return [sheet[y : y + height, x : x + width] for y, x in places]


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["boot", "bag"], {"to_prompt": "bag"}),
        (["boot", "--to-seed", "9"], {"to_seed": 9}),
        (["boot", "bag", "--to-seed", "9"], {"to_prompt": "bag", "to_seed": 9}),
    ],
)
def test_a_series_is_a_row_from_one_plain_picture_to_the_other(
    words: list[str], ends: dict[str, Any], tiny: Path
) -> None:
    model = load(tiny).optimized()
    assert run("interpolate", *words, "--n", "6", "--seed", "3", "--out", "s.png", model=tiny) == 0
    row = cells("s.png", 6, 6, 16, 16)
    for result, prompt, seed in (
        (row[0], "boot", 3),
        (row[-1], ends.get("to_prompt", "boot"), ends.get("to_seed", 3)),
    ):
        assert np.array_equal(result, pixels(model.generate(prompt, seed=seed)[0]))
    away = [float(np.abs(one - row[0]).mean()) for one in row]
    assert all(a < b for a, b in pairwise(away)), away
    expected = model.run(interpolate(Request("boot", n=6, seed=3), **ends))
    assert all(np.array_equal(one, pixels(other)) for one, other in zip(row, expected, strict=True))
    noted = read_parameters("s.png")
    assert (
        noted["task"] == "interpolate" and {k: noted[k] for k in ends} == ends and noted["n"] == 6
    )


def test_a_series_between_pictures(tiny: Path) -> None:
    model, words = load(tiny).optimized(), Request("boot", n=12, steps=10)
    assert (
        run(
            "interpolate",
            "boot",
            "--images",
            "a.png",
            "b.png",
            "--steps",
            "10",
            "--strength",
            "0.3",
            "--n",
            "12",
            model=tiny,
        )
        == 0
    )
    result = cells("a-interpolate-seed0.png", 12, 4, 20, 16)  # too many for one row
    for one, name in ((result[0], "a.png"), (result[-1], "b.png")):
        request = image_to_image(model, Image.open(name), replace(words, n=1), strength=0.3)
        assert np.array_equal(one, pixels(model.run(request)[0]))
    noted = read_parameters("a-interpolate-seed0.png")
    assert (noted["picture"], noted["to_picture"], noted["strength"], noted["way"]) == (
        "a.png",
        "b.png",
        0.3,
        "noise",
    )
    arguments = [
        "--images",
        "a.png",
        "b.png",
        "--steps",
        "10",
        "--way",
        "inversion",
        "--n",
        "3",
        "--no-grid",
        "--out",
        "i.png",
    ]
    assert run("interpolate", "boot", *arguments, model=tiny) == 0
    expected = model.run(
        interpolate_images(
            model, Image.open("a.png"), Image.open("b.png"), replace(words, n=3), way="inversion"
        )
    )
    assert all(np.array_equal(pixels(f"i-{k}.png"), pixels(one)) for k, one in enumerate(expected))


# ---- two models ----------------------------------------------------------------------------------


def test_a_second_model_finishes(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny).optimized()
    other = replace(model, defaults=replace(model.defaults, steps=7, guidance=3.0))
    for parameter in other.denoiser.network.parameters():
        parameter.data.mul_(1.1)
    other.save(tmp_path / "second")
    arguments = ("generate", "boot", "--n", "2", "--steps", "10", "--seed", "3")
    assert (
        run(*arguments, "--refiner", "second", "--handover", "0.6", "--out", "r.png", model=tiny)
        == 0
    )
    model = load(tiny).optimized()
    request = refine(
        model, load("second"), Request("boot", n=2, steps=10, seed=3, guidance=2.0), at=0.6
    )
    assert np.array_equal(pixels("r.png"), pixels(grid(load("second").run(request))))
    noted = read_parameters("r.png")
    assert (noted["refiner"], noted["handover"], noted["refiner_hash"]) == (
        "second",
        0.6,
        load("second").hash,
    )
    assert main(["generate", "--from", "r.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("r.png"))
    assert (
        run(*arguments, "--refiner", str(tiny), "--out", "self.png", model=tiny) == 0
        and run(*arguments, "--out", "plain.png", model=tiny) == 0
    )
    assert np.array_equal(pixels("self.png"), pixels("plain.png")), (
        "a model finishes its own pictures as it would anyway"
    )
    assert read_parameters("self.png")["handover"] == 0.8
    model.save("second")
    assert main(["generate", "--from", "r.png", "--out", "other.png"]) == 2, (
        "another refiner has taken its place"
    )


# ---- refused arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--variation-seed", "3"], "--variation-seed 3 without --variation-strength"),
        (
            ["generate", "--variation-strength", "1.5"],
            "--variation-strength 1.5: expected a number from 0",
        ),
        (["generate", "--variation-strength", "nan"], "--variation-strength nan"),
        (
            ["generate", "--variation-strength", "0.5", "--variation-seed", str(2**64)],
            "--variation-seed=18446744073709551616: expected a whole number from 0 to 2^64",
        ),
        (["generate", "--handover", "0.5"], "--handover 0.5 without --refiner"),
        (
            ["generate", "--refiner", "SELF", "--handover", "1"],
            "--handover 1.0: expected a number above 0 and below 1",
        ),
        (["generate", "--refiner", "SELF", "--handover", "0.99"], "leaves the second model none"),
        (["generate", "--refiner", "gone"], "model 'gone' was not found"),
        (["generate", "--refiner", "fashion"], "expected two models of one latent space"),
        (["generate", "boot", "--prompt-2", "bag"], "this model has no second text encoder"),
        (
            ["generate", "boot", "--negative-prompt-2", "bag"],
            "this model has no second text encoder",
        ),
        (["edit", "a.png", "boot", "--prompt-2", "bag"], "this model has no second text encoder"),
        (
            ["edit", "a.png", "boot", "--image-guidance", "2"],
            "this model was not trained for instructions",
        ),
        (["upscale", "a.png", "boot", "--noise-level", "2"], "this model is no upscaler"),
        (["vary", "gone.png"], "gone.png is missing: expected an image"),
        (["vary", "a.png", "--strength", "0"], "strength=0.0: expected a number in (0, 1]"),
        (
            ["vary", "a.png", "--strength", "-1", "--way", "inversion"],
            "strength=-1.0: expected a number in [0, 1]",
        ),
        (
            ["vary", "a.png", "--way", "magic"],
            "unknown way 'magic': expected one of inversion, noise",
        ),
        (["vary", "a.png", "--way", "inversion", "--sampler", "heun"], "expected ddim"),
        (["vary", "a.png", "cat", "--strength", "0.5"], "unknown class 'cat'"),
        (
            ["interpolate", "boot"],
            "nothing to go to: give a second prompt, --to-seed or --images",
        ),
        (["interpolate", "boot", "cat"], "unknown class 'cat'"),
        (
            ["interpolate", "boot", "bag", "--n", "1"],
            "--n 1 is too small: expected a whole number of at least 2",
        ),
        (
            ["interpolate", "boot", "--to-seed", "-1"],
            "--to-seed=-1: expected a whole number from 0",
        ),
        (["interpolate", "boot", "bag", "--strength", "0.5"], "--strength 0.5 without --images"),
        (["interpolate", "boot", "bag", "--way", "noise"], "--way noise without --images"),
        (["interpolate", "boot", "bag", "--height", "0"], "--height 0 is too small"),
        (["interpolate", "--images", "a.png", "c.png"], "of the same size"),
        (["interpolate", "--images", "a.png", "gone.png"], "gone.png is missing"),
        (
            ["interpolate", "--images", "a.png", "b.png", "--width", "20"],
            "--width 20 with --images",
        ),
        (
            ["interpolate", "--images", "a.png", "b.png", "--way", "magic"],
            "unknown way 'magic': expected one of inversion, noise",
        ),
        (
            ["interpolate", "--images", "a.png", "b.png", "--strength", "2"],
            "strength=2.0: expected a number in (0, 1]",
        ),
        (
            [
                "interpolate",
                "--images",
                "a.png",
                "b.png",
                "--way",
                "inversion",
                "--strength",
                "0.5",
            ],
            "with --way inversion",
        ),
        (
            ["interpolate", "--images", "a.png", "b.png", "--way", "inversion", "--to-seed", "5"],
            "the noise is that of the images",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(
    words: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(str(tiny) if word == "SELF" else word for word in words), model=tiny) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") <= 2, err
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "b.png", "c.png"], (
        "nothing was written"
    )
