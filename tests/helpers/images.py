"""Images of a seed, and pixels of files."""

from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.data import ImageSet, Transform
from sfumato.data.images import Listing, build


def pixels(image: str | Path | Image.Image) -> np.ndarray:
    """Return the pixels of an image or of its file as signed integers."""
    if isinstance(image, Image.Image):
        return np.asarray(image).astype(int)
    with Image.open(image) as opened:
        return np.asarray(opened).astype(int)


def smooth_image_set(
    count: int = 8, size: int = 16, channels: int = 1, seed: int = 0, flip: bool = False
) -> ImageSet:
    """Draw smooth images in memory: 4x4 random pixels each, enlarged.

    Args:
        count: number of images.
        size: their height and width.
        channels: 1 for grey images, 3 for colour.
        seed: seed of the pixels.
        flip: mirror images at random when they are trained on.
    """
    numbers = np.random.default_rng(seed)
    shape = (4, 4) if channels == 1 else (4, 4, 3)
    drawn = (
        Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8)).resize((size, size))
        for _ in range(count)
    )
    return build(
        Listing("toy", tuple(np.asarray(image) for image in drawn), "picture {}".format),
        Transform(flip=flip),
        "raise",
    )
