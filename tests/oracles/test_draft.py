"""Large JPEG files decoded at a fraction, beside the same files decoded whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import Transform, images, open_buckets, open_images
from sfumato.data.draft import reduced
from sfumato.errors import UserError


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image with a spectrum as photographs have it: octaves of noise, amplitude by 1/f."""
    draw = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(3, 10):
        side = 2**octave
        noise = draw.normal(size=(side, side, 3)) / side
        layers = [
            Image.fromarray(noise[..., c].astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        total += np.stack([np.asarray(layer) for layer in layers], 2)
    low, high = np.quantile(total, [0.01, 0.99])
    pixels = np.clip((total - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(500, 700), (802, 644)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_result_is_that_of_the_whole(shape: tuple[int, int], orientation: int) -> None:
    data, transform = jpeg(photograph(*shape), orientation), Transform(64)
    part, own = reduced(data, lambda shape: transform)
    assert isinstance(part, Image.Image) and own == transform
    # 500 / (3 * 64) and 644 / (3 * 64) round down to powers of two
    assert part.size[::-1] == tuple(side // 2 for side in shape)
    pixels, whole = transform.to_pixels(part), transform.to_pixels(data)
    assert pixels.shape == whole.shape == (3, 64, 64)
    error = np.abs(pixels.astype(float) - whole)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 52 and error.max() <= 4


def test_the_size_of_a_bucket_is_chosen_by_the_whole_upright_image() -> None:
    seen: list[tuple[int, int]] = []
    data = jpeg(photograph(400, 904), orientation=6)
    part, _ = reduced(data, lambda shape: seen.append(shape) or Transform((48, 32)))
    assert seen == [(904, 400)]
    assert isinstance(part, Image.Image) and part.size == (226, 100)


@pytest.mark.parametrize(
    ("size", "kind", "width"),
    [
        (64, "PNG", 500),
        (None, "JPEG", 500),
        (100, "JPEG", 500),
        (64, "array", 500),
        # half a pixel at the edge would move the image
        (64, "JPEG", 501),
    ],
)
def test_others_are_left_as_they_are(size: int | None, kind: str, width: int) -> None:
    image = photograph(400, width)
    file = io.BytesIO()
    image.save(file, "JPEG" if kind == "array" else kind)
    source = np.asarray(image) if kind == "array" else file.getvalue()
    result, transform = reduced(source, lambda shape: Transform(size))
    assert result is source and transform is None


def test_sets_decode_large_files_so_in_memory_and_at_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(photograph(400, 400))
    (tmp_path / "a.jpg").write_bytes(data)
    part, transform = reduced(data, lambda shape: Transform(32))
    assert transform is not None
    held = open_images(tmp_path, size=32)
    assert torch.equal(held.batch([0])["image"][0], transform.to_tensor(part))
    (bucket,) = open_buckets(tmp_path, side=32, step=8).sets
    assert torch.equal(bucket.batch([0])["image"], held.batch([0])["image"])
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    lazy = open_images(tmp_path, size=32, cache=None)
    assert torch.equal(lazy.batch([0])["image"], held.batch([0])["image"])
    assert lazy.fingerprint == held.fingerprint
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image .*truncated"):
        open_images(tmp_path, size=32)
