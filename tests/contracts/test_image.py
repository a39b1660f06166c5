"""images.py: rounding, round trips, grids pixel by pixel, and PNG files that remember how they were
made.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.errors import NumericalError, UserError
from sfumato.images import grid, read_parameters, readable_parameters, to_pil, to_tensor, write_png

PARAMETERS = {
    "prompt": "ankle boot",
    "negative_prompt": None,
    "n": 4,
    "index": None,
    "seed": 7,
    "sampler": "ddim",
    "steps": 20,
    "guidance": 2.5,
    "height": 28,
    "width": 28,
    "model": "fashion",
    "model_hash": "0" * 64,
    "version": "0.1.0",
}


@pytest.mark.parametrize("channels", [1, 3])
def test_tensor_to_picture_to_tensor_is_the_identity_on_all_256_levels(channels: int) -> None:
    levels = (
        torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)
        / 127.5
        - 1
    )
    pictures = to_pil(levels)
    assert [p.mode for p in pictures] == [{1: "L", 3: "RGB"}[channels]] * 2
    assert torch.equal(to_tensor(pictures), levels)
    assert np.array_equal(np.asarray(pictures[0]).reshape(256, -1)[:, 0], np.arange(256))


def test_rounding_is_to_the_nearest_level_and_limited_at_the_ends() -> None:
    image = torch.tensor(
        [
            -9.0,
            -1.0,
            0.49 / 127.5 - 1,
            0.51 / 127.5 - 1,
            1 - 0.51 / 127.5,
            1 - 0.49 / 127.5,
            1.0,
            9.0,
        ]
    )
    assert np.asarray(to_pil(image.reshape(1, 1, 1, 8))[0]).tolist() == [
        [0, 0, 0, 1, 254, 255, 255, 255]
    ]


def test_channels_keep_their_order_and_pixels_their_place() -> None:
    image = torch.full((1, 3, 2, 3), -1.0)
    image[0, 2, 1, 0] = 1.0
    picture = to_pil(image)[0]
    assert picture.size == (3, 2)
    assert picture.getpixel((0, 1)) == (0, 0, 255)
    assert picture.getpixel((1, 0)) == (0, 0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_an_error_that_names_stage_and_image(value: float) -> None:
    image = torch.zeros(3, 1, 4, 4)
    image[1, 0, 2, 2] = value
    with pytest.raises(NumericalError, match=r"decode: image 1 of 3 .*float32"):
        to_pil(image)


def test_four_channels_are_a_latent_not_a_picture() -> None:
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        to_pil(torch.zeros(1, 4, 8, 8))


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert torch.equal(to_tensor(clear), torch.ones(1, 3, 2, 2))
    assert torch.equal(to_tensor(Image.new("LA", (2, 2), (0, 0))), torch.ones(1, 1, 2, 2))


def test_the_orientation_tag_is_obeyed(tmp_path: Path) -> None:
    picture = Image.new("L", (3, 2), 0)
    picture.putpixel((2, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        image = to_tensor(turned)
    assert image.shape == (1, 1, 3, 2)
    assert image[0, 0, 2, 1] == 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_whose_white_is_unknown_are_refused_rather_than_clipped(mode: str) -> None:
    with pytest.raises(UserError, match="8 bits a channel"):
        to_tensor(Image.new(mode, (2, 2)))


def test_pictures_of_a_batch_must_agree() -> None:
    with pytest.raises(UserError, match="one size"):
        to_tensor([Image.new("L", (2, 2)), Image.new("L", (2, 3))])
    with pytest.raises(UserError, match="at least one"):
        to_tensor([])


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 12),
    columns=st.one_of(st.none(), st.integers(1, 5)),
    pad=st.integers(0, 3),
    colour=st.booleans(),
)
def test_every_picture_of_a_grid_is_where_it_belongs(
    n: int, columns: int | None, pad: int, colour: bool
) -> None:
    width, height = 3, 2
    pictures = [
        Image.new("RGB" if colour else "L", (width, height), (k + 1, 0, 0) if colour else k + 1)
        for k in range(n)
    ]
    sheet = grid(pictures, columns, pad)
    across = (sheet.width + pad) // (width + pad)
    down = (sheet.height + pad) // (height + pad)
    assert (
        across * (width + pad) - pad == sheet.width and down * (height + pad) - pad == sheet.height
    )
    assert across * (down - 1) < n <= across * down
    assert across == min(n, columns) if columns else down <= across
    values = np.asarray(sheet)
    inside = np.zeros(values.shape[:2], bool)
    for k, picture in enumerate(pictures):
        y, x = k // across * (height + pad), k % across * (width + pad)
        assert np.array_equal(values[y : y + height, x : x + width], np.asarray(picture))
        inside[y : y + height, x : x + width] = True
    assert (values[~inside] == 255).all()


def test_a_grid_needs_pictures_of_one_size() -> None:
    with pytest.raises(UserError, match="at least one"):
        grid([])
    with pytest.raises(UserError, match="2x2, 3x2"):
        grid([Image.new("L", (2, 2)), Image.new("L", (3, 2))])
    with pytest.raises(UserError, match="columns=0: expected a whole number of at least 1"):
        grid([Image.new("L", (2, 2))], columns=0)


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"),
        max_size=80,
    ),
    seed=st.integers(0, 2**64 - 1),
)
def test_parameters_come_back_from_a_png(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, seed: int
) -> None:
    path = tmp_path_factory.mktemp("png") / "a.png"
    written = {**PARAMETERS, "prompt": prompt, "seed": seed}
    picture = Image.effect_noise((9, 7), 60)
    write_png(path, picture, written)
    assert read_parameters(path) == written
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(again), np.asarray(picture))
        assert again.info["parameters"] == readable_parameters(written)


def test_the_chunk_for_people_reads_like_other_tools() -> None:
    lines = readable_parameters({**PARAMETERS, "negative_prompt": "sole"}).split("\n")
    assert lines[:2] == ["ankle boot", "Negative prompt: sole"]
    assert lines[2].startswith(
        "Steps: 20, Sampler: ddim, CFG scale: 2.5, Seed: 7, Model: fashion, Model hash: 0000"
    )
    assert lines[2].endswith("Size: 28x28, Version: sfumato 0.1.0")


PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""The expression by which readers of AUTOMATIC1111's layout take the last line apart."""


def read_infotext(text: str) -> tuple[str, str, dict[str, str]]:
    """Read prompt, negative prompt and settings as AUTOMATIC1111's web UI does (its layout is
    described in its wiki; this is a reader of our own).
    """
    *lines, last = text.strip().split("\n")
    if len(PAIR.findall(last)) < 3:
        lines, last = [*lines, last], ""
    sides: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        negative = negative or line.startswith("Negative prompt:")
        sides[negative].append(line.removeprefix("Negative prompt:").strip())
    values = {}
    for key, value in PAIR.findall(last):
        quoted = value[:1] == value[-1:] == '"'
        values[key] = json.loads(value) if quoted else value
    return "\n".join(sides[0]).strip(), "\n".join(sides[1]).strip(), values


ODD = st.one_of(
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"),
        min_size=1,
        max_size=20,
    ),
    st.text(st.sampled_from(',:"\\\n\r \t/-{}ab\u2028\x85'), min_size=1, max_size=20),
)
WORDS = st.lists(
    st.sampled_from(
        ["Negative prompt: sky", "Steps: 20, Sampler: x, Seed: 3", "a, b: c", "靴", '"q"', " x"]
    ),
    max_size=4,
).map("\n".join)


@settings(deadline=None, max_examples=150)
@given(prompt=WORDS, negative=WORDS, name=ODD, sampler=ODD, seed=st.integers(0, 2**64 - 1))
def test_readers_of_other_programs_find_every_value(
    prompt: str, negative: str, name: str, sampler: str, seed: int
) -> None:
    written = {
        **PARAMETERS,
        "prompt": prompt,
        "negative_prompt": negative,
        "model": name,
        "sampler": sampler,
        "seed": seed,
        "guidance": {"scale": 2.0, "interval": {"low": 0.2, "high": 0.8}},
    }
    text = readable_parameters(written)
    words, against, values = read_infotext(text)

    def plain(text: str) -> str:
        """A prompt without the letters that the layout changes, and the spaces that it strips."""
        lines = (line.strip() for line in text.strip().split("\n"))
        return "\n".join(lines).replace("Negative", "negative").replace("Steps", "steps").strip()

    assert (words, against) == (plain(prompt), plain(negative))
    assert values == {
        "Steps": "20",
        "Sampler": sampler,
        "CFG scale": "2.0",
        "Guidance": "interval {'low': 0.2, 'high': 0.8}",
        "Seed": str(seed),
        "Model": name,
        "Model hash": "0" * 64,
        "Size": "28x28",
        "Version": "sfumato 0.1.0",
    }
    assert len(text.splitlines()[-1].split(", ")) >= 9, "the settings stay on one line"


def test_each_image_shows_its_own_seed() -> None:
    def shown(**parameters: object) -> tuple[str | None, str | None]:
        values = read_infotext(readable_parameters({**PARAMETERS, **parameters}))[2]
        return values.get("Seed"), values.get("Variation seed")

    assert shown(index=3) == ("10", None)
    assert shown(index=3, task="interpolate") == ("7", None)
    assert shown(index=3, variation_seed=20, variation_strength=0.1) == ("7", "23")


def test_names_that_are_no_text_do_not_stop_a_write(tmp_path: Path) -> None:
    """A file name may hold bytes that are not UTF-8."""
    written = {**PARAMETERS, "model": "caf\udce9", "prompt": "靴\udcff"}
    path = write_png(tmp_path / "a.png", Image.new("L", (2, 2)), written)
    assert read_parameters(path) == written
    with Image.open(path) as image:
        assert read_infotext(image.info["parameters"])[2]["Model"] == "caf?"


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_png(tmp_path / "a.png", Image.new("L", (2, 2), 9), PARAMETERS)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        write_png(path, Image.new("L", (2, 2), 1), PARAMETERS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_png(tmp_path / "a.png", Image.new("L", (2, 2)), {"guidance": float("nan")})
    assert not list(tmp_path.iterdir())


def test_pictures_without_parameters_are_explained(tmp_path: Path) -> None:
    plain, jpeg, text, cut = (
        tmp_path / name for name in ("plain.png", "photo.jpg", "notes.png", "cut.png")
    )
    write_png(plain, Image.new("L", (2, 2)))
    Image.new("L", (2, 2)).save(jpeg)
    text.write_text("not a picture")
    write_png(cut, Image.effect_noise((64, 64), 60), PARAMETERS)
    cut.write_bytes(cut.read_bytes()[:-2000])
    for path, words in (
        (plain, "holds no parameters"),
        (jpeg, "JPEG"),
        (text, "could not be read"),
        (cut, "truncated"),
        (tmp_path / "no.png", "missing"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_parameters(path)
        assert path.name in str(caught.value)


@pytest.mark.parametrize("text", ["{", json.dumps([1, 2])])
def test_parameters_that_were_tampered_with_are_explained(tmp_path: Path, text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("sfumato", text)
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(UserError, match="changed after it was made"):
        read_parameters(tmp_path / "a.png")
