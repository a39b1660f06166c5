"""Every source opens into the same contract, and everything that is wrong with one is a
sentence.
"""

import csv
import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import ImageSet, Transform, idx, images, open_both, open_images
from sfumato.data.pixel_cache import PixelCache
from sfumato.errors import UserError

CLOTHING = Path(__file__).resolve().parents[3] / "shared" / "data" / "clothing-256-train.parquet"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    data = (
        bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def idx_folder(
    folder: Path, count: int = 12, *, side: int = 8, end: str = ".gz", seed: int = 0
) -> np.ndarray:
    pixels = noise(count, side, side, seed=seed)
    write_idx(folder / f"train-images-idx3-ubyte{end}", pixels)
    write_idx(folder / f"train-labels-idx1-ubyte{end}", np.arange(count, dtype=np.uint8) % 10)
    return pixels


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def bytes_of(image: torch.Tensor) -> np.ndarray:
    """Back from [-1, 1] to the uint8 that it was; fails when it was not one."""
    values = (image + 1) * 127.5
    assert image.dtype == torch.float32 and (values - values.round()).abs().max() < 1e-4
    return values.round().to(torch.uint8).numpy()


# Transform


def test_black_is_minus_one_and_white_is_one() -> None:
    image = Transform().to_tensor(np.array([[0, 255]], np.uint8))
    assert image.shape == (1, 1, 2) and image.flatten().tolist() == [-1.0, 1.0]


def test_sixteen_bit_grey_is_scaled_by_257(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for delta in (0, 100, -100):  # within half a step: the same level, rounded and never clipped
        values = np.clip(levels.astype(int) * 257 + delta, 0, 65535).astype(np.uint16)
        for name in ("a.png", "a.tif"):
            result = bytes_of(Transform().to_tensor(save(tmp_path / name, values)))
            assert np.array_equal(result[0], levels), name


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    colour, alpha = noise(16, 16, 3), noise(16, 16, 1, seed=1)
    path = save(tmp_path / "a.png", np.concatenate([colour, alpha], 2))
    a = alpha / 255.0
    expected = (colour * a + 255 * (1 - a)).transpose(2, 0, 1)
    assert np.abs(bytes_of(Transform().to_tensor(path)) - expected).max() <= 1


def test_grey_transparency_stays_grey(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.png",
        np.stack([np.zeros((4, 4)), np.full((4, 4), 255 * 0.6)], 2).astype(np.uint8),
    )
    assert bytes_of(Transform().to_tensor(path)).tolist() == [[[102] * 4] * 4]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=0)
    assert bytes_of(Transform().to_tensor(tmp_path / "a.png"))[:, 0].T.tolist() == [
        [10, 20, 30],
        [200, 100, 50],
    ]
    assert bytes_of(Transform().to_tensor(tmp_path / "b.png"))[:, 0].T.tolist() == [
        [255, 255, 255],
        [200, 100, 50],
    ]


@pytest.mark.parametrize(
    ("ink", "seen"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((255, 0, 0, 0), (0, 255, 255))],
)
def test_cmyk(tmp_path: Path, ink: tuple[int, ...], seen: tuple[int, ...]) -> None:
    Image.new("CMYK", (8, 8), ink).save(tmp_path / "a.jpg", quality=100)
    result = bytes_of(Transform().to_tensor(tmp_path / "a.jpg"))[:, 4, 4]
    assert np.abs(result.astype(int) - seen).max() <= 2


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored, exif = noise(5, 7, 3), Image.Exif()
    exif[0x0112] = orientation
    result = bytes_of(Transform().to_tensor(save(tmp_path / "a.png", stored, exif=exif)))
    assert np.array_equal(result.transpose(1, 2, 0), UPRIGHT[orientation](stored))


def test_resizing_is_lanczos_of_the_short_side_then_the_centre() -> None:
    pixels = noise(64, 96, 3)
    whole = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.LANCZOS))[:, 8:40]
    result = bytes_of(Transform(size=32).to_tensor(pixels)).transpose(1, 2, 0)
    assert np.abs(result.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("shape", [(37, 90), (90, 37), (50, 51)])
def test_the_crop_is_centred(shape: tuple[int, int]) -> None:
    """Cropping a mirrored picture is mirroring the crop, also when the margin is odd."""
    pixels, transform = noise(*shape, 3), Transform(size=16)
    crop = transform.to_pixels(pixels).astype(int)
    assert np.abs(transform.to_pixels(pixels[:, ::-1].copy())[..., ::-1] - crop).max() <= 1
    assert np.abs(transform.to_pixels(pixels[::-1].copy())[:, ::-1] - crop).max() <= 1


def test_channels() -> None:
    grey, colour = noise(4, 4), noise(4, 4, 3)
    assert (Transform(channels=3).to_pixels(grey) == grey).all()
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.abs(Transform(channels=1).to_pixels(colour)[0] - luma).max() <= 1
    assert Transform(size=6, channels=1).to_pixels(colour).shape == (1, 6, 6)


def test_transform_hash_depends_on_all_that_changes_pixels() -> None:
    base = Transform(size=32, channels=3)
    assert base.hash == Transform(32, 3, flip=True).hash
    others = [
        Transform(33, 3),
        Transform(32, 1),
        Transform(32, None),
        Transform(None, 3),
        Transform(32, 3, interpolation="box"),
    ]
    assert len({base.hash, *(t.hash for t in others)}) == 6


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"channels": 2}, {"crop": "random"}, {"interpolation": "lancsoz"}]
)
def test_transform_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=str(next(iter(bad.values())))) as caught:
        Transform(**bad)
    # the test run's type checker may be quicker
    assert isinstance(caught.value, UserError) or "crop" in bad


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 2), np.float32),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros(3, np.uint8),
    ],
)
def test_arrays_that_are_no_pictures(bad: np.ndarray) -> None:
    with pytest.raises(UserError, match="is not an image"):
        Transform().to_tensor(bad)


# IDX


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_reads_back(tmp_path: Path, end: str) -> None:
    pixels = idx_folder(tmp_path / "digits", end=end)
    data = open_images(tmp_path / "digits")
    assert (len(data), data.shape, data.name, data.captions, data.skipped) == (
        12,
        (1, 8, 8),
        "digits",
        None,
        [],
    )
    assert data.class_names == tuple("0123456789") and data.transform.channels == 1
    batch = data.batch([3, 0, 3])
    assert np.array_equal(bytes_of(batch["image"])[:, 0], pixels[[3, 0, 3]])
    assert batch["label"].tolist() == [3, 0, 3] and batch["label"].dtype == torch.int64
    colour = open_images(tmp_path / "digits", channels=3).batch(torch.tensor([5]))["image"]
    assert colour.shape == (1, 3, 8, 8) and np.array_equal(bytes_of(colour)[0, 2], pixels[5])


def test_idx_test_split_limit_and_size(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    write_idx(tmp_path / "t10k-images.idx3-ubyte", noise(4, 8, 8, seed=5))
    write_idx(tmp_path / "t10k-labels.idx1-ubyte", np.array([9, 8, 7, 11], np.uint8))
    data = open_images(tmp_path, split="test")
    assert len(data) == 4 and data.class_names[11] == "11"
    small = open_images(tmp_path, size=4, limit=3)
    assert (len(small), small.shape) == (3, (1, 4, 4))
    assert (
        small.fingerprint
        == open_images(tmp_path, limit=3).fingerprint
        != open_images(tmp_path, limit=2).fingerprint
    )


def break_idx(folder: Path, how: str) -> None:
    picture, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    if how == "truncated":
        picture.write_bytes(picture.read_bytes()[:-1])
    elif how == "too long":
        picture.write_bytes(picture.read_bytes() + b"\0")
    elif how == "gzip cut":
        picture.write_bytes(gzip.compress(picture.read_bytes())[:-20])
    elif how == "header":
        picture.write_bytes(b"\x89PNG" + picture.read_bytes())
    elif how == "short":
        picture.write_bytes(b"\0\0")
    elif how == "label count":
        write_idx(labels, np.zeros(11, np.uint8))
    elif how == "no labels":
        labels.unlink()
    elif how == "none":
        write_idx(picture, np.zeros((0, 8, 8), np.uint8))
    elif how == "class 10":
        write_idx(labels, np.full(12, 10, np.uint8))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "header says 768 bytes .* but 767 follow"),
        ("too long", "header says 768 bytes .* but 769 follow"),
        ("gzip cut", "train-images-idx3-ubyte is a damaged gzip file"),
        ("header", "expected the IDX header 00 00 08 03"),
        ("short", "expected the IDX header"),
        ("label count", "12 images but 11 labels"),
        ("no labels", r"has no train-labels-idx1-ubyte"),
        ("none", "holds no image"),
        ("class 10", r"label 10, expected 0\.\.9"),
    ],
)
def test_idx_refuses(tmp_path: Path, how: str, says: str) -> None:
    idx_folder(tmp_path / "fashion", end="")
    break_idx(tmp_path / "fashion", how)
    with pytest.raises(UserError, match=says):
        open_images(tmp_path / "fashion")


def test_files_beside_idx_files_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idx_folder(tmp_path)
    assert len(open_images(tmp_path)) == 12 and "left out" not in caplog.text
    save(tmp_path / "sample.png", noise(4, 4))
    (tmp_path / "readme.txt").write_text("text")
    (tmp_path / "sums.md5").write_text("0")
    (tmp_path / "t10k-images.gz").write_bytes(b"other")
    open_images(tmp_path)
    for words in ("left out 4 files", "images beside the IDX files 1", ".md5 1", ".gz 1"):
        assert words in caplog.text


def test_idx_unknown_split(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    with pytest.raises(UserError, match=r"unknown split of .* 'test': expected one of train"):
        open_images(tmp_path, split="test")
    write_idx(tmp_path / "t10k-images-idx3-ubyte", noise(2, 8, 8))
    with pytest.raises(UserError, match=r"unknown split of .* 'tets': did you mean 'test'"):
        open_images(tmp_path, split="tets")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        open_images(tmp_path, split="test")


def test_where_fashion_mnist_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_DATA", raising=False)
    monkeypatch.setattr(idx, "_DEBIAN", tmp_path / "nowhere")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        open_images("fashion-mnist")
    idx_folder(tmp_path / "data" / "fashion-mnist", 3)
    assert len(open_images("fashion-mnist")) == 3
    idx_folder(tmp_path / "mine" / "fashion-mnist", 5)
    monkeypatch.setenv("SFUMATO_DATA", str(tmp_path / "mine"))
    data = open_images("fashion-mnist")
    assert len(data) == 5 and data.class_names[0] == "t-shirt" and data.name == "fashion-mnist"


def test_real_fashion_mnist() -> None:
    try:
        idx.fashion_mnist_folder()
    except UserError as error:
        pytest.skip(str(error))
    data = open_images("fashion-mnist")
    assert (len(data), data.shape, data.class_names[9]) == (60_000, (1, 28, 28), "ankle boot")
    assert data.labels is not None and data.labels.bincount().tolist() == [6000] * 10
    every = data.batch(torch.arange(0, 60_000))["image"]
    # the data set's well-known mean and std
    assert abs(float(every.mean(dtype=torch.float64) + 1) / 2 - 0.2860) < 1e-4
    assert abs(float(every.std()) / 2 - 0.3530) < 1e-4
    test = open_images("fashion-mnist", split="test")
    assert len(test) == 10_000 and test.fingerprint != data.fingerprint


# ImageSet


def test_one_pixel_changes_the_fingerprint_and_the_format_does_not(tmp_path: Path) -> None:
    pixels = idx_folder(tmp_path / "idx")
    first = open_images(tmp_path / "idx").fingerprint
    for i, image in enumerate(pixels):
        save(tmp_path / "png" / f"{i:02d}.png", image)
        save(tmp_path / "bmp" / f"{i:02d}.bmp", image)
    assert (
        open_images(tmp_path / "png").fingerprint
        == open_images(tmp_path / "bmp", size=4).fingerprint
        == first
    )
    pixels[11, 7, 7] ^= 1
    save(tmp_path / "png" / "11.png", pixels[11])
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte.gz", pixels)
    changed = open_images(tmp_path / "idx").fingerprint
    assert open_images(tmp_path / "png").fingerprint == changed != first


def test_subset_is_the_same_pictures_by_other_numbers(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    data = open_images(tmp_path)
    some = data.subset([4, 1, 7]).subset(torch.tensor([2, 0]))
    assert len(some) == 2 and some.class_names == data.class_names
    assert torch.equal(some.batch([0, 1])["image"], data.batch([7, 4])["image"])
    assert (
        some.labels is not None
        and some.labels.tolist() == [7, 4] == some.batch([0, 1])["label"].tolist()
    )
    prints = {s.fingerprint for s in (data, some, data.subset([4, 7]), data.subset([7]))}
    assert len(prints) == 4 and data.subset(range(12)).fingerprint == data.fingerprint


def test_numbers_outside_are_refused(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    for bad in ([12], [0, -1]):
        with pytest.raises(IndexError, match=r"there are 0\.\.11"):
            open_images(tmp_path).batch(bad)
    assert open_images(tmp_path).batch([])["image"].shape == (0, 1, 8, 8)


def test_flip_mirrors_half_and_follows_the_generator(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    plain = open_images(tmp_path).batch([0] * 200)["image"]
    data = open_images(tmp_path, flip=True)
    first, again = (
        data.batch([0] * 200, generator=torch.Generator().manual_seed(3))["image"] for _ in range(2)
    )
    assert torch.equal(first, again)
    mirrored = (first == plain.flip(-1)).flatten(1).all(1)
    assert (
        bool((mirrored | (first == plain).flatten(1).all(1)).all())
        and 60 < int(mirrored.sum()) < 140
    )
    assert torch.equal(data.unflipped().batch([0] * 200)["image"], plain) and data.transform.flip


def test_an_image_set_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", noise(4, 4, 3))
    data: ImageSet = open_images(tmp_path)
    assert torch.equal(
        pickle.loads(pickle.dumps(data)).batch([0])["image"], data.batch([0])["image"]
    )


# Folders


def class_folder(root: Path) -> list[np.ndarray]:
    pixels = [noise(8, 8, 3, seed=i) for i in range(5)]
    for path, values in zip(
        ("cat/b.png", "cat/a.PNG", "dog/sub/c.png", "dog/d.bmp", "eel/e.tiff"), pixels, strict=True
    ):
        save(root / path, values)
    (root / "cat" / "notes.txt").write_text("not a picture")
    (root / "cat" / ".hidden.png").write_text("nor this")
    return pixels


def test_class_subfolders_are_labels(tmp_path: Path) -> None:
    pixels = class_folder(tmp_path)
    data = open_images(tmp_path)
    assert data.class_names == ("cat", "dog", "eel") and data.shape == (3, 8, 8)
    batch = data.batch(range(5))
    assert batch["label"].tolist() == [0, 0, 1, 1, 2]
    assert np.array_equal(
        bytes_of(batch["image"]),
        np.stack([pixels[i] for i in (1, 0, 3, 2, 4)]).transpose(0, 3, 1, 2),
    )


def test_a_linked_class_folder_counts_and_a_loop_ends(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png", noise(4, 4))
    save(tmp_path / "set" / "cat" / "b.png", noise(4, 4))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    data = open_images(tmp_path / "set")
    assert data.class_names == ("cat", "dog") and len(data) == 2


def test_a_flat_folder_of_one_image_works(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(5, 9, 3))
    data = open_images(tmp_path, size=4)
    assert (len(data), data.labels, data.class_names) == (1, None, ())
    assert data.batch([0])["label"].tolist() == [-1] and data.batch([0])["image"].shape == (
        1,
        3,
        4,
        4,
    )


def test_train_and_test_subfolders(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "a.png", noise(4, 4))
    save(tmp_path / "test" / "dog" / "b.png", noise(4, 4))
    assert open_images(tmp_path).class_names == ("cat",)
    assert open_images(tmp_path, split="test").class_names == ("dog",)
    with pytest.raises(UserError, match=r"unknown split of .* 'trian': did you mean 'train'"):
        open_images(tmp_path, split="trian")
    with pytest.raises(UserError, match="unknown split"):
        open_images(tmp_path / "train", split="test")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_from_metadata(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.png", noise(4, 4))
    rows = [
        {"file_name": "images/b.png", "text": 'a "b",\nin two lines'},
        {"file_name": "images/a.png", "text": "größe"},
    ]
    with (tmp_path / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    data = open_images(tmp_path)
    assert data.captions == ["größe", 'a "b",\nin two lines'] and data.labels is None
    assert data.subset([1]).captions == ['a "b",\nin two lines']
    save(tmp_path / "images" / "c.png", noise(4, 4))
    with pytest.raises(UserError, match=r"c\.png: it has no row in metadata"):
        open_images(tmp_path)
    skipping = open_images(tmp_path, on_error="skip")
    assert len(skipping) == 2 and skipping.skipped[0][0].endswith("c.png")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file_name\na.png\n", "neither captions nor classes .found file_name"),
        ("name,text\na.png,x\n", "no column file_name .found name, text"),
        ("file_name,text\n,x\n", "row 1 of .* lacks file_name"),
        ("file_name,text\na.png,a cat, asleep\n", "row 1 .* more fields .* in quotes"),
    ],
)
def test_metadata_refuses(tmp_path: Path, text: str, says: str) -> None:
    save(tmp_path / "a.png", noise(4, 4))
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        open_images(tmp_path)


def test_grey_among_colour_becomes_three_channels(tmp_path: Path) -> None:
    grey, colour = noise(4, 4), noise(4, 4, 3)
    save(tmp_path / "a.png", grey)
    assert open_images(tmp_path).shape == (1, 4, 4)
    save(tmp_path / "b.png", colour)
    data = open_images(tmp_path)
    assert data.shape == (3, 4, 4) and data.transform.channels == 3
    assert np.array_equal(bytes_of(data.batch([0])["image"])[0], np.stack([grey] * 3))


def broken(root: Path, how: str) -> Path:
    path = root / "cat" / "bad.png"
    whole = save(path, noise(64, 64, 3)).read_bytes()
    if how == "truncated png":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "bit flip":  # in the data: it may still decode, the checksum tells
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "dangling link":
        path.unlink()
        path.symlink_to(root / "nowhere.png")
    elif how == "truncated jpeg":
        path.unlink()
        path = path.with_suffix(".jpg")
        path.write_bytes(save(path, noise(64, 64, 3)).read_bytes()[:1500])
    elif how == "float":
        path.unlink()
        path = path.with_suffix(".tiff")
        Image.new("F", (4, 4)).save(path)
    return path


@pytest.mark.parametrize(
    "how",
    ["truncated png", "truncated jpeg", "bit flip", "empty", "text", "dangling link", "float"],
)
def test_broken_pictures(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    class_folder(tmp_path)
    path = broken(tmp_path, how)
    with pytest.raises(UserError, match=f"{path.name} cannot be read as an image"):
        open_images(tmp_path, size=8)
    data = open_images(tmp_path, size=8, on_error="skip")
    assert len(data) == 5 and data.labels is not None and data.labels.tolist() == [0, 0, 1, 1, 2]
    assert [name for name, _ in data.skipped] == [str(path)] and str(path) in caplog.text


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    broken(tmp_path, "text")
    with pytest.raises(
        UserError, match=r"none of the 1 images .* can be read: the first, .*bad\.png"
    ):
        open_images(tmp_path, on_error="skip")


def test_folders_refuse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(tmp_path / "empty")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"is a \.zip file"):
        open_images(tmp_path / "a.zip")
    save(tmp_path / "mixed" / "a.png", noise(4, 4))
    save(tmp_path / "mixed" / "sub" / "b.png", noise(6, 4))
    with pytest.raises(UserError, match="both directly in it and in subfolders"):
        open_images(tmp_path / "mixed")
    save(tmp_path / "sizes" / "a.png", noise(4, 4))
    save(tmp_path / "sizes" / "b.png", noise(6, 4))
    with pytest.raises(UserError, match=r"a\.png is 4x4, .*b\.png is 6x4\): give one size"):
        open_images(tmp_path / "sizes")
    refused: list[dict[str, Any]] = [{"limit": 0}, {"size": -1}]
    for bad in refused:
        with pytest.raises(UserError, match=str(next(iter(bad.values())))):
            open_images(tmp_path / "sizes", **bad)


def test_pictures_beyond_the_memory_limit_are_decoded_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folder(tmp_path)
    held = open_images(tmp_path, size=6)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 3 * 36 * 2)
    lazy = open_images(tmp_path, size=6, cache=None)
    assert type(lazy._pixels) is not type(held._pixels)
    order = [4, 0, 0, 2]
    assert torch.equal(lazy.batch(order)["image"], held.batch(order)["image"])
    assert torch.equal(
        pickle.loads(pickle.dumps(lazy)).batch(order)["image"], held.batch(order)["image"]
    )
    assert (
        lazy.fingerprint == held.fingerprint
        and lazy.subset(order).fingerprint == held.subset(order).fingerprint
    )
    save(tmp_path / "eel" / "e.tiff", noise(8, 8, 3, seed=99))
    lazy.batch([0])
    with pytest.raises(UserError, match=r"e\.tiff changed while it was in use"):
        lazy.batch([4])


# Tables


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    result = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(result.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    return result


def table(
    datasets: Any, folder: Path, pixels: np.ndarray, names: tuple[str, ...] = ("cat", "dog")
) -> Any:
    files = [
        save(folder / "loose" / f"{i}.png", image).read_bytes() for i, image in enumerate(pixels)
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=list(names)),
        }
    )
    features["caption"] = datasets.Value("string")
    count = len(files)
    rows = {
        "id": list(range(count)),
        "picture": [{"bytes": f, "path": None} for f in files],
        "kind": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(
        {**rows, "caption": [f"picture {i}" for i in range(count)]}, features
    )


def test_parquet_and_its_sibling(datasets: Any, tmp_path: Path) -> None:
    pixels = noise(6, 8, 8, 3)
    table(datasets, tmp_path, pixels).to_parquet(tmp_path / "pets-train.parquet")
    data = open_images(tmp_path / "pets-train.parquet")
    assert np.array_equal(bytes_of(data.batch(range(6))["image"]), pixels.transpose(0, 3, 1, 2))
    assert data.class_names == ("cat", "dog") and data.batch([1, 2])["label"].tolist() == [1, 0]
    assert (
        data.captions is not None and data.captions[5] == "picture 5" and data.name == "pets-train"
    )
    with pytest.raises(UserError, match=r"a file beside it .* \(pets-test\.parquet\)"):
        open_images(tmp_path / "pets-train.parquet", split="test")
    table(datasets, tmp_path, pixels[:2]).to_parquet(tmp_path / "pets-test.parquet")
    assert len(open_images(tmp_path / "pets-train.parquet", split="test")) == 2
    # the folder of both
    assert (len(open_images(tmp_path)), len(open_images(tmp_path, split="test"))) == (6, 2)
    changed = pixels.copy()
    changed[3, 0, 0, 0] ^= 1  # nothing stale from the cache of `datasets`
    table(datasets, tmp_path, changed).to_parquet(tmp_path / "pets-train.parquet")
    assert open_images(tmp_path / "pets-train.parquet").fingerprint != data.fingerprint


def numbered(
    root: Path, kind: str, whole: range | set[int], request: pytest.FixtureRequest
) -> Path:
    """20 grey pictures, the k-th of value 10 k in the order of the source; those not `whole` are
    broken.
    """
    pictures = [np.full((8, 8), 10 * k, np.uint8) for k in range(20)]
    if kind == "idx":
        idx_folder(root, 20)
        write_idx(root / "train-images-idx3-ubyte.gz", np.stack(pictures))
        return root
    places = [f"{'cat' if k < 15 else 'dog'}/{k:02}.png" for k in range(20)]
    if kind == "splits":
        places = [
            f"{'train' if k < 14 else 'test'}/{'cat' if k % 7 < 5 else 'dog'}/{k:02}.png"
            for k in range(20)
        ]
    for k, (place, picture) in enumerate(zip(places, pictures, strict=True)):
        save(root / place, picture)
        if k not in whole:
            (root / place).write_bytes(b"broken")
    if kind != "parquet":
        return root
    datasets = request.getfixturevalue("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "label": datasets.Value("string"),
            "text": datasets.Value("string"),
        }
    )
    rows = [
        {
            "picture": {"bytes": (root / p).read_bytes(), "path": None},
            "label": p.split("/")[0],
            "text": p,
        }
        for p in places
    ]
    datasets.Dataset.from_list(rows, features).to_parquet(root / "pets.parquet")
    return root / "pets.parquet"


@pytest.mark.parametrize("kind", ["folder", "splits", "parquet", "idx"])
def test_the_first_of_both_splits_are_opened_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The same pictures, labels, classes and captions as of the whole source, from one where all
    others are broken; of each set some are opened.
    """
    whole = numbered(tmp_path / "whole", kind, range(20), request)
    sets = open_both(whole, 0.2)
    expected = open_both(whole, 0.2, sample=3)
    for some, every in zip(expected, sets, strict=True):
        assert len(some) == 3 and set(some.rows.tolist()) <= set(every.rows.tolist())
    indices = {
        int(value) // 10
        for images in expected
        for value in bytes_of(images.batch(range(3))["image"])[:, 0, 0, 0]
    }
    source = numbered(tmp_path / "broken", kind, indices, request)
    if kind != "idx":
        with pytest.raises(UserError, match="cannot be read as an image"):
            open_images(source)
    for limit in (1 << 30, 0):  # in memory; on disk
        monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
        sets = open_both(source, 0.2, sample=3, cache=PixelCache(tmp_path / "cache"))
        for result, right in zip(sets, expected, strict=True):
            result = pickle.loads(pickle.dumps(result))
            assert result.fingerprint == right.fingerprint and torch.equal(
                result.batch(range(3))["image"], right.batch(range(3))["image"]
            )
            assert (result.class_names, result.captions) == (right.class_names, right.captions)
            assert (
                result.labels is not None
                and right.labels is not None
                and torch.equal(result.labels, right.labels)
            )
    monkeypatch.undo()
    assert [len(images) for images in open_both(whole, 0.2, sample=99)] == [
        len(images) for images in open_both(whole, 0.2)
    ]


def test_folders_saved_by_datasets(datasets: Any, tmp_path: Path) -> None:
    pixels = noise(4, 8, 8)
    whole = table(datasets, tmp_path, pixels)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(
        tmp_path / "both"
    )
    data = open_images(tmp_path / "one")
    assert np.array_equal(bytes_of(data.batch(range(4))["image"])[:, 0], pixels)
    assert len(open_images(tmp_path / "both", split="test")) == 1
    for folder in ("one", "both"):
        with pytest.raises(UserError, match=r"unknown split .* 'validation'"):
            open_images(tmp_path / folder, split="validation")


def test_columns_are_detected_or_refused(datasets: Any, tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", noise(4, 4)).read_bytes()
    datasets.Dataset.from_dict(
        {"image": [file, file], "label": ["shoe", "hat"], "text": ["x", None]}
    ).to_parquet(tmp_path / "b.parquet")
    data = open_images(tmp_path / "b.parquet")
    assert (
        data.class_names == ("hat", "shoe")
        and data.batch([0, 1])["label"].tolist() == [1, 0]
        and data.captions == ["x", ""]
    )
    datasets.Dataset.from_dict({"image": [file, file], "label": [3, None]}).to_parquet(
        tmp_path / "c.parquet"
    )
    numbers = open_images(tmp_path / "c.parquet")
    assert numbers.batch([0, 1])["label"].tolist() == [0, -1] and numbers.class_names == ("3",)
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"no column of images \(found x\)"):
        open_images(tmp_path / "d.parquet")


def test_broken_tables(datasets: Any, tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", noise(8, 8)).read_bytes()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"bytes": file, "path": None}, {"bytes": file[:60], "path": None}, None]
    whole = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 2]}, features)
    whole.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"row 1 of .*b\.parquet cannot be read as an image"):
        open_images(tmp_path / "b.parquet")
    data = open_images(tmp_path / "b.parquet", on_error="skip")
    assert len(data) == 1 and [name.split(" of")[0] for name, _ in data.skipped] == [
        "row 1",
        "row 2",
    ]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"c\.parquet cannot be opened"):
        open_images(tmp_path / "c.parquet")


def test_a_hub_name_that_cannot_be_had(datasets: Any) -> None:
    with pytest.raises(UserError, match="hf:nobody/nothing cannot be opened"):
        open_images("hf:nobody/nothing")


def test_real_clothing(datasets: Any) -> None:
    if not CLOTHING.exists():
        pytest.skip(f"{CLOTHING.name} is not in ../shared/data beside the checkout")
    data = open_images(CLOTHING, size=64, limit=20)
    assert (len(data), data.shape, len(data.class_names)) == (20, (3, 64, 64), 10)
    assert data.captions is not None and data.labels is not None
    for label, caption in zip(data.labels.tolist(), data.captions, strict=True):
        assert data.class_names[label] in caption
    picture = data.batch(range(20))["image"]
    assert picture.std() > 0.2 and os.path.getsize(CLOTHING) > 0
