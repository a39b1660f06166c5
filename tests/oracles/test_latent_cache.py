"""The latent cache against direct computation, and against everything that can go wrong with
files.
"""

import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.data import ImageSet, LatentSet, cache_latents, open_images
from sfumato.errors import NumericalError, UserError


def digits(
    folder: Path,
    count: int = 50,
    *,
    seed: int = 0,
    touch: bool = False,
    size: int | None = None,
    flip: bool = False,
) -> ImageSet:
    """Random IDX images, 8x8; `touch` changes one pixel of the last by one."""
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 8, 8), dtype=np.uint8)
    pixels[-1, 3, 3] += touch
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (
        ("images-idx3", pixels),
        ("labels-idx1", np.arange(count, dtype=np.uint8) % 10),
    ):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (folder / f"train-{name}-ubyte").write_bytes(header + values.tobytes())
    return open_images(folder, size=size, flip=flip)


class Encoder:
    """A tiny exact encoder, (B, 1, 8, 8) -> (B, 4, 4, 4), that counts images.

    It may act after some batches.
    """

    def __init__(
        self, after: int = -1, then: Callable[[], object] | None = None, shift: float = 0.0
    ):
        self.seen, self.calls, self.after, self.then, self.shift = 0, 0, after, then, shift

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.calls == self.after and self.then is not None:
            self.then()
        self.calls += 1
        self.seen += len(image)
        assert not torch.is_grad_enabled()
        mean = torch.nn.functional.pixel_unshuffle(image, image.shape[-1] // 4)[
            :, :4
        ] * torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1)
        return mean + self.shift, 0.1 + mean.abs()


def interrupt() -> None:
    raise KeyboardInterrupt


def same(latents: LatentSet, images: ImageSet, shift: float = 0.0) -> bool:
    """True if every latent is the encoder's, read in a random order with repeats."""
    order = torch.randint(
        0, len(images), (2 * len(images),), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        mean, std = Encoder(shift=shift)(images.batch(order)["image"])
    result = latents.batch(order)
    return (
        torch.equal(result["mean"], mean)
        and torch.equal(result["std"], std)
        and torch.equal(result["label"], images.batch(order)["label"])
    )


def build(
    images: ImageSet, folder: Path, encode: Encoder | None = None, **changes: object
) -> LatentSet:
    return cache_latents(
        images, encode or Encoder(), "enc", folder, **{"batch_size": 4, "shard_size": 16, **changes}
    )  # pyright: ignore


@pytest.mark.parametrize(
    ("batch_size", "shard_size"), [(4, 16), (7, 20), (64, 10), (256, 8192), (1, 1)]
)
def test_the_cache_is_the_encoder(tmp_path: Path, batch_size: int, shard_size: int) -> None:
    images = digits(tmp_path / "data")
    latents = build(images, tmp_path / "cache", batch_size=batch_size, shard_size=shard_size)
    assert (len(latents), latents.shape, latents.class_names) == (50, (4, 4, 4), images.class_names)
    assert same(latents, images)
    files = sorted(p.name for p in (tmp_path / "cache" / latents.key[:16]).iterdir())
    assert files == [
        "index.json",
        *(f"shard-{i:05d}.safetensors" for i in range(-(-50 // shard_size))),
    ]
    again = Encoder()
    assert (
        same(build(images, tmp_path / "cache", again, shard_size=shard_size), images)
        and again.seen == 0
    )
    with pytest.raises(IndexError, match=r"there are 0\.\.49"):
        latents.batch([50])


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_are_those_of_the_whole(tmp_path: Path, offset: float) -> None:
    """Law of total variance, by hand in float64; the offset would ruin E[x^2] - E[x]^2 in
    float32.
    """
    images = digits(tmp_path / "data", 2500)
    latents = build(
        images, tmp_path / "cache", Encoder(shift=offset), batch_size=500, shard_size=900
    )
    every = latents.batch(range(2500))
    mean = every["mean"].double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    noise = every["std"].double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    result_mean, result_std = latents.statistics()
    assert np.allclose(result_mean, mean.mean(1), rtol=1e-12, atol=1e-9)
    assert np.allclose(result_std, np.sqrt(mean.var(1) + (noise**2).mean(1)), rtol=1e-9)
    z = (
        torch.randn(every["mean"].shape, generator=torch.Generator().manual_seed(1)) * every["std"]
        + every["mean"]
    )
    drawn = z.double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    # and what training will draw has that std
    assert np.allclose(result_std, drawn.std(1), rtol=0.02)


def test_pixels_transform_and_encoder_are_the_key(tmp_path: Path) -> None:
    first = digits(tmp_path / "data")
    latents = build(first, tmp_path / "cache")
    resampled = digits(tmp_path / "data", size=16)
    resampled.transform = replace(resampled.transform, interpolation="box")
    changed = [
        build(digits(tmp_path / "data", touch=True), tmp_path / "cache"),
        build(digits(tmp_path / "data", size=16), tmp_path / "cache"),
        build(first.subset(range(49)), tmp_path / "cache"),
        build(first.subset(range(49, -1, -1)), tmp_path / "cache"),
        cache_latents(first, Encoder(shift=1.0), "other", tmp_path / "cache"),
        build(resampled, tmp_path / "cache"),
    ]
    assert (
        len({latents.key, *(c.key for c in changed)}) == 7
        and len(list((tmp_path / "cache").iterdir())) == 7
    )
    assert same(changed[0], digits(tmp_path / "data", touch=True)) and same(
        changed[3], first.subset(range(49, -1, -1))
    )
    assert same(changed[4], first, shift=1.0) and not same(latents, first, shift=1.0)


def test_flipping_is_no_part_of_the_cache(tmp_path: Path) -> None:
    plain, flipped = digits(tmp_path / "data"), digits(tmp_path / "data", flip=True)
    latents = build(flipped, tmp_path / "cache")
    assert same(latents, plain) and flipped.transform.flip
    encode = Encoder()
    assert build(plain, tmp_path / "cache", encode).key == latents.key and encode.seen == 0


def test_labels_are_never_stale(tmp_path: Path) -> None:
    images = digits(tmp_path / "data")
    build(images, tmp_path / "cache")
    header = bytes([0, 0, 8, 1, 0, 0, 0, 50])
    (tmp_path / "data" / "train-labels-idx1-ubyte").write_bytes(header + bytes([7] * 50))
    encode = Encoder()
    assert (
        build(open_images(tmp_path / "data"), tmp_path / "cache", encode)
        .batch([0])["label"]
        .tolist()
        == [7]
        and encode.seen == 0
    )


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    images = digits(tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        # 4 batches a shard: in the third
        build(images, tmp_path / "cache", Encoder(after=10, then=interrupt))
    calls: list[tuple[int, int]] = []
    encode = Encoder()
    latents = build(
        images,
        tmp_path / "cache",
        encode,
        shard_size=5,
        progress=lambda done, total: calls.append((done, total)),
    )
    # the shard size of the first build is kept
    assert encode.seen == 50 - 32 and same(latents, images)
    assert calls[:2] == [(16, 50), (32, 50)] and calls[-1] == (50, 50) and calls == sorted(calls)


def damage(folder: Path, how: str) -> None:
    shard, index = folder / "shard-00001.safetensors", folder / "index.json"
    data = shard.read_bytes()
    if how == "truncated":
        shard.write_bytes(data[:-1])
    elif how == "bit flip":
        shard.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif how == "gone":
        shard.unlink()
    elif how == "swapped":
        shard.write_bytes((folder / "shard-00002.safetensors").read_bytes())
    elif how == "index cut":
        index.write_text(index.read_text()[:-40])
    elif how == "index foreign":
        index.write_text(json.dumps({**json.loads(index.read_text()), "key": "0" * 64}))
    elif how == "index odd":
        index.write_text(
            json.dumps(
                {**json.loads(index.read_text()), "shards": {"shard-00001.safetensors": None}}
            )
        )
    elif how == "index longer":
        written = json.loads(index.read_text())
        index.write_text(
            json.dumps(
                {
                    **written,
                    "count": 99,
                    "shards": {**written["shards"], "shard-00009.safetensors": {}},
                }
            )
        )


@pytest.mark.parametrize(
    ("how", "images_again"),
    [
        ("truncated", 16),
        ("bit flip", 16),
        ("gone", 16),
        ("swapped", 16),
        ("index cut", 50),
        ("index foreign", 50),
        ("index odd", 50),
        ("index longer", 0),
    ],
)
def test_damage_is_detected_and_repaired(tmp_path: Path, how: str, images_again: int) -> None:
    images = digits(tmp_path / "data")
    latents = build(images, tmp_path / "cache")
    damage(tmp_path / "cache" / latents.key[:16], how)
    encode = Encoder()
    assert same(build(images, tmp_path / "cache", encode), images) and encode.seen == images_again
    idle = Encoder()
    assert same(build(images, tmp_path / "cache", idle), images) and idle.seen == 0


@pytest.mark.parametrize("other", [16, 7])
def test_a_second_builder_in_the_middle(tmp_path: Path, other: int) -> None:
    """While one builder encodes its second batch another builds the whole cache: the first takes
    over what it finds.
    """
    images, inner = digits(tmp_path / "data"), Encoder()
    outer = Encoder(
        after=1, then=lambda: build(images, tmp_path / "cache", inner, shard_size=other)
    )
    latents = build(images, tmp_path / "cache", outer)
    assert inner.seen == 50 and outer.seen == 16
    assert same(latents, images) and same(build(images, tmp_path / "cache"), images)


def _build_slowly(data: str, cache: str) -> None:
    torch.set_num_threads(1)
    build(
        open_images(data),
        Path(cache),
        Encoder(after=2, then=lambda: time.sleep(0.05)),
        shard_size=4,
    )


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    images = digits(tmp_path / "data")
    context = multiprocessing.get_context("spawn")
    builders = [
        context.Process(
            target=_build_slowly, args=(str(tmp_path / "data"), str(tmp_path / "cache"))
        )
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [b.exitcode for b in builders] == [0, 0]
    encode = Encoder()
    assert same(build(images, tmp_path / "cache", encode), images) and encode.seen == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"
)
def test_opening_maps_and_does_not_load(tmp_path: Path) -> None:
    images = digits(tmp_path / "data", 128)

    def wide(image: Tensor) -> tuple[Tensor, Tensor]:
        mean = image[:, :1, :1, :1].expand(-1, 4, 128, 128).contiguous()
        return mean, mean.abs()

    place = cache_latents(images, wide, "wide", tmp_path, batch_size=16, shard_size=32).key[:16]
    size = sum(p.stat().st_size for p in (tmp_path / place).iterdir())
    assert size > 60e6
    before = resident()
    latents = cache_latents(images, wide, "wide", tmp_path)
    assert resident() - before < size / 8
    assert latents.batch([127])["mean"].shape == (1, 4, 128, 128) and resident() - before < size / 4
    assert len(pickle.dumps(latents)) < 1e6
    assert torch.equal(
        pickle.loads(pickle.dumps(latents)).batch([5])["std"], latents.batch([5])["std"]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_latent_that_is_not_finite(tmp_path: Path, value: float, where: int) -> None:
    images, good = digits(tmp_path / "data"), Encoder()

    def bad(image: Tensor) -> tuple[Tensor, Tensor]:
        pair = good(image)
        if good.seen > 20:
            pair[where][2, 1, 0, 0] = value
        return pair[0].bfloat16(), pair[1].bfloat16()

    with pytest.raises(
        NumericalError, match=rf"encode.*{('mean', 'std')[where]} .*image 22 .*bfloat16"
    ):
        cache_latents(images, bad, "enc", tmp_path / "cache", batch_size=4, shard_size=16)
    shards = list((tmp_path / "cache").rglob("*.safetensors"))
    assert [s.name for s in shards] == ["shard-00000.safetensors"]


def test_wrong_encoders_and_settings(tmp_path: Path) -> None:
    images = digits(tmp_path / "data")

    def flat(image: Tensor) -> tuple[Tensor, Tensor]:
        return image.flatten(1), image.flatten(1)

    with pytest.raises(UserError, match=r"expected mean and std of one shape \(B, C, h, w\)"):
        cache_latents(images, flat, "enc", tmp_path)
    with pytest.raises(UserError, match="batch_size=0: expected a whole number of at least 1"):
        build(images, tmp_path, batch_size=0)
    with pytest.raises(UserError, match="no image left"):
        build(images.subset([]), tmp_path)
