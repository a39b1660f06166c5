"""The cache of resized pixels against direct decoding: same bits, each original decoded once."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import Transform, images, open_images, pixel_cache
from sfumato.data.pixel_cache import PixelCache, PixelStore
from sfumato.errors import UserError
from sfumato.io.atomic import read_tensors


def fill(root: Path, count: int = 6, grey: int | None = None, seed: int = 0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        pixels = np.random.default_rng(seed + k).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if k == grey else pixels).save(root / f"{k}.png")
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each image that is decoded."""
    calls: list[int] = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda image: calls.append(1) or decode(image))
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    return calls


def test_pixels_on_disk_are_those_in_memory_and_decoded_once(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = fill(tmp_path / "data", grey=2), PixelCache(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(images, "MEMORY_LIMIT", 1 << 30)
        held = open_images(folder, size=8, cache=cache)
    assert not (tmp_path / "cache").exists(), "small data stay in memory"
    decoded.clear()
    mapped = open_images(folder, size=8, cache=cache)
    assert len(decoded) == 6 and type(mapped._pixels) is not type(held._pixels)
    order = [5, 2, 2, 0]
    for result in (mapped, open_images(folder, size=8, cache=cache)):
        assert torch.equal(result.batch(order)["image"], held.batch(order)["image"])
        assert result.fingerprint == held.fingerprint and result.shape == held.shape
    copy = pickle.loads(pickle.dumps(mapped.subset([2, 5])))
    assert torch.equal(copy.batch([1, 0])["image"], held.batch([5, 2])["image"])
    assert len(decoded) == 6, "neither a batch nor opening again decodes"
    assert len(pickle.dumps(mapped)) < 10_000
    open_images(folder, size=9, cache=cache)
    assert len(decoded) == 12, "another size is another transform"


def test_large_originals_are_kept_though_their_pixels_fit(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache")
    monkeypatch.setattr(images, "MEMORY_LIMIT", 6 * 3 * 8 * 8)  # less than the originals
    first, again = (open_images(folder, size=8, cache=cache) for _ in range(2))
    assert len(decoded) == 6
    assert torch.equal(first.batch(range(6))["image"], again.batch(range(6))["image"])


def test_content_is_the_key(tmp_path: Path, decoded: list[int]) -> None:
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache")
    first = open_images(folder, size=8, cache=cache)
    (folder / "5.png").rename(folder / "0a.png")
    moved = open_images(folder, size=8, cache=cache)
    assert len(decoded) == 6, "a file that moved is the same image"
    expected = first.batch([0, 5, 1, 2, 3, 4])["image"]
    assert torch.equal(moved.batch(range(6))["image"], expected)
    path = folder / "1.png"
    before = path.stat()
    data = bytearray(Image.new("RGB", (16, 12), "red").tobytes())
    Image.frombytes("RGB", (16, 12), bytes(data)).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = open_images(folder, size=8, cache=cache)
    assert len(decoded) == 7 and changed.fingerprint != moved.fingerprint
    assert changed.batch([2])["image"][0, 0].min() == 1.0


def test_a_stopped_run_goes_on_behind_its_last_shard(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "SHARD", 2 * 3 * 8 * 8)
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache")
    (folder / "5.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"5\.png cannot be read"):
        open_images(folder, size=8, cache=cache)
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(shards) == 2
    fill(tmp_path / "data")
    decoded.clear()
    whole = open_images(folder, size=8, cache=cache)
    assert len(decoded) == 2, "the last of the third shard, and the mended one"
    for path in shards:
        path.write_bytes(path.read_bytes()[:-1])
    decoded.clear()
    again = open_images(folder, size=8, cache=cache)
    assert len(decoded) == 4 and again.fingerprint == whole.fingerprint


def test_the_size_is_bounded(
    tmp_path: Path, decoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sfumato")
    folder, size = fill(tmp_path / "data"), 6 * 3 * 8 * 8
    small = PixelCache(tmp_path / "small", size - 1)
    lazy = open_images(folder, size=8, cache=small)
    assert "originals are decoded at every start, and at every step where" in caplog.text
    assert not small.place.exists()
    assert "data.cache_size" in caplog.text
    decoded.clear()
    lazy.batch([0, 1])
    assert len(decoded) == 2
    cache = PixelCache(tmp_path / "cache", 4 * size)
    for side in range(8, 16):
        open_images(folder, size=side, cache=cache)
        files = [*cache.place.rglob("*.safetensors")]
        assert sum(f.stat().st_size for f in files) <= cache.limit + 4096 * len(files)
    assert f"are kept in {cache.place}" in caplog.text
    decoded.clear()
    open_images(folder, size=15, cache=cache)
    assert not decoded, "the newest stay"


def test_a_place_that_cannot_be_written_is_logged(
    tmp_path: Path, decoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = fill(tmp_path / "data")
    (tmp_path / "file").write_text("no folder")
    lazy = open_images(folder, size=8, cache=PixelCache(tmp_path / "file" / "cache"))
    assert len(lazy) == 6 and "originals are decoded at every start" in caplog.text
    assert lazy.batch([0])["image"].shape == (1, 3, 8, 8)


SIDE, BYTES = 48, 6 * 3 * 48 * 48
"""A side whose pixels outweigh the headers of the shards, and the bytes of six images."""


@pytest.fixture
def shards_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "SHARD", BYTES // 3)


@pytest.mark.usefixtures("shards_of_two")
def test_a_second_start_removes_no_shard_of_its_own_source(
    tmp_path: Path, decoded: list[int]
) -> None:
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache", BYTES * 3 // 2)
    first = open_images(folder, size=SIDE, cache=cache)
    files = sorted(cache.place.rglob("*.safetensors"))
    decoded.clear()
    again = open_images(folder, size=SIDE, cache=cache)
    assert len(files) == 3 and sorted(cache.place.rglob("*.safetensors")) == files
    assert torch.equal(again.batch(range(6))["image"], first.batch(range(6))["image"])
    assert not decoded


@pytest.mark.usefixtures("shards_of_two")
def test_another_source_of_the_same_transform_makes_room(
    tmp_path: Path, decoded: list[int]
) -> None:
    cache = PixelCache(tmp_path / "cache", BYTES * 3 // 2)
    open_images(fill(tmp_path / "one"), size=SIDE, cache=cache)
    two = fill(tmp_path / "two", seed=9)
    open_images(two, size=SIDE, cache=cache)
    assert sum(f.stat().st_size for f in cache.place.rglob("*.safetensors")) <= cache.limit
    decoded.clear()
    open_images(two, size=SIDE, cache=cache)
    assert not decoded


@pytest.mark.usefixtures("decoded")
def test_shards_that_another_process_removes_are_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache")
    expected = open_images(folder, size=8, cache=cache).batch(range(6))["image"]
    find = PixelStore.find

    def find_and_remove(self: PixelStore, content: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        for path in cache.place.rglob("*.safetensors"):
            path.unlink(missing_ok=True)
        return find(self, content)

    monkeypatch.setattr(PixelStore, "find", find_and_remove)
    images = open_images(folder, size=8, cache=cache)
    assert torch.equal(images.batch(range(6))["image"], expected)


def test_a_cache_that_can_only_be_read_is_read(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache", BYTES * 3 // 2)
    expected = open_images(folder, size=SIDE, cache=cache)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    decoded.clear()
    images = open_images(folder, size=SIDE, cache=cache)
    assert torch.equal(images.batch([5, 0])["image"], expected.batch([5, 0])["image"])
    assert not decoded
    other = open_images(fill(tmp_path / "other", seed=9), size=SIDE + 1, cache=cache)
    assert len(other) == 6 and len(decoded) == 6


@pytest.mark.usefixtures("decoded")
def test_arrays_take_no_room_in_the_cache(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path / "cache", BYTES * 3 // 2)
    open_images(fill(tmp_path / "data"), size=SIDE, cache=cache)
    files = sorted(cache.place.rglob("*.safetensors"))
    pixels = np.zeros((18, 12, 16), np.uint8)
    images.build(images.Listing("array", pixels, str), Transform(SIDE), "raise", cache)
    assert files and sorted(cache.place.rglob("*.safetensors")) == files


@pytest.mark.parametrize("in_memory", [False, True])
def test_pixels_that_changed_on_the_disk_are_decoded_again(
    in_memory: bool, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, cache = fill(tmp_path / "data"), PixelCache(tmp_path / "cache")
    before = open_images(folder, size=8, cache=cache).batch(range(6))["image"].clone()
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    values = read_tensors(shard)["pixels"].numpy().tobytes()
    place = bytes(data).index(values) + 700
    data[place] ^= 16  # one bit of one value
    shard.unlink()  # the first set has it mapped
    shard.write_bytes(data)
    decoded.clear()
    if in_memory:
        monkeypatch.setattr(images, "MEMORY_LIMIT", 1 << 30)
    again = open_images(folder, size=8, cache=cache)
    assert torch.equal(again.batch(range(6))["image"], before)
    assert decoded == [1] and caplog.text.count("has changed on the disk") == 1
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    open_images(folder, size=8, cache=cache)
    assert torch.equal(open_images(folder, size=8, cache=cache).batch(range(6))["image"], before)
