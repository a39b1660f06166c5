"""Training images, and held-out images that no training step uses.

The held-out images are the source's own test split, or a fixed share of its training images.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sfumato.data.images import ImageSet, Listing
from sfumato.data.source import image_set, open_images, open_with
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
    """Open the training images and the held-out ones of a source.

    Where the source has no `test` split, a share of the training images is held out. One image
    alone is both.

    Args:
        source: See `open_images`.
        share: Of the training images that is held out, in (0, 1).
        train: The split to train on.
        test: The split to hold out; a named split must exist.
        flip: Mirror the training images, see `open_images`.
        limit: Number of training images, see `open_images`.
        options: The other arguments of `open_images`.

    Returns:
        (training images, held-out images)

    Raises:
        UserError: For everything that is wrong with the source.
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
    """Open the first `count` images of each of the two sets of `open_both`.

    No other image is decoded, so that a broken one among them does not matter. The other arguments
    and the errors are those of `open_both`.
    """

    def first(listing: Listing, rows: Sequence[int]) -> ImageSet:
        return image_set(listing.part(rows[:count]), Transform(size, channels), "raise")

    def whole(listing: Listing) -> ImageSet:
        return first(listing, range(len(listing.images)))

    try:
        held_out = open_with(whole, source, test)
    except UserError as error:
        if test != "test":
            raise
        reason = error

        def both(listing: Listing) -> tuple[ImageSet, ImageSet]:
            training, held_out = split(len(listing.images), share, reason)
            return first(listing, training.tolist()), first(listing, held_out.tolist())

        return open_with(both, source, train)
    return open_with(whole, source, train), held_out


def split(
    count: int, share: float, reason: Exception
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " M"]]:
    """Divide 0..count-1 into the indices of training and of held-out images, by a fixed order.

    Args:
        count: Number of images.
        share: Of them that is held out.
        reason: Why there is no test split, for the log.
    """
    logger.warning(
        "no test split (%s): a share of %g is held out of the training images", reason, share
    )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    kept = max(1, round(share * count)) if count > 1 else 0
    return order[kept:].sort().values, order[: kept or 1].sort().values
