"""Nothing vanishes and nothing slips in: every file of a source is used, or counted with its
reason, and two readings are refused with the setting that decides.
"""

import json
import logging
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.data import Division, ImageSet, Reading, open_both, open_images, open_split
from sfumato.data.columns import class_labels
from sfumato.data.images import spread
from sfumato.data.reading import splits_in
from sfumato.data.splits import divide, numbers, ranges
from sfumato.errors import UserError


def noise(seed: int = 0, side: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save(path: Path, seed: int = 0, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path, format=kind)
    return path


def fill(root: Path, *names: str, kind: str | None = None) -> Path:
    """Images of different pixels with these paths."""
    for seed, name in enumerate(names):
        save(root / name, seed + 100 * len(name), kind)
    return root


def names_of(images: ImageSet) -> list[str]:
    assert images.labels is not None
    return [images.class_names[k] if k >= 0 else "" for k in images.labels.tolist()]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sfumato")
    return caplog


# ---- files ---------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_counted_in_one_line(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "cat/1.jpg", "dog/1.jpg")
    for name in ("cat/1.heic", "cat/2.HEIC", "dog/3.mp4", "dog/.DS_Store", "dog/._1.jpg"):
        (tmp_path / name).write_bytes(b"\0" * 20)
    fill(tmp_path, "@eaDir/cat/a.jpg", "__MACOSX/cat/b.jpg", "dog/.ipynb_checkpoints/c.jpg")
    save(tmp_path / "dog" / "2.THM", kind="JPEG")
    save(tmp_path / "dog" / "1.jpg~", kind="JPEG")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    images = open_images(tmp_path)
    assert len(images) == 2 and images.class_names == ("cat", "dog")
    (line,) = [r.getMessage() for r in log.records if "left out" in r.getMessage()]
    for part in (
        "left out 11 files", ".heic 2", ".mp4 1", "hidden 2", "in @eaDir 1", "in __MACOSX 1",
        "in .ipynb_checkpoints 1", ".thm 1", ".jpg~ 1", "convert .heic to JPEG",
    ):  # fmt: skip
        assert part in line, (part, line)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.jpg_large", "JPEG"), ("a", "PNG"),
     ("a.heic", "JPEG"), ("a.dat", "WEBP"), ("a.PNG", "JPEG")],
)  # fmt: skip
def test_content_decides_and_not_the_ending_alone(tmp_path: Path, name: str, kind: str) -> None:
    save(tmp_path / name, kind=kind)
    assert len(open_images(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_counted_and_not_waited_for(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.png")
    for name in ("b.png", "a.txt", "c"):
        os.mkfifo(tmp_path / name)
    assert len(open_images(tmp_path)) == 1
    assert "left out 3 files" in log.text and "no plain file 3" in log.text


def test_a_stray_state_json_is_no_saved_dataset(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "state.json").write_text("{}")
    assert len(open_images(tmp_path)) == 1 and ".json 1" in log.text


def test_raw_files_of_cameras_do_not_slip_in_by_their_previews(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.png")
    save(tmp_path / "b.nef", kind="TIFF")
    assert len(open_images(tmp_path)) == 1 and ".nef 1" in log.text


def test_broken_images_are_one_line(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "good.png")
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(b"")
    images = open_images(tmp_path, on_error="skip")
    assert len(images) == 1 and len(images.skipped) == 5
    lines = [r.getMessage() for r in log.records if "left out" in r.getMessage()]
    assert (
        len(lines) == 1 and "left out 5 images" in lines[0] and "the file is empty (5:" in lines[0]
    )


# ---- layouts -------------------------------------------------------------------------------------


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    fill(tmp_path, "bus/1.png", "tram/2.png", "train/3.png")
    with pytest.raises(UserError, match=r"train/.*splits.*bus/, tram/.*layout=classes"):
        open_images(tmp_path)
    classes = open_images(tmp_path, reading=Reading("classes"))
    assert names_of(classes) == ["bus", "train", "tram"]
    with pytest.raises(UserError, match=r"layout=splits"):
        open_images(tmp_path / "bus", reading=Reading("splits"))
    assert len(open_images(tmp_path, reading=Reading("flat"))) == 3


def test_a_layout_of_splits_counts_the_others(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "bus/1.png", "tram/2.png", "train/3.png", "4.png")
    for name in ("bus/1.txt", "4.txt", "train/3.txt"):
        (tmp_path / name).write_text("a caption")
    only = open_images(tmp_path, reading=Reading("splits"))
    assert len(only) == 1 and only.labels is None and only.captions == ["a caption"]
    assert "left out 5 files" in log.text and "in bus/ (no split) 2" in log.text
    assert "beside the splits (no split) 2" in log.text


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "TESTING"), ("train", "val")])
def test_splits_have_other_names(tmp_path: Path, names: tuple[str, str]) -> None:
    fill(tmp_path, f"{names[0]}/cat/1.png", f"{names[0]}/dog/2.png", f"{names[1]}/cat/3.png")
    training, held_out = open_both(tmp_path)
    assert names_of(training) == ["cat", "dog"] and names_of(held_out) == ["cat"]
    assert held_out.class_names == ("cat", "dog")


@pytest.mark.parametrize("first", ["cat/train/1.png", "cat/1.png"])
def test_splits_inside_of_classes_are_refused(tmp_path: Path, first: str) -> None:
    fill(tmp_path, first, "cat/Test/2.png", "dog/train/3.png", "dog/Test/4.png")
    with pytest.raises(UserError, match=r"dog/Test.*above the classes.*layout=classes"):
        open_images(tmp_path)
    together = open_images(tmp_path, reading=Reading("classes"))
    assert names_of(together) == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize("inner", ["train", "bus"])
def test_other_folders_inside_of_classes_are_read(tmp_path: Path, inner: str) -> None:
    fill(tmp_path, f"tram/{inner}/1.png", "tram/old/2.png", "ship/train/3.png")
    assert names_of(open_images(tmp_path)) == ["ship", "tram", "tram"]


def test_images_without_a_class_are_counted(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "1.png", "2.png", "3.png")
    rows = [{"file_name": "1.png", "label": "cat"}, {"file_name": "2.png", "label": None}]
    rows.append({"file_name": "3.png", "label": "dog"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert names_of(open_images(tmp_path)) == ["cat", "", "dog"]
    assert "1 of 3 images have no class" in log.text


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "val/2.png", "validation/3.png")
    with pytest.raises(UserError, match="val/ and validation/, which all mean the split valid"):
        open_images(tmp_path)


def test_a_split_that_is_not_used_is_logged(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "train/1.png", "test/2.png", "val/3.png")
    open_both(tmp_path)
    assert "not used: validation" in log.text
    assert "1 training images, 1 held out (the split test)" in log.text


def test_a_folder_around_classes_is_not_one_class(tmp_path: Path) -> None:
    fill(tmp_path, "pets/cat/1.png", "pets/dog/2.png")
    with pytest.raises(UserError, match=r"holds one folder, pets/, .*cat, dog.*layout=classes"):
        open_images(tmp_path)
    assert open_images(tmp_path, reading=Reading("classes")).class_names == ("pets",)
    assert open_images(tmp_path, reading=Reading("flat")).labels is None


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png"])
def test_further_frames_are_mentioned(
    tmp_path: Path, log: pytest.LogCaptureFixture, kind: str
) -> None:
    frames = [Image.fromarray(noise(seed)) for seed in (1, 2)]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], format=kind)
    frames[0].save(tmp_path / f"b.{kind}", format=kind)
    frames[0].save(tmp_path / "c.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert len(open_images(tmp_path)) == 3
    named = f"1 images of {tmp_path.name} have further frames or pages, which are not read: "
    assert f"{named}{tmp_path / f'a.{kind}'}\n" in log.text


@pytest.mark.parametrize("names", [("images", "masks"), ("IMG", "reg"), ("depth", "photos")])
def test_a_folder_of_all_images_is_no_class(tmp_path: Path, names: tuple[str, str]) -> None:
    fill(tmp_path, f"{names[0]}/1.png", f"{names[1]}/1.png")
    with pytest.raises(UserError, match=r"may be all images.*layout=classes.*layout=flat"):
        open_images(tmp_path)
    assert open_images(tmp_path, reading=Reading("classes")).class_names == names
    assert open_images(tmp_path, reading=Reading("flat")).labels is None
    storage = next(name for name in names if name not in ("masks", "reg", "depth"))
    assert len(open_images(tmp_path / storage)) == 1
    other = next(name for name in names if name != storage)
    shutil.rmtree(tmp_path / other)
    (tmp_path / other).mkdir()
    (tmp_path / other / "1.txt").write_text("0 0.5 0.5 1 1")
    assert open_images(tmp_path).labels is None


@pytest.mark.parametrize("end", ["-masklabel", "-condlabel", "_mask"])
def test_masks_beside_images_are_left_out(
    tmp_path: Path, log: pytest.LogCaptureFixture, end: str
) -> None:
    fill(tmp_path, "1.jpg", f"1{end}.png", f"2{end}.png")
    assert open_images(tmp_path).rows.tolist() == [0, 1]
    assert f"left out 1 file of {tmp_path}: {end} of an image 1" in log.text


def test_repeats_in_names_of_folders_are_mentioned(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "10_sks cat/1.png", "1_cat/2.png", "3/4.png")
    assert open_images(tmp_path).class_names == ("10_sks cat", "1_cat", "3")
    assert "folders (10_sks cat, 1_cat) are no repeats here" in log.text


def test_classes_of_almost_one_name_are_mentioned(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "Cat/1.png", "cat/2.png", "dog /3.png", "dog/4.png", "cow/5.png")
    assert len(open_images(tmp_path).class_names) == 5
    assert "almost the same stay apart: 'Cat' and 'cat', 'dog' and 'dog '" in log.text


def test_images_beside_folders_can_be_read_flat(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "more/2.png")
    with pytest.raises(UserError, match="layout=flat"):
        open_images(tmp_path)
    assert len(open_images(tmp_path, reading=Reading("flat"))) == 2


def test_class_folders_without_images_are_named(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "a.heic").write_bytes(b"x")
    assert open_images(tmp_path).class_names == ("cat", "dog")
    assert "without a readable image are no classes: eel" in log.text


# ---- captions ------------------------------------------------------------------------------------


def test_all_captions_of_an_image_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    rows = [("a.png", "one"), ("b.png", "x"), ("a.png", "two"), ("a.png", "two")]
    text = "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows)
    (tmp_path / "metadata.jsonl").write_text(text)
    images = open_images(tmp_path)
    assert images.caption_choices == [("one", "two"), ("x",)]
    assert images.captions == ["one", "x"]
    assert images.subset([1, 0]).caption_choices == [("x",), ("one", "two")]
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": ["p", "q"]}\n{"file_name": "b.png", "text": null}'
    )
    assert open_images(tmp_path).caption_choices == [("p", "q"), ("",)]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 3}')
    with pytest.raises(UserError, match=r"caption '3' of type int in column text"):
        open_images(tmp_path, on_error="skip")


def test_text_files_beside_images_are_captions(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.png", "b.jpg", "c.png")
    (tmp_path / "a.txt").write_text("\ufeffa cat\n\na second line\n", encoding="utf-8")
    (tmp_path / "b.jpg.txt").write_text("größe")
    (tmp_path / "c.caption").write_text("sea")
    (tmp_path / "readme.txt").write_text("no caption")
    (tmp_path / "a.txt").rename(tmp_path / "a.TXT")
    images = open_images(tmp_path)
    assert images.caption_choices == [("a cat", "a second line"), ("größe",), ("sea",)]
    assert "left out 1 file of" in log.text and ".txt 1" in log.text
    assert open_images(tmp_path, reading=Reading(caption_column="none")).captions is None
    (tmp_path / "c.txt").write_text("sky")
    with pytest.raises(UserError, match=r"c\.txt and c\.caption"):
        open_images(tmp_path)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "c.caption").unlink()
    with pytest.raises(UserError, match=r"c\.png: it has no file of captions, which 2 other"):
        open_images(tmp_path)
    assert len(open_images(tmp_path, on_error="skip")) == 2
    (tmp_path / "a.TXT").unlink()
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        open_images(tmp_path, on_error="skip")


def test_metadata_and_text_files_are_two_readings(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "metadata.csv").write_text("file_name,text,label\na.png,inside,cat\n")
    with pytest.raises(UserError, match="caption_column=text or caption_column=sidecar"):
        open_images(tmp_path)
    for column, caption in (("text", "inside"), ("sidecar", "beside")):
        images = open_images(tmp_path, reading=Reading(caption_column=column))
        assert images.captions == [caption] and images.class_names == ("cat",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    with pytest.raises(UserError, match=r"metadata\.csv and metadata\.jsonl, two files"):
        open_images(tmp_path)


def test_metadata_one_folder_up_is_read(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "train/a.png", "test/b.png")
    rows = [{"file_name": f"{s}.png", "caption": s} for s in ("train/a", "test\\b")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [s.captions for s in open_both(tmp_path)] == [["train/a"], ["test\\b"]]
    assert open_images(tmp_path / "train").captions == ["train/a"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "other.png", "text": "x"}')
    assert open_images(tmp_path / "train").captions is None
    assert "names no image of" in log.text
    (tmp_path / "metadata.jsonl").write_text("a file of another program")
    assert open_images(tmp_path / "train").captions is None, "outside of the source: no error"
    assert "metadata.jsonl is not read" in log.text
    with pytest.raises(UserError, match=r"metadata\.jsonl cannot be read"):
        open_images(tmp_path)


def test_metadata_lie_in_class_folders_and_in_parquet(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/a.png")
    for name in ("cat", "dog"):
        (tmp_path / name / "metadata.csv").write_text(f"file_name,text\na.png,my {name}\n")
    images = open_images(tmp_path)
    assert images.captions == ["my cat", "my dog"] and names_of(images) == ["cat", "dog"]
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/a.png,x\n")
    with pytest.raises(UserError, match="keep those of one file"):
        open_images(tmp_path)
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for path in tmp_path.rglob("metadata.csv"):
        path.unlink()
    table = arrow.table({"file_name": ["cat/a.png", "dog/a.png"], "text": ["p", "q"]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert open_images(tmp_path).captions == ["p", "q"]


def test_classes_of_metadata_and_of_folders_must_agree(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,label\ncat/a.png,cat\ndog/b.png,dog\n")
    assert names_of(open_images(tmp_path)) == ["cat", "dog"]
    metadata.write_text("file_name,label\ncat/a.png,red\ndog/b.png,blue\n")
    with pytest.raises(UserError, match="layout=flat for the column, or label_column=none"):
        open_images(tmp_path)
    assert names_of(open_images(tmp_path, reading=Reading("flat"))) == ["red", "blue"]
    folders = open_images(tmp_path, reading=Reading(label_column="none"))
    assert names_of(folders) == ["cat", "dog"]
    with pytest.raises(UserError, match="unknown label_column"):
        open_images(tmp_path, reading=Reading(label_column="lable"))
    metadata.unlink()
    with pytest.raises(UserError, match=r"label_column=label: .* has no metadata"):
        open_images(tmp_path, reading=Reading(label_column="label"))


def test_metadata_that_is_not_read_leaves_no_image_out(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\ngone.png,y\n")
    images = open_images(tmp_path, reading=Reading(caption_column="none"))
    assert len(images) == 2 and images.captions is None
    assert "left out 1 file of" in log.text and "metadata not read 1" in log.text


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (("10", "2.0"), [1, 0], ("2", "10")),
        (("1.0", "-1"), [0, -1], ("1",)),
        (("3", ""), [0, -1], ("3",)),
        (("NaN", "0"), [-1, 0], ("0",)),
        (("007", "7"), [0, 1], ("007", "7")),
        (("1e", "-1"), [1, 0], ("-1", "1e")),
        (("0.25", "1"), None, ("such as '0.25'",)),
        (("-7", "1"), None, ("reaches -7",)),
    ],
)
def test_numbers_in_a_csv_are_those_of_other_tables(
    tmp_path: Path, values: tuple[str, str], labels: list[int] | None, classes: tuple[str, ...]
) -> None:
    fill(tmp_path, "a.png", "b.png")
    lines = [f"{name}.png,{value}" for name, value in zip("ab", values, strict=True)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    if labels is None:
        with pytest.raises(UserError, match=classes[0]):
            open_images(tmp_path)
        return
    images = open_images(tmp_path)
    assert images.labels is not None and images.labels.tolist() == labels
    assert images.class_names == classes


def test_a_missing_label_is_no_class(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "label": float("nan")}, {"file_name": "b.png", "label": 4.0}]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)))
    assert names_of(open_images(tmp_path)) == ["", "4"]
    rows = [{"file_name": "a.png", "label": k} for k in (0, 1.0)]
    metadata.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"a\.png has rows of several classes, '0' and '1'"):
        open_images(tmp_path)


def test_messages_about_metadata_name_the_image_and_the_line(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    for name, file, value in (("cat", "a.png", '"x"'), ("dog", "b.png", "3")):
        text = f'\n{{"file_name": "{file}", "text": {value}}}\n'
        (tmp_path / name / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"dog/b\.png has the caption '3' of type int"):
        open_images(tmp_path)
    place = tmp_path / "dog" / "metadata.jsonl"
    place.write_text('\n{"file_name": "b.png", "text": "x"}\n{"file_name": b}\n')
    with pytest.raises(UserError, match=r"dog/metadata\.jsonl cannot be read \(line 3: "):
        open_images(tmp_path)
    place.write_text('{"file_name": "b.png", "text": "x"}', encoding="utf-16")
    with pytest.raises(UserError, match=r"dog/metadata\.jsonl is not UTF-8 .*save it in this"):
        open_images(tmp_path)


def test_names_of_folders_and_of_a_column_agree_in_either_form(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """macOS decomposes names of folders: "é" is then two characters."""
    fill(tmp_path, "cafe\u0301/a.png", "dog/b.png", "caf\u00e9/c.png")
    assert names_of(open_images(tmp_path)) == ["caf\u00e9", "caf\u00e9", "dog"]
    assert "3 images; 2 classes from subfolders (caf\u00e9, dog)" in log.text
    shutil.rmtree(tmp_path / "caf\u00e9")
    text = "file_name,label\ncafe\u0301/a.png,caf\u00e9\ndog/b.png,dog\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    assert names_of(open_images(tmp_path)) == ["caf\u00e9", "dog"]


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_the_sign_between_columns(tmp_path: Path, sign: str) -> None:
    """Spreadsheets of some languages write semicolons; a caption may hold other signs."""
    fill(tmp_path, "a.png", "b.png")
    rows = [["file_name", "text"], ["a.png", f'"one{sign} two"'], ["b.png", "x: y | z"]]
    text = "".join(f"{sign.join(row)}\n" for row in rows)
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8-sig")
    assert open_images(tmp_path).captions == [f"one{sign} two", "x: y | z"]


@pytest.mark.parametrize("header", ["file_name;text\tlabel", "file_name;text,label"])
def test_several_signs_between_columns(tmp_path: Path, header: str) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(f"{header}\na.png;x,y\n")
    with pytest.raises(UserError, match=r"metadata.csv has .* between the names of its columns"):
        open_images(tmp_path)


# ---- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([1.0, float("nan"), 0.0], [1, -1, 0], ("0", "1")),
        ([True, None, False], [1, -1, 0], ("false", "true")),
        ([7, 3, 7, -1], [1, 0, 1, -1], ("3", "7")),
        (["b", "", "a", None, " a "], [1, -1, 0, -1, 0], ("a", "b")),
        ([None, None], None, ()),
    ],
)
def test_values_of_a_label_column(
    values: list[Any], labels: list[int] | None, classes: tuple[str, ...]
) -> None:
    assert class_labels(values, "label", "x") == (labels, classes)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.25, 1.0], "values such as '0.25'.*label_column=none"),
        ([[1, 2]], r"values such as '\[1, 2\]'"),
        (["a", 1], "mixes values of int and str"),
        ([100_001], "reaches 100001"),
        ([-7, 3], "reaches -7"),
    ],
)
def test_values_that_are_no_classes(values: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        class_labels(values, "label", "x")


def write_parquet(path: Path, count: int = 2, **columns: list[Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    files = [save(path.parent / "loose" / f"{k}.png", k).read_bytes() for k in range(count)]
    shutil.rmtree(path.parent / "loose", ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"image": files, **columns}), path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.mark.usefixtures("cache")
def test_columns_of_a_table(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "a.parquet"
    write_parquet(place, label=[0.0, 1.0], caption=[["p", "q"], []], url=["u", "v"])
    images = open_images(place)
    assert names_of(images) == ["0", "1"] and images.caption_choices == [("p", "q"), ("",)]
    assert "classes from column label; captions from column caption; not read: url" in log.text
    assert "1 of 2 captions are empty; 1 images have several" in log.text
    write_parquet(place, label=[0.5, 1.0])
    with pytest.raises(UserError, match=r"column label .* such as '0.5'"):
        open_images(place)
    plain = open_images(place, reading=Reading(label_column="none"))
    assert plain.labels is None
    write_parquet(place, fine_label=["a", "b"], category=["c", "d"], text=["s", "t"])
    with pytest.raises(UserError, match=r"hold labels \(fine_label, category\).*label_column"):
        open_images(place)
    images = open_images(place, reading=Reading(label_column="category"))
    assert images.class_names == ("c", "d")
    write_parquet(place, text=["s", "t"], prompt=["u", "v"])
    with pytest.raises(UserError, match=r"hold captions \(text, prompt\).*caption_column=text"):
        open_images(place)
    write_parquet(place, text=[1, 2])
    with pytest.raises(UserError, match="caption '1' of type int in column text"):
        open_images(place)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([b"a", b"b"], "holds a list of 2: expected the bytes of one image"),
        (7, "holds 7: expected the bytes"),
        ("https://a.example/b.png", "holds .*no file here.*not downloaded"),
        ("no-such.png", r"holds 'no-such.png', no file here"),
    ],
)
def test_values_that_are_no_images(tmp_path: Path, value: Any, says: str) -> None:
    pa = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [value]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"row 0 of .*column image {says}"):
        open_images(tmp_path / "a.parquet")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "train"), [("pets", "pets-train"), ("pets-test", "pets-train"), ("train", "train")]
)
def test_the_remedy_for_a_missing_split_names_another_file(
    tmp_path: Path, name: str, train: str
) -> None:
    place = write_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="unknown split") as error:
        open_images(place, split="validation")
    other = train.replace("train", "validation")
    assert f"{other}.parquet" in str(error.value)
    write_parquet(tmp_path / f"{train}.parquet")
    write_parquet(tmp_path / f"{other}.parquet", count=1)
    assert len(open_images(tmp_path / f"{train}.parquet", split="validation")) == 1


@pytest.mark.usefixtures("cache")
def test_a_saved_dataset_keeps_validation_beside_val(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    files = [save(tmp_path / f"{k}.png", k).read_bytes() for k in range(6)]
    rows = [{"bytes": file, "path": None} for file in files]
    whole = datasets.Dataset.from_dict({"image": rows}, features)
    parts = {"train": range(3), "val": range(3, 5), "validation": range(5, 6)}
    splits = datasets.DatasetDict({name: whole.select(part) for name, part in parts.items()})
    splits.save_to_disk(tmp_path / "saved")
    counts = {name: len(open_images(tmp_path / "saved", split=name)) for name in parts}
    assert counts == {"train": 3, "val": 2, "validation": 1}
    assert len(open_both(tmp_path / "saved")[1]) == 1 and "not used: val" in log.text


@pytest.mark.usefixtures("cache")
def test_a_parquet_replaced_by_one_of_equal_size_and_time_is_seen(tmp_path: Path) -> None:
    place = write_parquet(tmp_path / "a.parquet", text=["one", "two"])
    before = place.stat()
    assert open_images(place).captions == ["one", "two"]
    write_parquet(place, text=["six", "ten"])
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = place.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert open_images(place).captions == ["six", "ten"]


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train-00000-of-00001", {"train"}),
        ("pets_Val2017", {"validation"}),
        ("constrained", set()),
        ("latest.test", {"test"}),
        ("greatest-hits", set()),
        ("train-test", {"train", "test"}),
    ],
)
def test_a_split_is_a_word_of_the_name(name: str, splits: set[str]) -> None:
    assert splits_in(name)[0] == splits


@pytest.mark.usefixtures("cache")
def test_folders_of_parquet_files(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    for k in (0, 1):
        write_parquet(data / f"train-0000{k}-of-00002.parquet", text=[f"{k}a", f"{k}b"])
    write_parquet(data / "validation-00000-of-00001.parquet", text=["va", "vb"])
    training, held_out = open_both(tmp_path)
    assert training.captions == ["0a", "0b", "1a", "1b"]
    # the same pixels as in training: all held-out images are copies
    assert held_out.captions == ["va", "vb"] and "are copies of training images" in log.text
    (data / "train-00001-of-00002.parquet").rename(tmp_path / "shard")
    with pytest.raises(UserError, match="has 1 of 2 shards of train: number 1 is missing"):
        open_images(tmp_path)
    open_images(data / "train-00000-of-00002.parquet")
    assert "is shard 00000 of 00002: it is read alone" in log.text
    (tmp_path / "shard").rename(data / "more.parquet")
    with pytest.raises(UserError, match=r"more\.parquet, which name no split"):
        open_images(tmp_path)
    (data / "more.parquet").unlink()
    (data / "train-00000-of-00002.parquet").rename(data / "train-a.parquet")
    write_parquet(data / "train-b.parquet", caption=["x", "y"])
    with pytest.raises(UserError, match=r"train-b\.parquet differ in the columns caption, text"):
        open_images(tmp_path)
    write_parquet(data / "train-b.parquet", count=0, text=[])
    assert open_images(tmp_path).captions == ["0a", "0b"] and "no rows 1" in log.text
    (data / "readme.txt").write_text("no caption")
    (data / "metadata.csv").write_text("file_name,text\na.png,x\n")
    open_images(tmp_path)
    assert "text files beside the tables 1, metadata beside the tables 1" in log.text
    fill(tmp_path, "assets/logo.png")
    with pytest.raises(UserError, match=r"3 parquet files .* and 1 image files"):
        open_images(tmp_path)


# ---- limit and split -----------------------------------------------------------------------------


def test_a_limit_is_spread_over_the_classes() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10
    for limit in (3, 10, 50):
        chosen = spread(labels, 100, limit)
        assert len(set(chosen.tolist())) == limit and chosen.tolist() == sorted(chosen)
        counts = Counter(labels[i] for i in chosen)
        assert len(counts) == 3
        assert all(abs(counts[k] - limit * n / 100) <= 1.5 for k, n in enumerate((60, 30, 10)))
    assert spread(labels, 100, 10).tolist() == spread(labels, 100, 10).tolist()
    assert spread(None, 100, 10).max() > 50, "not the first ones"
    assert spread(labels, 100, 100).tolist() == list(range(100))


def test_limit_opens_images_of_every_class(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{k}.png" for name in ("a", "b", "c") for k in range(6)))
    assert Counter(names_of(open_images(tmp_path, limit=6))) == dict.fromkeys("abc", 2)


def digests(*groups: int) -> np.ndarray:
    return np.repeat(np.array(groups, np.uint8)[:, None], 32, axis=1)


def test_without_copies_the_split_is_a_random_share() -> None:
    import torch

    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    kept, held = divide(50, 0.1, torch.zeros(50, dtype=torch.int64), digests(*range(50)))
    assert held.tolist() == sorted(order[:5].tolist())
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(50))


@pytest.mark.parametrize("share", [0.1, 0.34, 0.5, 0.9])
def test_copies_are_never_on_both_sides_and_no_class_is_emptied(share: float) -> None:
    import torch

    draw = np.random.default_rng(0)
    for _ in range(30):
        labels = torch.from_numpy(draw.integers(-1, 6, 24))
        groups = draw.integers(0, 14, 24)
        kept, held = divide(24, share, labels, digests(*groups.tolist()))
        assert sorted([*kept.tolist(), *held.tolist()]) == list(range(24)) and len(held)
        assert not set(groups[kept]) & set(groups[held])
        assert set(labels.tolist()) - {-1} <= set(labels[kept].tolist())


def test_nothing_is_held_out_where_it_would_empty_a_class(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    training, held_out = open_both(tmp_path)
    assert len(training) == 3 and training.class_names == ("a", "b", "c") and len(held_out) == 1
    assert "without emptying a class" in log.text
    first = open_split(tmp_path)
    record = Division.from_json(json.loads(json.dumps(first.division.to_json())))
    again = open_split(tmp_path, division=record)
    assert again.division == record == first.division and again.division.shared
    assert again.training.fingerprint == training.fingerprint
    assert again.held_out.fingerprint == held_out.fingerprint
    assert "they were trained on too" in log.text and "copies" not in log.text
    save(tmp_path / "a" / "copy.bmp", 0)
    shutil.copy(tmp_path / "b" / "2.png", tmp_path / "b" / "again.png")
    training, _ = open_both(tmp_path, 0.5)
    assert training.class_names == ("a", "b", "c")


def test_a_copy_in_the_test_split_is_left_out(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    Image.open(tmp_path / "train" / "2.png").save(tmp_path / "test" / "same.bmp")
    training, held_out = open_both(tmp_path)
    assert (len(training), len(held_out)) == (2, 1)
    assert "left out 1 held-out images: copies of training images" in log.text


def test_classes_without_images_are_named_and_left_out(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "train/c/5.png")
    fill(tmp_path, "test/c/7.png", "test/z/9.png")
    (tmp_path / "train" / "b" / "2.png").write_bytes(b"broken")
    training, held_out = open_both(tmp_path, on_error="skip")
    assert names_of(training) == ["a", "c", "c"] and training.class_names == ("a", "c")
    assert names_of(held_out) == ["c"] and held_out.class_names == ("a", "c")
    assert "classes without images are left out: b" in log.text
    assert "left out 1 held-out images: their classes have no training image (z)" in log.text


def test_ranges() -> None:
    rows = [3, 17, 40, 41, 42]
    assert ranges(rows) == "3,17,40-42" and numbers("3,17,40-42") == rows
    assert ranges([]) == "" and numbers("") == []


def test_a_division_finds_the_same_images_again(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "p", *(f"{name}/{k}.png" for name in ("a", "b") for k in range(10)))
    shutil.copy(tmp_path / "p" / "a" / "1.png", tmp_path / "p" / "a" / "11.png")
    (tmp_path / "p" / "b" / "3.png").write_bytes(b"broken")
    first = open_split(tmp_path / "p", 0.3, limit=16, on_error="skip")
    record = Division.from_json(json.loads(json.dumps(first.division.to_json())))
    assert record == first.division and str(tmp_path) not in json.dumps(record.to_json())
    shutil.move(tmp_path / "p", tmp_path / "moved")
    again = open_split(tmp_path / "moved", division=record)
    assert again.training.fingerprint == first.training.fingerprint
    assert again.held_out.fingerprint == first.held_out.fingerprint
    assert "those that the model's training held out" in log.text
    some = open_split(tmp_path / "moved", division=record, sample=2)
    assert len(some.held_out) == 2
    assert set(some.held_out.rows.tolist()) <= set(first.held_out.rows.tolist())
    assert replace(again.division, source="p") == record
    assert "too good" not in log.text
    other = open_split(tmp_path / "moved", 0.5, division=record)
    assert {*other.held_out.rows.tolist()} & {*first.training.rows.tolist()}
    assert "other images" in log.text and "too good" in log.text
    (tmp_path / "moved" / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        open_split(tmp_path / "moved", division=record)
    assert "is not what the model was trained on" in log.text
    with pytest.raises(UserError, match="record of its training images is damaged"):
        Division.from_json({"source": "x", "images": 3, "identity": "", "held_out": "a-b"})


def test_the_settings_of_a_division_are_those_of_its_data_alone(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "p", "train/a/1.png", "train/b/2.png", "train/b/3.png", "extra/a/5.png")
    reading = Reading("splits", label_column="none")
    division = open_split(tmp_path / "p", 0.4, reading=reading).division
    assert open_split(tmp_path / "p", division=division).division == division
    fill(tmp_path / "q", "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png")
    other = open_split(tmp_path / "q", division=division)
    assert other.training.class_names == ("cat", "dog") and other.division.reading is None
    assert other.division.share == 0.02 and "is not what the model was trained on" in log.text
    mine = Reading(label_column="none")
    (tmp_path / "q" / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{n},x\n" for n in ("cat/1.png", "cat/2.png"))
    )
    assert len(open_split(tmp_path / "q", division=division, reading=mine).training) == 3


def test_a_share_without_effect_is_logged(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    from sfumato.train import DataSettings

    fill(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    data = DataSettings(str(tmp_path), size=4)
    division = data.split().division
    open_split(tmp_path, division=division)
    assert "no effect" not in log.text
    DataSettings(str(tmp_path), size=4, held_out=0.4).split()
    says = f"a held-out share of 0.4 has no effect: the split test of {tmp_path} is held out"
    assert says in log.text
    log.clear()
    open_split(tmp_path, 0.4, division=division)
    assert says in log.text
    log.clear()
    DataSettings(str(tmp_path), size=4, held_out=0.4, buckets=2).open_buckets()
    assert says in log.text


def test_a_model_keeps_its_division_and_evaluate_uses_it(
    tmp_path: Path, tiny: Path, log: pytest.LogCaptureFixture
) -> None:
    from sfumato import load
    from sfumato.cli.evaluate import Evaluate, _images

    fill(tmp_path / "p", *(f"{c}/{k}.png" for c in ("bag", "boot", "train") for k in range(5)))
    reading = Reading("classes")
    split = open_split(tmp_path / "p", 0.4, limit=12, size=8, reading=reading)
    model = replace(load(tiny), training_data=split.division.to_json())
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.training_data == model.training_data and again.hash == model.hash
    assert "training_data" not in json.loads((tiny / "model_index.json").read_text())["_sfumato"]
    sets = _images(again, Evaluate(model="model", data=str(tmp_path / "p")))
    for images, right in zip(sets, (split.training, split.held_out), strict=True):
        assert images.rows.tolist() == right.rows.tolist()
        assert images.class_names == ("bag", "boot", "train")
    assert "those that the model's training held out" in log.text
    anew = _images(again, Evaluate(model="model", data=str(tmp_path / "p"), held_out=0.2))
    assert len(anew[1]) == 2, "an option divides them anew"
