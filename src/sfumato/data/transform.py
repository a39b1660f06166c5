"""From a file to pixels: decode, orient, composite, resize, crop.

    file -> 8-bit grey (H, W) or colour (H, W, 3) -> largest centred box of `size`'s aspect, resized
    -> (C, H, W) -> x / 127.5 - 1 in [-1, 1]

Resampling is Lanczos with the support widened when shrinking (antialiased): plain decimation puts
aliases into the training data and into every Frechet distance (Parmar et al. 2022,
arXiv:2104.11222, section 3).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.atomic import hash_json
from sfumato.io.image_files import eight_bits, flatten, open_image
from sfumato.validate import one_of, positive_int

RawImage = str | Path | bytes | Image.Image | np.ndarray
"""An image before decoding: a path, the bytes of a file, or pixels."""

_INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "nearest")


@dataclass(frozen=True)
class Transform:
    """Settings by which decoded images become tensors of one shape.

    Attributes:
        size: Side of the square result in pixels, or (height, width); None keeps each image's own.
        channels: 1 (grey, ITU-R 601 luma), 3 (RGB), or None, the image's own.
        crop: "center", the largest centred box of the result's aspect.
        flip: Mirror half of the images left to right, drawn anew in every `ImageSet.batch`.
            `to_tensor` never flips.
        interpolation: lanczos, bicubic, bilinear, box or nearest.

    Raises:
        UserError: For impossible values.
    """

    size: int | tuple[int, int] | None = None
    channels: int | None = None
    crop: Literal["center"] = "center"
    flip: bool = False
    interpolation: str = "lanczos"

    def __post_init__(self) -> None:
        for side in self.sides or ():
            positive_int("size", side, unit="pixels", hint="None keeps the size of each image")
        if self.channels not in (None, 1, 3):
            raise UserError(
                f"{self.channels} channels are not possible: "
                "give 1 (grey), 3 (RGB) or None (as the data)"
            )
        one_of("crop", self.crop, ["center"])
        one_of("interpolation", self.interpolation, _INTERPOLATIONS)

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width) of the result in pixels; None: the image's own."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @cached_property
    def hash(self) -> str:
        """Hash of the settings that change the stored pixels.

        `flip` is left out, because latents are cached unflipped. A square has one hash, written as
        one side or as two.
        """
        sides = self.sides
        size = sides[0] if sides is not None and sides[0] == sides[1] else sides
        values = {"size": size, "channels": self.channels}
        return hash_json({**values, "crop": self.crop, "interpolation": self.interpolation})

    def to_pixels(self, image: RawImage) -> np.ndarray:
        """Decode an image to uint8 (C, H, W).

        Raises:
            UserError: For an image that cannot be decoded.
        """
        return self.fit(decode(image))

    def to_tensor(self, image: RawImage) -> Float[Tensor, "C H W"]:
        """Decode an image to float32 (C, H, W) in [-1, 1], unflipped.

        Args:
            image: A path, the bytes of a file, a PIL image, or a uint8 or uint16 array.

        Raises:
            UserError: For an image that cannot be decoded.
        """
        return to_float(torch.from_numpy(self.to_pixels(image)))

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Crop and resize decoded uint8 (H, W) or (H, W, 3) to uint8 (C, *sides).

        The result is contiguous and a copy.
        """
        height, width = pixels.shape[:2]
        grey = pixels.ndim == 2
        resized = self.sides is not None and (height, width) != self.sides
        if resized or (self.channels == 1 and not grey):
            image = Image.fromarray(pixels)
            if self.channels == 1:
                image = image.convert("L")
            if self.sides is not None:
                # Box first, resize second: the same numbers as resize then crop, centred to a
                # fraction of a pixel, and a 1 x 10,000 strip never becomes a huge intermediate
                # image.
                h, w = self.sides
                tall, wide = (
                    (height, height * w / h) if height * w <= width * h else (width * h / w, width)
                )
                left, top = (width - wide) / 2, (height - tall) / 2
                box = (left, top, left + wide, top + tall)
                resampling = Image.Resampling[self.interpolation.upper()]
                image = image.resize((w, h), resampling, box=box)
            pixels = np.asarray(image)
        if pixels.ndim == 2:
            return np.repeat(pixels[None], 3 if self.channels == 3 else 1, axis=0)
        return pixels.transpose(2, 0, 1).copy()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: 0 is -1 and 255 is 1 exactly."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def decode(image: RawImage) -> np.ndarray:
    """Decode an image to uint8, (H, W) if it is grey, else (H, W, 3).

    The orientation tag is applied, colours become sRGB by the file's ICC profile, and transparency
    is laid over white.

    Raises:
        UserError: For a truncated, corrupt or foreign file. The message has the reason and not the
            name, which the caller adds.
    """
    if isinstance(image, np.ndarray):
        return _decode_array(image)
    try:
        opened = image if isinstance(image, Image.Image) else open_image(image)
        return np.array(flatten(opened))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("the file is missing") from error
    except Exception as error:  # Pillow's conversions raise ValueError, OSError, KeyError ...
        raise UserError(f"{error or type(error).__name__}") from error


def _decode_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise UserError(
            f"an array of shape {array.shape} is not an image: "
            "expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    if array.dtype == np.uint16:
        array = eight_bits(array)
    if array.dtype != np.uint8:
        raise UserError(
            f"an array of {array.dtype} is not an image: "
            "expected uint8 (0..255) or uint16 (0..65535)"
        )
    return np.array(flatten(Image.fromarray(array))) if channels == 4 else array
