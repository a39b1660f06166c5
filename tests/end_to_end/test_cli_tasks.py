"""`sfumato edit`, `inpaint` and `outpaint` on a real model with random weights.

Pixels outside the mask stay, bit for bit.
"""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import pixels
from helpers.models import tiny_model
from helpers.processes import run_python
from helpers.profiles import DISPLAY_P3, matrix_profile
from sfumato.cli import main
from sfumato.errors import UserError
from sfumato.images import read_parameters, to_tensor
from sfumato.loading import load
from sfumato.sampling import Request
from sfumato.tasks.enlarge import enlarge, two_pass
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.outpaint import outpaint, outpaint_mask


@pytest.fixture(autouse=True)
def pictures(working_folder: Path) -> None:
    """A fresh current folder with a picture and a mask, of a size that is no multiple of the
    factor.
    """
    numbers = np.random.default_rng(0)
    Image.fromarray(numbers.integers(0, 256, (15, 21), np.uint8)).save("photo.png")
    mask = np.zeros((15, 21), np.uint8)
    mask[3:9, 5:21] = 255
    mask[9, 5:21] = 128
    Image.fromarray(mask).save("mask.png")


def test_inpainting_keeps_every_other_pixel(tiny: Path) -> None:
    assert (
        main(
            [
                "inpaint",
                "photo.png",
                "bag",
                "--mask",
                "mask.png",
                "--model",
                str(tiny),
                "--n",
                "2",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    photo, mask, made = (
        pixels("photo.png"),
        pixels("mask.png"),
        [pixels(f"photo-inpaint-seed{k}.png") for k in (3, 4)],
    )
    for one in made:
        assert one.shape == photo.shape and np.array_equal(one[mask == 0], photo[mask == 0])
        assert (one[mask == 255] != photo[mask == 255]).mean() > 0.9
    assert not np.array_equal(made[0], made[1])
    between = np.abs(made[0] - photo)[mask == 128].mean()
    assert 0 < between < np.abs(made[0] - photo)[mask == 255].mean(), "grey is blended"
    noted = read_parameters("photo-inpaint-seed4.png")
    assert (
        noted["task"],
        noted["mask"],
        noted["seed"],
        noted["index"],
        noted["height"],
        noted["width"],
    ) == (
        "inpaint",
        "mask.png",
        3,
        1,
        15,
        21,
    )
    assert (
        main(
            [
                "inpaint",
                "photo.png",
                "bag",
                "--mask",
                "mask.png",
                "--model",
                str(tiny),
                "--seed",
                "4",
                "--out",
                "alone.png",
            ]
        )
        == 0
    )
    assert np.array_equal(pixels("alone.png"), made[1]), (
        "picture k is made again alone from seed + k"
    )


def test_pictures_of_tasks_are_not_made_again_by_generate(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", "photo.png", "boot", "--model", str(tiny)]) == 0
    assert main(["generate", "--from", "photo-edit-seed0.png"]) == 2
    assert "was made by `sfumato edit` from 'photo.png'" in capsys.readouterr().err


def test_tasks_record_their_dtype(tiny: Path) -> None:
    arguments = ["edit", "photo.png", "boot", "--model", str(tiny), "--seed", "2"]
    assert (
        main([*arguments, "--dtype", "bf16", "--out", "half.png"]) == 0
        and main([*arguments, "--out", "whole.png"]) == 0
    )
    half, whole = read_parameters("half.png"), read_parameters("whole.png")
    assert (
        half["dtype"] == "bf16"
        and "dtype" not in whole
        and half["model_hash"] != whole["model_hash"]
    )
    apart = np.abs(pixels("half.png").astype(int) - pixels("whole.png"))
    assert apart.max() > 0 and apart.mean() < 8


def test_editing_follows_its_strength(tiny: Path) -> None:
    model, picture = load(tiny), Image.open("photo.png")
    z = model.compress(to_tensor(picture))
    words = Request("boot", steps=20, guidance=1.0)
    change = [
        float(
            (
                model.run(image_to_image(model, picture, words, strength=s), output="latent") - z
            ).norm()
        )
        for s in (0.05, 0.3, 0.6, 1)
    ]
    assert change == sorted(change) and change[0] < 0.5 * change[-1]
    assert (
        main(
            [
                "edit",
                "photo.png",
                "boot",
                "--model",
                str(tiny),
                "--strength",
                "0.3",
                "--steps",
                "20",
                "--guidance",
                "1",
            ]
        )
        == 0
    )
    expected = model.run(image_to_image(model, picture, words, strength=0.3))[0]
    assert np.array_equal(pixels("photo-edit-seed0.png"), np.asarray(expected)), (
        "the command is the library's task"
    )


def test_outpainting_keeps_the_picture(tiny: Path) -> None:
    sides = ["--left", "3", "--top", "2", "--bottom", "4", "--right", "1"]
    assert main(["outpaint", "photo.png", "bag", "--model", str(tiny), *sides]) == 0
    made, photo = pixels("photo-outpaint-seed0.png"), pixels("photo.png")
    assert made.shape == (15 + 6, 21 + 4) and np.array_equal(made[2:17, 3:24], photo)
    assert made[:2].std() > 0 and made[:, :3].std() > 0
    assert (
        main(
            [
                "outpaint",
                "photo.png",
                "bag",
                "--model",
                str(tiny),
                *sides,
                "--overlap",
                "3",
                "--out",
                "o.png",
            ]
        )
        == 0
    )
    blended = pixels("o.png")
    assert np.array_equal(blended[5:14, 6:21], photo[3:12, 3:18]) and not np.array_equal(
        blended[2:17, 3:24], photo
    )


def test_the_mask_of_a_grown_image() -> None:
    mask = outpaint_mask(
        torch.zeros(1, 1, 4, 5), {"left": 2, "right": 0, "top": 0, "bottom": 1, "overlap": 2}
    )[0, 0]
    assert mask.shape == (5, 7)
    assert torch.allclose(mask[0], torch.tensor([1, 1, 2 / 3, 1 / 3, 0, 0, 0]))
    assert torch.allclose(mask[:, -1], torch.tensor([0, 0, 1 / 3, 2 / 3, 1]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inpaint", "photo.png"], "inpaint needs --mask"),
        (["inpaint", "photo.png", "--mask", "gone.png"], "gone.png is missing: expected an image"),
        (["inpaint", "gone.png", "--mask", "mask.png"], "gone.png is missing: expected an image"),
        (
            ["inpaint", "photo.png", "--mask", "small.png"],
            "a mask of height 4 and width 4 for an image of 15 and 21: expected the same size",
        ),
        (
            ["inpaint", "photo.png", "--mask", "turned.png"],
            "expected the same size; the mask's EXIF orientation turned it: save the mask upright",
        ),
        (
            ["inpaint", "photo.png", "--mask", "across.png"],
            "expected the same size; the EXIF orientation of an image is applied: draw the mask",
        ),
        (["inpaint", "text.png", "--mask", "mask.png"], "text.png could not be read as an image"),
        (["edit", "photo.png", "--strength", "0"], "strength=0.0: expected a number in (0, 1]"),
        (
            ["edit", "photo.png", "--strength", "0.01"],
            "strength=0.01 of 3 steps is none: expected at least 0.333",
        ),
        (["edit", "photo.png", "--strength", "nan"], "strength=nan"),
        (["edit", "photo.png", "--n", "0"], "--n 0 is too small"),
        (["edit", "photo.png", "dog"], "unknown class 'dog'"),
        (["outpaint", "photo.png"], "say how many pixels to add, and where"),
        (["outpaint", "photo.png", "--left", "-1"], "left=-1: expected a whole number of pixels"),
        (["outpaint", "photo.png", "--left", f"{10**20}"], "a whole number of pixels from 0 to"),
        (
            ["outpaint", "photo.png", "--left", "1", "--overlap", "15"],
            "overlap=15 for an image of 15 x 21",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(
    words: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (4, 4)).save("small.png")
    Image.new("L", (15, 21)).save("across.png")
    orientation = Image.Exif()
    orientation[274] = 6
    Image.new("L", (21, 15)).save("turned.png", exif=orientation)
    Path("text.png").write_text("no picture")
    assert main([*words, "--model", str(tiny)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") <= 2
    assert not list(Path().glob("photo-*.png"))


def test_requests_of_tasks_share_passes_with_others(tiny: Path) -> None:
    """A task is a request: `sample_many` answers it beside others, bit for bit as alone."""
    model, picture, mask = load(tiny), Image.open("photo.png"), Image.open("mask.png")
    words = Request("boot", n=2, steps=4, seed=5, sampler="ddpm")
    requests = [
        image_to_image(model, picture, words, strength=0.5),
        inpaint(model, picture, mask, words),
        outpaint(model, picture, words, left=4),
        Request("bag", steps=3),
    ]
    for one, result in zip(
        (model.run(r, output="tensor") for r in requests),
        model.run_many(requests, output="tensor"),
        strict=True,
    ):
        assert torch.equal(one, result)


def test_pictures_that_do_not_fit_the_request(tiny: Path) -> None:
    model, pixels = load(tiny), torch.zeros(3, 1, 16, 16)
    with pytest.raises(UserError, match="3 input images for 2 images"):
        image_to_image(model, pixels, Request(n=2))
    with pytest.raises(UserError, match="height=32, width=None for an image of 16 x 16"):
        image_to_image(model, pixels[:1], Request(height=32))
    with pytest.raises(UserError, match=r"a mask with values from 0 to 2"):
        inpaint(model, pixels[:1], torch.linspace(0, 2, 256).reshape(1, 1, 16, 16))
    with pytest.raises(UserError, match="unknown posterior"):
        image_to_image(model, pixels[:1], posterior="mode")


def test_enlarging_keeps_the_composition(tiny: Path) -> None:
    model, picture = load(tiny), Image.open("photo.png")
    assert (
        main(
            [
                "upscale",
                "photo.png",
                "boot",
                "--model",
                str(tiny),
                "--scale",
                "1.5",
                "--steps",
                "10",
                "--strength",
                "0.2",
            ]
        )
        == 0
    )
    assert pixels("photo-upscale-seed0.png").shape == (22, 32)
    large = picture.resize((32, 22), Image.Resampling.BICUBIC)
    z = model.compress(to_tensor(large))
    words = Request("boot", steps=20, guidance=1.0)
    near, far = (
        float(
            (
                model.run(enlarge(model, picture, words, scale=1.5, strength=s), output="latent")
                - z
            ).norm()
        )
        for s in (0.05, 1)
    )
    assert near < 0.5 * far
    second = two_pass(model, Request("bag", n=2, steps=3), scale=2)
    assert [p.size for p in model.run(second)] == [(32, 32)] * 2
    for scale in (0.5, float("inf"), 1e300):
        with pytest.raises(UserError, match=f"scale={re.escape(str(scale))}: expected a number in"):
            enlarge(model, picture, scale=scale)


def test_the_clock_starts_before_torch_is_imported(tmp_path: Path) -> None:
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    command = ("inpaint", "white.png", "bag", "--mask", "white.png", "--steps", "1")
    line = run_python("-m", "sfumato", *command, cwd=tmp_path).stdout.splitlines()[-1]
    seconds = re.search(r"\(import (\d+\.\d\d), load", line)
    assert seconds is not None and float(seconds[1]) > 0, line


def test_commands_name_the_losses_of_a_result(
    tmp_path: Path, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(channels=3).save(tmp_path / "colour")
    numbers = np.random.default_rng(4).integers(0, 256, (16, 16, 4), np.uint8)
    profile = matrix_profile(DISPLAY_P3)
    Image.fromarray(numbers, "RGBA").save("cut.png", icc_profile=profile)
    frames = [Image.new("L", (16, 16), level) for level in (0, 255, 0)]
    frames[0].paste(255, (4, 4, 12, 12))
    frames[0].save("mask.gif", save_all=True, append_images=frames[1:])
    options = ["--model", str(tmp_path / "colour"), "--steps", "3"]
    lost = "its colours become sRGB, by its profile 'test colours'; its transparency is laid over"
    assert main(["edit", "cut.png", "bag", *options]) == 0
    assert f"sfumato: cut.png: {lost} white\n" == capsys.readouterr().err
    assert main(["interpolate", "bag", "--images", "cut.png", "cut.png", "--n", "2", *options]) == 0
    assert capsys.readouterr().err.count(lost) == 2
    assert (
        main(["inpaint", "cut.png", "bag", "--mask", "mask.gif", *options, "--out", "made.png"])
        == 0
    )
    assert capsys.readouterr().err == "sfumato: mask.gif: the first of its 3 frames is used\n"
    with Image.open("made.png") as made:
        assert made.mode == "RGBA" and made.info["icc_profile"] == profile
        assert np.array_equal(np.asarray(made)[:4], numbers[:4])
    assert (
        main(
            ["outpaint", "cut.png", "bag", "--left", "2", "--grid", *options, "--out", "grown.png"]
        )
        == 0
    )
    assert lost in capsys.readouterr().err
    assert pixels("grown.png").shape == (16, 18, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it is a folder: expected one image file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>", "a web page, not the file: download the image itself"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\0\0\0\0", "megapixels"),
    ],
    ids=["folder", "pointer", "page", "large"],
)
def test_images_that_are_none_are_refused_by_their_cause(
    content: bytes | None, message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        Path("odd.png").mkdir()
    else:
        if b"IHDR" in content:
            content += zlib.crc32(content[12:]).to_bytes(4, "big")
            content += bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
        Path("odd.png").write_bytes(content)
    for arguments in (["edit", "odd.png"], ["inpaint", "photo.png", "--mask", "odd.png"]):
        assert main([*arguments, "--model", str(tiny)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("sfumato: odd.png could not be read as an image") and message in err
        assert err.count("\n") == 1
