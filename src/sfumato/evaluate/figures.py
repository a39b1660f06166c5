"""Figures of a report: grids of images as PNG bytes, the same bytes for the same pixels."""

import io
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from PIL import Image as PIL
from torch import Tensor

from sfumato.evaluate.inputs import Images
from sfumato.images import contact_sheet

GAP = 2
LEAST = 56
"""Side to which smaller images are enlarged, in pixels, by a whole factor, unsmoothed."""


@dataclass(frozen=True)
class Figure:
    """A title, one line below it, and a PNG file."""

    title: str
    caption: str
    png: bytes


def grid(rows: list[list[Float[Tensor, "C H W"]]]) -> bytes:
    """Draw rows of images (C, H, W) in [0, 1], all of one size, on white, as a PNG file."""
    height, width = rows[0][0].shape[-2:]
    factor = max(1, -(-LEAST // max(height, width)))
    buffer, enlarged = io.BytesIO(), [[_enlarge(image, factor) for image in row] for row in rows]
    contact_sheet(enlarged, GAP).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _enlarge(image: Float[Tensor, "C H W"], factor: int) -> PIL.Image:
    """Pixels in [0, 1] as an RGB image whose sides are `factor` times as long."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
    levels = levels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    return PIL.fromarray(levels.cpu().numpy())


def by_class(images: Images, labels: Int64[Tensor, " N"] | None, columns: int = 10) -> bytes:
    """Draw one row a class (of the first 50), its first images.

    Without labels, the first images are drawn in reading order.
    """
    if labels is None:
        chosen = list(images[: columns * 8])
        return grid([chosen[i : i + columns] for i in range(0, len(chosen), columns)])
    return grid([list(images[labels == k][:columns]) for k in labels.unique().tolist()[:50]])


def side_by_side(*rows: Images, count: int = 12) -> bytes:
    """Draw the first images of each set in a row, so that pairs stand one above the other."""
    return grid([list(images[:count]) for images in rows])


def neighbours(
    samples: Images,
    train: Float[Tensor, "M C H W"],
    indices: Int64[Tensor, "N k"],
    order: Int64[Tensor, " n"],
) -> bytes:
    """Draw a column a sample: the sample on top, below it its nearest training images."""
    columns = [[samples[i], *(train[j] for j in indices[i].tolist())] for i in order.tolist()]
    return grid([list(row) for row in zip(*columns, strict=True)])
