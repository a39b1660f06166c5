"""Pictures of different aspects: sizes and choice against brute force, nothing lost or doubled,
batches of one shape, equal visits, the same bits.
"""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from helpers.models import SMALL_BLOCKS
from sfumato.checkpoints.formats.folder import save_part
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.data import (
    BucketedImages,
    BucketedLatents,
    Transform,
    bucket_sizes,
    cache_latents,
    images,
    nearest_bucket,
    open_buckets,
    open_images,
)
from sfumato.data.pixel_cache import PixelCache
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.io.atomic import hash_json, read_tensors
from sfumato.predict.networks.modern_dit import ModernDiT, ModernDiTConfig
from sfumato.train import AutoencoderRecipe, DenoiserRecipe
from sfumato.train.batch_sampler import BatchSampler, batch_indices
from sfumato.train.conditions.unconditional import Unconditional
from sfumato.train.loop import LoopSettings, train
from sfumato.train.objective import Draw
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective
from sfumato.train.recipe import DataSettings
from sfumato.types import LatentSpace

CLOTHING = Path(__file__).resolve().parents[3] / "shared" / "data" / "clothing-256-train.parquet"
NET = ModernDiTConfig(
    sample_size=8,
    in_channels=2,
    patch_size=2,
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=8,
)
LOOP = LoopSettings(
    steps=8,
    batch_size=3,
    lr=1e-3,
    warmup=1,
    decay="constant",
    ema=0.9,
    save_every=2,
    show_every=100,
    log_every=1,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "step", "most"),
    [(128, 16, 2.0), (1024, 64, 4.0), (16, 4, 2.5), (96, 8, 1.0), (8, 8, 3.0), (50, 1, 1.5)],
)
def test_bucket_sizes_are_those_that_nothing_on_the_same_side_is_larger_than(
    side: int, step: int, most: float
) -> None:
    every = range(step, side * side // step + 1, step)
    possible = [
        (h, w)
        for h in every
        if h <= side * most
        for w in every
        if w <= side * most and h * w <= side * side
    ]
    widest = {h: max(w for h2, w in possible if h2 == h) for h in {h for h, _ in possible}}
    best = {s for h, w in widest.items() for s in ((h, w), (w, h)) if h * w > 0}
    # `widest` was cut at side * most, so a strip may have a larger partner: those are beyond the
    # aspect in any case.
    expected = {(h, w) for h, w in best if max(h, w) <= most * min(h, w)}
    sizes = bucket_sizes(side, step, most)
    assert set(sizes) == expected and len(sizes) == len(expected)
    assert (side, side) in sizes and {(w, h) for h, w in sizes} == set(sizes)
    aspects = [w / h for h, w in sizes]
    assert aspects == sorted(set(aspects)), "from the tallest to the widest, one bucket an aspect"


def test_buckets_of_sdxl() -> None:
    """arXiv:2307.01952, appendix I lists these among its sizes."""
    assert {
        (512, 2048),
        (640, 1536),
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (1024, 1024),
        (1344, 768),
    } <= set(bucket_sizes(1024, 64, 4.0))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ((100, 16), "multiple of the step"),
        ((64, 0), "steps of 0"),
        ((64, 16, 0.5), "largest_aspect=0.5"),
    ],
)
def test_sizes_that_are_refused(bad: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        bucket_sizes(*bad)


def kept(height: int, width: int, size: tuple[int, int]) -> float:
    """The share of a picture that its largest box of the size's aspect covers."""
    scale = min(height / size[0], width / size[1])
    return scale * size[0] * scale * size[1] / (height * width)


def test_the_nearest_bucket_crops_least() -> None:
    sizes, draw = bucket_sizes(256, 16, 2.0), np.random.default_rng(0)
    shapes = draw.integers(1, 3000, (300, 2)).tolist() + [list(s) for s in sizes]
    for height, width in shapes:
        result = nearest_bucket(height, width, sizes)
        assert kept(height, width, result) >= max(kept(height, width, s) for s in sizes) - 1e-12
    assert all(nearest_bucket(3 * h, 3 * w, sizes) == (h, w) for h, w in sizes)


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"),
    [((64, 96), (32, 24)), ((96, 64), (16, 32)), ((60, 120), (15, 20)), ((40, 40), (20, 10))],
)
def test_an_oblong_is_the_centre_of_the_whole_resized(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    """Scaled until it covers the size, then cropped: margins chosen to be whole pixels."""
    pixels = noise(*shape)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    h, w = round(shape[0] * scale), round(shape[1] * scale)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    assert (h - size[0]) % 2 == (w - size[1]) % 2 == 0 and (h, w) != size
    whole = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.LANCZOS))[
        top : top + size[0], left : left + size[1]
    ]
    result = Transform(size=size).to_pixels(pixels)
    assert result.shape == (3, *size)
    assert np.abs(result.transpose(1, 2, 0).astype(int) - whole).max() <= 1


def test_boxes_of_any_proportion_stay_inside_the_picture() -> None:
    draw = np.random.default_rng(1)
    for h, w, a, b in draw.integers(1, 60, (300, 4)).tolist():
        assert Transform(size=(a, b)).to_pixels(noise(h, w)).shape == (3, a, b)


def test_a_square_size_keeps_its_hash_in_every_spelling() -> None:
    """The key of latent caches that there are: a hash of exactly these four."""
    old = hash_json({"size": 32, "channels": 3, "crop": "center", "interpolation": "lanczos"})
    assert Transform(32, 3).hash == Transform((32, 32), 3).hash == old
    assert len({old, Transform((32, 24), 3).hash, Transform((24, 32), 3).hash}) == 3
    assert np.array_equal(
        Transform((8, 8)).to_pixels(noise(20, 30)), Transform(8).to_pixels(noise(20, 30))
    )


@pytest.mark.parametrize("bad", [(0, 8), (8, -1)])
def test_sides_below_one_are_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(
        UserError, match=r"size=(0|-1): expected a whole number of pixels, at least 1"
    ):
        Transform(size=bad)


# ---- opening -------------------------------------------------------------------------------------

SHAPES = [
    (20, 20),
    (30, 20),
    (20, 30),
    (64, 16),
    (33, 31),
    (20, 41),
    (25, 36),
    (9, 7),
    (40, 22),
    (21, 20),
    (16, 31),
    (50, 50),
]
CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of many aspects in class folders with captions that name them; every third is stored
    lying on its side, by EXIF.
    """
    root = tmp_path / "pictures"
    rows: list[str] = []
    for k, (height, width) in enumerate(SHAPES):
        path = root / CLASSES[k % 3] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if k % 3 == 1:
            exif[0x0112] = 6  # turn by a quarter when shown
        Image.fromarray(noise(height, width, k)).save(path, exif=exif)
        rows.append(json.dumps({"file_name": path.relative_to(root).as_posix(), "text": str(k)}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return root


def upright(k: int) -> np.ndarray:
    return np.rot90(noise(*SHAPES[k], k), -1).copy() if k % 3 == 1 else noise(*SHAPES[k], k)


def number_of(result: BucketedImages) -> list[int]:
    assert result.captions is not None
    return [int(c) for c in result.captions]


def check(result: BucketedImages, side: int = 16, step: int = 4) -> None:
    """Every picture once, in the bucket of least crop of its upright self, with its own label and
    pixels.
    """
    sizes, numbers = bucket_sizes(side, step), number_of(result)
    assert sorted(numbers) == sorted(set(numbers)) and result.labels is not None
    assert [CLASSES[i] for i in result.labels.tolist()] == [CLASSES[k % 3] for k in numbers]
    for images_, group in zip(result.sets, result.groups, strict=True):
        assert len(images_) == len(group) > 0
        for row, k in enumerate(numbers[group.start : group.stop]):
            pixels = upright(k)
            best = max(kept(*pixels.shape[:2], s) for s in sizes)
            assert kept(*pixels.shape[:2], images_.shape[1:]) >= best - 1e-12
            expected = Transform(size=(images_.shape[1], images_.shape[2])).to_tensor(pixels)
            assert torch.equal(images_.batch([row])["image"][0], expected)


def test_every_picture_is_in_the_bucket_of_least_crop_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    decode = images.decode
    monkeypatch.setattr(
        images, "decode", lambda picture: seen.update([str(picture)]) or decode(picture)
    )
    result = open_buckets(folder, side=16, step=4)
    assert len(result) == len(SHAPES) and set(number_of(result)) == set(range(len(SHAPES)))
    assert len(result.sets) == 3 and result.class_names == CLASSES and result.skipped == []
    assert sorted(result.places.tolist()) == list(range(len(SHAPES)))
    check(result)
    assert len(seen) == len(SHAPES) and set(seen.values()) == {1}, (
        "decoded once each, batches and all"
    )
    squares = open_images(folder, size=16)
    assert squares.captions is not None
    assert [squares.captions[i] for i in result.places.tolist()] == result.captions


def test_the_memory_limit_is_for_all_buckets_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = open_buckets(folder, side=16, step=4)
    largest = max(len(s) * int(np.prod(s.shape)) for s in held.sets)
    monkeypatch.setattr(images, "MEMORY_LIMIT", largest)  # each of them would fit alone
    lazy = open_buckets(folder, side=16, step=4, cache=None)
    assert {type(s._pixels) for s in lazy.sets}.isdisjoint({type(s._pixels) for s in held.sets})
    check(lazy)
    assert [s.fingerprint for s in lazy.sets] == [s.fingerprint for s in held.sets]


def test_buckets_are_kept_on_disk_and_other_buckets_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    cache = PixelCache(tmp_path / "cache")
    first = open_buckets(folder, side=16, step=4, cache=cache)
    check(first)
    for step in (8, 4):
        other = open_buckets(folder, side=16, step=step, cache=cache)
        check(other, step=step)
    monkeypatch.setattr(images, "decode", None)  # all were decoded before
    check(open_buckets(folder, side=16, step=4, cache=cache))


def test_broken_pictures_are_left_out_or_named(folder: Path) -> None:
    (folder / "cat" / "03.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"03\.png cannot be read"):
        open_buckets(folder, side=16, step=4)
    result = open_buckets(folder, side=16, step=4, on_error="skip")
    assert [Path(name).name for name, _ in result.skipped] == ["03.png"]
    assert set(number_of(result)) == set(range(len(SHAPES))) - {3}
    assert sorted(result.places.tolist()) == list(range(len(SHAPES) - 1))
    check(result)


def test_one_grey_picture_does_not_make_its_bucket_grey(folder: Path) -> None:
    Image.fromarray(noise(64, 16)[..., 0]).save(folder / "cat" / "03.png")
    assert {s.shape[0] for s in open_buckets(folder, side=16, step=4).sets} == {3}
    assert {s.shape[0] for s in open_buckets(folder, side=16, step=4, channels=1).sets} == {1}


def test_a_subset_keeps_pictures_with_their_words(folder: Path) -> None:
    result = open_buckets(folder, side=16, step=4)
    few = result.subset([7, 0, 11])
    assert number_of(few) == [number_of(result)[i] for i in (0, 7, 11)]
    check(few)
    assert few.places.tolist() == result.places[[0, 7, 11]].tolist()
    with pytest.raises(UserError, match="at least one"):
        result.subset([])


def test_the_pictures_held_out_are_those_of_the_squares(folder: Path) -> None:
    data = DataSettings(str(folder), size=16, buckets=4, held_out=0.3)
    squares, held_out = data.open()
    bucketed, division = data.open_buckets()
    assert division == data.split().division
    assert sorted(bucketed.captions or []) == sorted(squares.captions or [])
    assert len(bucketed) == len(SHAPES) - len(held_out) == len(SHAPES) - 4


@pytest.mark.skipif(
    not CLOTHING.exists(), reason="shared/data/clothing-256-train.parquet is not on this machine"
)
def test_real_clothing() -> None:
    pytest.importorskip("datasets")
    result = open_buckets(CLOTHING, side=64, step=16, limit=60)
    assert len(result) == 60 and sorted(result.places.tolist()) == list(range(60))


# ---- latents -------------------------------------------------------------------------------------


def encode(image: Tensor) -> tuple[Tensor, Tensor]:
    """Two channels of a quarter of the cells, and a std that depends on the picture."""
    pooled = torch.nn.functional.avg_pool2d(image, 2)[:, :2]
    return pooled, 0.1 + pooled.abs()


@pytest.fixture
def latents(folder: Path, tmp_path: Path) -> tuple[BucketedImages, BucketedLatents]:
    result = open_buckets(folder, side=16, step=4)
    return result, BucketedLatents(
        [cache_latents(s, encode, "toy", tmp_path / "latents") for s in result.sets]
    )


def test_latents_have_the_images_numbers(latents: tuple[BucketedImages, BucketedLatents]) -> None:
    result, cached = latents
    assert (
        len(cached) == len(result)
        and cached.groups == result.groups
        and cached.captions == result.captions
    )
    assert (
        result.labels is not None
        and cached.labels is not None
        and torch.equal(cached.labels, result.labels)
    )
    assert [i for g in cached.groups for i in g] == list(range(len(result)))
    for images_, group in zip(result.sets, cached.groups, strict=True):
        backwards = list(reversed(group))
        batch = cached.batch(backwards)
        mean, std = encode(images_.batch([i - group.start for i in backwards])["image"])
        assert torch.equal(batch["mean"], mean) and torch.equal(batch["std"], std)
        assert torch.equal(batch["label"], result.labels[backwards])


def test_a_batch_of_two_shapes_is_refused(latents: tuple[BucketedImages, BucketedLatents]) -> None:
    _, cached = latents
    for wrong in ([0, len(cached) - 1], [cached.groups[1].start, cached.groups[1].start - 1]):
        with pytest.raises(UserError, match="differ in shape"):
            cached.batch(wrong)
    with pytest.raises(UserError, match="at least one number"):
        cached.batch([])
    for outside in ([-1], [len(cached)]):
        with pytest.raises(IndexError):
            cached.batch(outside)
    with pytest.raises(UserError, match="no channels"):
        BucketedLatents([])


def test_statistics_count_every_cell_once(latents: tuple[BucketedImages, BucketedLatents]) -> None:
    _, cached = latents
    parts = [cached.batch(list(g)) for g in cached.groups]
    mean, std = (
        torch.cat([p[name].double().transpose(0, 1).flatten(1) for p in parts], 1)
        for name in ("mean", "std")
    )
    result = cached.statistics()
    assert result[0] == pytest.approx(mean.mean(1).tolist(), rel=1e-9)
    assert result[1] == pytest.approx(
        (mean.var(1, correction=0) + std.square().mean(1)).sqrt().tolist(), rel=1e-9
    )
    unweighted = torch.stack([p["mean"].double().mean((0, 2, 3)) for p in parts]).mean(0)
    assert result[0] != pytest.approx(unweighted.tolist(), rel=1e-3), (
        "the groups differ in size, and the check sees it"
    )


def test_the_key_is_all_caches(latents: tuple[BucketedImages, BucketedLatents]) -> None:
    _, cached = latents
    keys = {
        cached.key,
        BucketedLatents(cached.sets[::-1]).key,
        BucketedLatents(cached.sets[1:]).key,
        BucketedLatents(cached.sets).key,
    }
    assert len(keys) == 3


# ---- order ---------------------------------------------------------------------------------------

SIZES = [(13, 3, 40, 1), (8, 8), (2, 1, 1), (5, 0, 100), (64, 1)]


def ranges(sizes: tuple[int, ...]) -> list[range]:
    starts = np.cumsum([0, *sizes]).tolist()
    return [range(a, b) for a, b in pairwise(starts)]


@pytest.mark.parametrize(("size", "batch_size", "seed"), [(10, 4, 5), (3, 8, 0), (64, 16, 1)])
def test_one_group_is_the_order_without_groups(size: int, batch_size: int, seed: int) -> None:
    order = BatchSampler([range(size)], batch_size, seed)
    assert all(
        torch.equal(order(step), batch_indices(size, batch_size, seed, step)) for step in range(30)
    )


@pytest.mark.parametrize(("sizes", "batch_size"), list(product(SIZES, (1, 4, 6))))
def test_visits_are_equal_and_batches_of_one_group(sizes: tuple[int, ...], batch_size: int) -> None:
    groups, total = ranges(sizes), sum(sizes)
    epochs = 7 * batch_size  # so that every group has come out even
    order = BatchSampler(groups, batch_size, seed=3)
    visits = torch.zeros(total, dtype=torch.int64)
    for step in range(epochs * total // batch_size):
        batch = order(step)
        assert batch.shape == (batch_size,)
        inside = [g for g in groups if g.start <= int(batch.min()) and int(batch.max()) < g.stop]
        assert len(inside) == 1
        visits += torch.bincount(batch, minlength=total)
        assert all(int(visits[list(g)].max() - visits[list(g)].min()) <= 1 for g in inside), (
            "evenly at every moment"
        )
    assert (visits == epochs).all()


def test_no_group_falls_behind_by_a_batch_and_none_comes_in_a_row() -> None:
    groups, batch_size = ranges((130, 47, 9)), 8
    order = BatchSampler(groups, batch_size, seed=0)
    which = [
        next(i for i, g in enumerate(groups) if int(order(step)[0]) in g) for step in range(2000)
    ]
    done = np.cumsum([[w == i for i in range(3)] for w in which], axis=0) * batch_size
    share = np.arange(1, 2001)[:, None] * batch_size * np.array([130, 47, 9]) / 186
    assert np.abs(done - share).max() < 186, "never more than an epoch off its share"
    assert 0.3 < np.mean([a == b for a, b in pairwise(which)]) < 0.8, (
        "shuffled: sum of squared shares is 0.55"
    )


def test_the_order_is_a_function_of_seed_and_step() -> None:
    groups = ranges((13, 3, 40, 1))
    straight = [BatchSampler(groups, 4, 7)(step) for step in range(60)]  # each of a new one
    order = BatchSampler(groups, 4, 7)
    for step in np.random.default_rng(0).permutation(60).tolist():
        assert torch.equal(order(step), straight[step])
    assert not torch.equal(
        torch.cat(straight), torch.cat([BatchSampler(groups, 4, 8)(step) for step in range(60)])
    )
    steps = [tuple(sorted(b.tolist())) for b in straight if int(b.max()) < 13]
    assert len(set(steps)) > len(steps) // 2, "epochs differ"


# ---- training ------------------------------------------------------------------------------------


def objective(
    cached: BucketedLatents, shapes: list[tuple[int, ...]] | None = None
) -> DenoiserObjective:
    torch.manual_seed(0)
    process = Process(schedule("flow"), parameterization("flow"))
    made = DenoiserObjective(
        ModernDiT(NET),
        process,
        cached,
        LatentSpace(2, 2, (0.0, 0.0), (1.0, 1.0)),
        Unconditional(),
        DenoiserLoss(drop=0),
    )
    if shapes is not None:
        batch = made.batch

        def watched(indices: Tensor, draw: Draw) -> dict[str, Tensor]:
            result = batch(indices, draw)
            shapes.append(tuple(result["mean"].shape))
            return result

        made.batch = watched  # type: ignore[method-assign]
    return made


class Stop(Exception):
    """A kill that a test can catch."""


def test_a_run_over_buckets_goes_on_bit_for_bit(
    latents: tuple[BucketedImages, BucketedLatents], tmp_path: Path
) -> None:
    _, cached = latents
    shapes: list[tuple[int, ...]] = []
    whole = train(objective(cached, shapes), LOOP, tmp_path / "whole")
    assert len(shapes) == 8 and len({s[2:] for s in shapes}) > 1, "batches of several shapes"

    def stop(step: int) -> None:
        if step == 5:  # the newest checkpoint is of step 4
            raise Stop

    with pytest.raises(Stop):
        train(objective(cached), LOOP, tmp_path / "cut", on_step=stop)
    done: list[int] = []
    again = train(objective(cached), LOOP, tmp_path / "cut", on_step=done.append)
    assert done == [5, 6, 7, 8]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(UserError, match="latents"):
        train(objective(BucketedLatents(cached.sets[1:])), LOOP, tmp_path / "cut")


def recipe(folder: Path, tmp_path: Path, **data: Any) -> DenoiserRecipe:
    """A denoiser for an autoencoder of random weights, factor 2, with a transformer of patch 2."""
    torch.manual_seed(0)
    config = KLConfig(in_channels=3, out_channels=3, latent_channels=2, **SMALL_BLOCKS)
    if not (tmp_path / "vae").exists():
        (tmp_path / "vae").mkdir()
        save_part(tmp_path / "vae", AutoencoderKL(config))
    settings = DataSettings(**{"source": str(folder), "size": 16, "buckets": 4, **data})
    return DenoiserRecipe(tmp_path / "vae", settings, NET, "flow", "flow", DenoiserLoss(), LOOP)


def test_a_recipe_with_buckets_becomes_a_model(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, tmp_path)
    made.run(tmp_path / "whole")
    replace(made, loop=replace(LOOP, steps=3)).run(tmp_path / "run")
    made.run(tmp_path / "run")
    files = [
        next((tmp_path / run / "model" / "transformer").glob("*.safetensors"))
        for run in ("whole", "run")
    ]
    whole, run = (read_tensors(file) for file in files)
    assert whole.keys() == run.keys() and all(torch.equal(whole[k], run[k]) for k in whole), (
        "3 steps and 5 are the 8"
    )
    model = sfumato.load(tmp_path / "run" / "model")
    assert model.class_names == CLASSES and model.denoiser.network.config.sample_size == 8
    (square,) = model.generate("cat", seed=1, steps=2)
    assert square.size == (16, 16)
    buckets = len(replace(made.data, buckets=4).open_buckets()[0].sets)
    assert len(list((tmp_path / "run" / "latents").iterdir())) == buckets == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"buckets": 2}, "multiple of 4, the autoencoder's factor 2 times the network's patch 2"),
        ({"buckets": 0}, "buckets=0: expected a whole number of pixels from 1 to 16384"),
        ({"size": None}, "need both"),
        ({"size": 18}, "multiple of the step"),
    ],
)
def test_wrong_buckets_are_one_sentence(
    data: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        recipe(folder, tmp_path, **data).run(tmp_path / "run")


def test_the_autoencoder_trains_on_squares(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the autoencoder trains on squares"):
        AutoencoderRecipe(DataSettings(str(folder), size=16, buckets=4)).run(tmp_path)
