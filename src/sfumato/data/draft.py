"""Large JPEG files decoded at a fraction of their size, which resizing would drop anyway.

A JPEG decoder can return 1/2, 1/4 or 1/8 of an image from its low frequencies alone (libjpeg's
scaled inverse DCT). The fraction is the smallest that divides both sides and leaves at least
`MARGIN` times the sides of the result, so that Lanczos still does the last reduction. The error and
the time are measured by benchmarks/jpeg_draft.py.
"""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from sfumato.data.transform import RawImage, Transform

MARGIN = 3
"""Least sides of the decoded image, in sides of the result."""
_LYING = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""


def reduced(
    image: RawImage, transform_of: Callable[[tuple[int, int]], Transform]
) -> tuple[RawImage, Transform | None]:
    """A large JPEG file decoded at a fraction of its size, and its transform.

    Args:
        image: Any image before decoding.
        transform_of: (height, width) of the whole upright image -> its transform.

    Returns:
        The image itself and None where it is no JPEG file, not large, or damaged.
    """
    if not isinstance(image, bytes | str | Path):
        return image, None
    source = io.BytesIO(image) if isinstance(image, bytes) else image
    with suppress(Exception), Image.open(source, formats=("JPEG",)) as opened:
        # errors come again, with their reason, where the whole is decoded
        assert isinstance(opened, JpegImageFile)
        lying = opened.getexif().get(ExifTags.Base.Orientation) in _LYING
        width, height = opened.size
        transform = transform_of((width, height) if lying else (height, width))
        if transform.sides is None:
            return image, None
        least = transform.sides if lying else transform.sides[::-1]
        room = min(side // (MARGIN * low) for side, low in zip(opened.size, least, strict=True))
        fits = (s for s in (8, 4, 2) if s <= room and not width % s and not height % s)
        if not (scale := next(fits, 0)):
            return image, None
        opened.draft(None, (width // scale, height // scale))
        opened.load()
        return opened, transform
    return image, None
