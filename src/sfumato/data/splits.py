"""Training images, and held-out images that no training step uses.

The held-out images are the source's own test split (else its validation split), or a fixed share of
its training images. Copies of one image are never on both sides, and a class never loses its last
image. A `Division` is what a model keeps of it, so that `sfumato evaluate` finds the same images.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from sfumato.data.buckets import BucketedImages, buckets_of
from sfumato.data.images import ImageSet, Listing, OnError
from sfumato.data.pixel_cache import CACHE, PixelCache
from sfumato.data.reading import Reading, Splits, canonical_split, listed
from sfumato.data.source import check_limit, image_set, listing_of, readable, splits_of
from sfumato.data.transform import Transform
from sfumato.errors import UserError
from sfumato.io.atomic import hash_bytes, hash_json
from sfumato.validate import number_in

logger = logging.getLogger(__name__)

SHARE = 0.02
DROPPED = -2
"""Label of images that are left out with their class."""


@dataclass(frozen=True)
class Division:
    """The training and the held-out images of a source, as a model keeps them.

    Attributes:
        source: Name of the source, without its folder.
        images: Number of images of the training split, before the limit.
        identity: Hash of the training split's names and classes.
        train: The split that was trained on.
        test: The split that was held out; None: a share of the training split.
        share: That share.
        limit: Number of images that were used; None: all.
        on_error: Treatment of broken images.
        reading: The settings of `Reading` that were set.
        held_out: Indices of the share in the source, such as "3,17,40-42".
        shared: The held-out images were trained on too: none could be held out.
    """

    source: str
    images: int
    identity: str
    train: str = "train"
    test: str | None = None
    share: float = SHARE
    limit: int | None = None
    on_error: OnError = "raise"
    reading: Mapping[str, Any] | None = None
    held_out: str = ""
    shared: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON of the fields that are set."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "", {}, False)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The division that `to_json` wrote.

        Raises:
            UserError: For values that it did not write.
        """
        try:
            division = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
            numbers(division.held_out)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the model's record of its training images is damaged ({error})"
            ) from error
        return division


@dataclass(frozen=True)
class Split:
    """Training images, held-out images, and how the source was divided."""

    training: ImageSet
    held_out: ImageSet
    division: Division


def open_split(
    source: str | Path,
    share: float | None = None,
    *,
    train: str | None = None,
    test: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    on_error: OnError | None = None,
    limit: int | None = None,
    flip: bool = False,
    reading: Reading | None = None,
    sample: int | None = None,
    division: Division | None = None,
    cache: PixelCache | None = CACHE,
) -> Split:
    """Open the training images and the held-out ones of a source.

    Where the source has neither a `test` nor a `validation` split, a share of the training images
    is held out. One image alone is both.

    Args:
        source: See `open_images`.
        share: Of the training images that is held out, in (0, 1); None: 0.02.
        train: The split to train on; None: "train".
        test: The split to hold out, which must exist; None: "test", else "validation", else a
            share.
        size: See `open_images`.
        channels: See `open_images`.
        on_error: See `open_images`.
        limit: Number of images of the training split, see `open_images`.
        flip: Mirror the training images, see `open_images`.
        reading: See `open_images`.
        sample: At most so many images of each set. No other image is decoded, so that a broken one
            among them does not matter; copies are compared among these.
        division: An earlier division. Where the source is the same, it decides all settings that
            are None, those of `reading` too, and its held-out images are held out. Of another
            source it decides nothing.
        cache: See `open_images`.

    Raises:
        UserError: For everything that is wrong with the source.
    """
    opened = _Opened.of(source, share, train, test, on_error, limit, reading, division)
    share, on_error = opened.share, opened.settings.on_error
    flipped, plain = (Transform(size, channels, flip=f) for f in (flip, False))
    sample = check_limit(sample)
    with readable(source):
        part = opened.training
        labels = part.labels
        if opened.test is not None:
            training = image_set(part.spread(sample), flipped, on_error, cache)
            held_out = image_set(opened.test.spread(sample), plain, on_error, cache)
        elif sample is None and opened.held_out is None:
            images = image_set(part, flipped, on_error, cache)
            rows, held = divide(len(images), share, images.labels, images.digests)
            training, held_out = images.subset(rows), images.subset(held)
        else:
            rows, held = opened.rows()
            labels = part.part(rows).labels
            training, held_out = (
                image_set(part.part(r).spread(sample), flipped, on_error, cache)
                for r in (rows, held)
            )
    # of a sample the classes are those of all images
    labels = training.labels if sample is None else labels
    training = _trained_classes(training, labels)
    training, held_out = _same_classes(training, held_out)
    own = opened.test is None and not {*training.rows.tolist()}.isdisjoint(held_out.rows.tolist())
    if not own and opened.held_out is None:
        held_out = _without_copies(training, held_out)
    logger.info(
        "%s: %d training images, %d held out (%s)",
        source, len(training), len(held_out), opened.origin,
    )  # fmt: skip
    rows = "" if opened.test is not None or sample is not None else ranges(held_out.rows.tolist())
    return Split(training, held_out, opened.division(rows, own and bool(rows)))


def open_both(
    source: str | Path, share: float | None = None, **options: Any
) -> tuple[ImageSet, ImageSet]:
    """The training images and the held-out images of `open_split`, with its arguments."""
    split = open_split(source, share, **options)
    return split.training, split.held_out


def open_training_buckets(
    source: str | Path,
    share: float | None = None,
    *,
    side: int,
    step: int,
    channels: int | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
    reading: Reading | None = None,
    cache: PixelCache | None = CACHE,
) -> tuple[BucketedImages, Division]:
    """The training images of `open_split` in buckets, see `open_buckets`.

    Args:
        source: See `open_images`.
        share: See `open_split`.
        side: Side of the square bucket in pixels.
        step: All sides are its multiples.
        channels: See `open_images`.
        on_error: See `open_images`.
        limit: See `open_split`.
        reading: See `open_images`.
        cache: See `open_images`.

    Raises:
        UserError: For everything that is wrong with the source or the sizes.
    """
    opened = _Opened.of(source, share, None, None, on_error, limit, reading, None)
    share = opened.share
    with readable(source):
        images = buckets_of(opened.training, side, step, channels, on_error, cache=cache)
    held, shared = "", False
    if opened.test is None:
        rows = torch.cat([s.rows for s in images.sets])
        order = rows.argsort()
        labels = None if images.labels is None else images.labels[order]
        digests = np.concatenate([s.digests for s in images.sets])[order.numpy()]
        kept, held_out = divide(len(images), share, labels, digests)
        held = ranges(rows[order][held_out].tolist())
        shared = len(kept) + len(held_out) > len(images)
        images = images.subset(order[kept].sort().values)
    if images.labels is not None:
        classes, names = _present(images.labels, images.class_names)
        sets = [s.relabel(classes, names) for s in images.sets]
        images = BucketedImages(sets, images.places, images.skipped)
    logger.info("%s: %d training images (%s)", source, len(images), opened.origin)
    return images, opened.division(held, shared)


@dataclass(frozen=True)
class _Settings:
    """Settings that decide the images of the training split."""

    train: str
    on_error: OnError
    reading: Reading

    def listing(self, source: str | Path) -> tuple[Splits, Listing]:
        """The splits of a source, and the listing of the training split."""
        splits = splits_of(source, self.on_error, self.reading, self.train)
        return splits, listing_of(splits, self.train, source)


@dataclass(frozen=True)
class _Opened:
    """The listings of a source: of training, before and after the limit, and of a test split."""

    whole: Listing
    training: Listing
    test: Listing | None
    names: tuple[str, str | None]
    share: float
    limit: int | None
    settings: _Settings
    held_out: Sequence[int] | None
    """Rows of the source that an earlier division holds out."""
    shared: bool
    """They were trained on too."""

    @classmethod
    def of(
        cls,
        source: str | Path,
        share: float | None,
        train: str | None,
        test: str | None,
        on_error: OnError | None,
        limit: int | None,
        reading: Reading | None,
        division: Division | None,
    ) -> "_Opened":
        number_in("held-out share", SHARE if share is None else share, above=0, below=1)
        check_limit(limit)
        rows, shared, own_share = None, False, share
        with readable(source):
            settings, splits, whole = _training(source, train, on_error, reading, division)
            if division is not None and division.identity == _identity(whole):
                limit = division.limit if limit is None else limit
                if test is None and share is None:
                    test, share, shared = division.test, division.share, division.shared
                    if test is None and division.held_out:
                        rows = numbers(division.held_out)
                elif test != division.test or share not in (None, division.share):
                    logger.warning(
                        "other images of %s are held out than in training (%s): the model was "
                        "trained on some of them, and numbers of held-out images are too good",
                        source, division.test or f"a share of {division.share:g}",
                    )  # fmt: skip
            elif division is not None:
                logger.warning(
                    "%s is not what the model was trained on (%s, %d images): images that it was "
                    "trained on may be among the held-out ones",
                    source, division.source, division.images,
                )  # fmt: skip
            train = settings.train
            name = _test_name(splits, train) if rows is None and test is None else test
            used = {canonical_split(train), train, name, canonical_split(name or "")}
            if unused := [s for s in splits if s not in used]:
                logger.warning("splits of %s that are not used: %s", source, listed(unused))
            listing = None if name is None else listing_of(splits, name, source)
        if own_share is not None and name is not None:
            logger.warning(
                "a held-out share of %g has no effect: the split %s of %s is held out",
                own_share, name, source,
            )  # fmt: skip
        part = whole.spread(limit)
        names = train, name
        return cls(whole, part, listing, names, share or SHARE, limit, settings, rows, shared)

    def rows(self) -> tuple[Sequence[int], Sequence[int]]:
        """Indices of training and held-out images in `training`, without decoding any."""
        count = len(self.training.images)
        if self.held_out is None:
            labels = self.training.labels
            labels = None if labels is None else torch.as_tensor(np.asarray(labels))
            kept, held = divide(count, self.share, labels)
            return kept.tolist(), held.tolist()
        own = range(count) if self.training.rows is None else self.training.rows
        held_out = set(self.held_out)
        held = [i for i, row in enumerate(own) if row in held_out]
        kept = [i for i, row in enumerate(own) if self.shared or row not in held_out]
        return kept or held, held or kept

    @property
    def origin(self) -> str:
        """The choice of the held-out images, for the log."""
        if self.names[1] is not None:
            return f"the split {self.names[1]}"
        if self.shared:
            return "they were trained on too: none could be held out"
        if self.held_out is not None:
            return "those that the model's training held out"
        return f"no test split: a share of {self.share:g}, the same in every run"

    def division(self, rows: str, shared: bool) -> Division:
        """The record of the division."""
        train, test = self.names
        return Division(
            self.whole.name, len(self.whole.images), _identity(self.whole), train, test, self.share,
            self.limit, self.settings.on_error, self.settings.reading.values or None, rows, shared,
        )  # fmt: skip


def _training(
    source: str | Path,
    train: str | None,
    on_error: OnError | None,
    reading: Reading | None,
    division: Division | None,
) -> tuple[_Settings, Splits, Listing]:
    """The training split, by an earlier division's settings where it is the same data."""
    settings = _Settings(train or "train", on_error or "raise", reading or Reading())
    if division is not None:
        values = {**(division.reading or {}), **settings.reading.values}
        earlier = _Settings(
            train or division.train, on_error or division.on_error, Reading(**values)
        )
        if earlier == settings:
            return settings, *settings.listing(source)
        # other data may have no such split or column
        with suppress(UserError):
            splits, whole = earlier.listing(source)
            if division.identity == _identity(whole):
                return earlier, splits, whole
    return settings, *settings.listing(source)


def _test_name(splits: Splits, train: str) -> str | None:
    names = [s for s in ("test", "validation") if s in splits and s != canonical_split(train)]
    return names[0] if names else None


def _identity(listing: Listing) -> str:
    labels = b"" if listing.labels is None else np.asarray(listing.labels, np.int64).tobytes()
    values = [listing.identity, len(listing.images), listing.class_names, hash_bytes(labels)]
    return hash_json(values)[:32]


def divide(
    count: int,
    share: float,
    labels: Int64[Tensor, " N"] | None = None,
    digests: UInt8[np.ndarray, "N 32"] | None = None,
) -> tuple[Int64[Tensor, " K"], Int64[Tensor, " M"]]:
    """Divide 0..count-1 into the indices of training and of held-out images, by a fixed order.

    Args:
        count: Number of images.
        share: Of them that is held out, at least one image.
        labels: Class of each image, -1 for none: no class loses its last image.
        digests: Hash of each image: those with the same one stay together.

    Returns:
        Both in order. Where no image can be held out, the training images are all.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    kept = max(1, round(share * count)) if count > 1 else 0
    kinds = np.full(count, -1) if labels is None else labels.numpy()
    left = np.bincount(kinds + 1, minlength=1)
    copies = np.arange(count)
    if digests is not None:
        copies = np.unique(digests, axis=0, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(copies, minlength=1)
    by_copy, ends = np.argsort(copies, kind="stable"), np.cumsum(sizes)
    several = np.flatnonzero(sizes > 1).tolist()
    members = {k: by_copy[ends[k] - sizes[k] : ends[k]] for k in several}

    def fits(group: np.ndarray) -> bool:
        taken = np.bincount(kinds[group] + 1, minlength=len(left))
        return len(group) < count and not ((taken == left) & (taken > 0))[1:].any()

    held: list[int] = []
    larger: list[np.ndarray] = []
    for i in order.tolist():
        if len(held) == kept:
            break
        group = members.get(int(copies[i]), np.array([i]))
        if i != group[0]:  # its turn is that of the first copy
            continue
        if not fits(group):
            continue
        if len(held) + len(group) > kept:
            larger.append(group)
            continue
        held += group.tolist()
        left = left - np.bincount(kinds[group] + 1, minlength=len(left))
    if not held and larger:
        held = min(larger, key=len).tolist()
    if not held:
        if count > 1:
            logger.warning(
                "none of %d images can be held out without emptying a class or the training "
                "images: held-out numbers are those of training images", count,
            )  # fmt: skip
        return torch.arange(count), order[: kept or 1].sort().values
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[held] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def _present(
    labels: Int64[Tensor, " N"], names: tuple[str, ...]
) -> tuple[list[int], tuple[str, ...]]:
    """New label of each class, and the names of the classes that have images."""
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if missing:
        logger.warning("classes without images are left out: %s", listed(missing))
    present = [k for k in range(len(names)) if counts[k]]
    number = [DROPPED] * len(names)
    for new, old in enumerate(present):
        number[old] = new
    return number, tuple(names[k] for k in present)


def _trained_classes(
    training: ImageSet, labels: Sequence[int] | Int64[np.ndarray, " N"] | Tensor | None
) -> ImageSet:
    """Training images without the classes that `labels` lacks."""
    if training.labels is None or labels is None:
        return training
    number, names = _present(torch.as_tensor(labels), training.class_names)
    return training.relabel(number, names)


def _same_classes(training: ImageSet, held_out: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Held-out images with the training images' classes; those of other classes are left out."""
    names = training.class_names
    if held_out.class_names == names or held_out.labels is None:
        return training, held_out
    number = [names.index(n) if n in names else DROPPED for n in held_out.class_names]
    same = held_out.relabel(number, names)
    if less := len(held_out) - len(same):
        others = [n for n in held_out.class_names if n not in names]
        logger.warning(
            "left out %d held-out images: their classes have no training image (%s)",
            less, listed(others),
        )  # fmt: skip
    if not len(same):
        raise UserError(
            f"no held-out image of {held_out.name} has a class of the training images "
            f"({listed([*names])}): give the splits the same classes"
        )
    return training, same


def _without_copies(training: ImageSet, held_out: ImageSet) -> ImageSet:
    """Held-out images that are no exact copies of training images."""
    trained = {d.tobytes() for d in training.digests}
    rows = [i for i, d in enumerate(held_out.digests) if d.tobytes() not in trained]
    if len(rows) == len(held_out):
        return held_out
    copies = len(held_out) - len(rows)
    if not rows:
        logger.warning("all %d held-out images are copies of training images", copies)
        return held_out
    logger.warning("left out %d held-out images: copies of training images", copies)
    return held_out.subset(rows)


def ranges(rows: Sequence[int]) -> str:
    """Sorted numbers as text: 3, 17, 40, 41, 42 -> "3,17,40-42"."""
    parts: list[str] = []
    for _, run in groupby(enumerate(sorted(rows)), key=lambda pair: pair[1] - pair[0]):
        values = [row for _, row in run]
        parts.append(f"{values[0]}-{values[-1]}" if len(values) > 1 else f"{values[0]}")
    return ",".join(parts)


def numbers(text: str) -> list[int]:
    """The numbers that `ranges` wrote.

    Raises:
        ValueError: For another text.
    """
    result: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        result += range(int(first), int(last or first) + 1)
    return result
