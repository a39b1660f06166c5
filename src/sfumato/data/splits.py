"""Training images and images that no training sees: the source's own test split, or a share of the
training images, always the same.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sfumato.data.images import ImageSet, Listing
from sfumato.data.source import open_images, open_with, opened
from sfumato.data.transform import Transform
from sfumato.errors import UserError

logger = logging.getLogger(__name__)

SHARE = 0.02


def open_both(
    source: str | Path,
    share: float = SHARE,
    *,
    train: str = "train",
    test: str = "test",
    flip: bool = False,
    limit: int | None = None,
    **options: Any,
) -> tuple[ImageSet, ImageSet]:
    """(training images, held-out images); where the source has no `test` split, `share` of the
    training images is held out, by a fixed order.

    flip and limit are for the training images; options: see `open_images`. One image alone is both.
    """
    images = open_images(source, split=train, limit=limit, flip=flip, **options)
    try:
        return images, open_images(source, split=test, **options)
    except UserError as error:
        if test != "test":  # the caller named it
            raise
        training, held_out = split(len(images), share, error)
        return images.subset(training), images.subset(held_out)


def open_first(
    source: str | Path,
    count: int,
    share: float = SHARE,
    *,
    train: str = "train",
    test: str = "test",
    size: int | None = None,
    channels: int | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The first `count` images of each of the two sets that `open_both` gives; no other is decoded,
    so that nobody learns whether it is broken.
    """

    def first(listing: Listing, rows: Sequence[int]) -> ImageSet:
        return opened(listing.part(rows[:count]), Transform(size, channels), "raise")

    def whole(listing: Listing) -> ImageSet:
        return first(listing, range(len(listing.pictures)))

    try:
        held_out = open_with(whole, source, split=test, on_error="raise", limit=None)
    except UserError as error:
        if test != "test":
            raise
        why = error

        def both(listing: Listing) -> tuple[ImageSet, ImageSet]:
            training, held_out = split(len(listing.pictures), share, why)
            return first(listing, training.tolist()), first(listing, held_out.tolist())

        return open_with(both, source, split=train, on_error="raise", limit=None)
    return open_with(whole, source, split=train, on_error="raise", limit=None), held_out


def split(
    count: int, share: float, why: Exception
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " M"]]:
    """Numbers of the training images and of the held-out ones where one split serves for both. why:
    what is said about it.
    """
    logger.warning(
        "no test split (%s): a share of %g is held out of the training images", why, share
    )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    kept = max(1, round(share * count)) if count > 1 else 0
    return order[kept:].sort().values, order[: kept or 1].sort().values
