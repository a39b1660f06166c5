"""Aspect buckets: images of different aspects, in sets of one shape and about equal area.

    height x width <= side^2, both multiples of step
    bucket = argmin |log(w / h) - log(bucket_w / bucket_h)|

Cut to aspect r', an image of aspect r keeps min(r / r', r' / r) = exp(-|log r - log r'|) of its
area, so the nearest in log aspect is the bucket of least crop. NovelAI's aspect-ratio bucketing;
Podell et al. 2023, SDXL (arXiv:2307.01952, section 2.3 and appendix I). The loop draws every batch
from one bucket (`train/batch_sampler.py`).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Generic, TypeVar, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sfumato.data.images import (
    ImageSet,
    Indices,
    Listing,
    OnError,
    build_sizes,
    by,
    check_indices,
)
from sfumato.data.latent_cache import LatentSet, statistics_of
from sfumato.data.pixel_cache import CACHE, PixelCache, PixelStore
from sfumato.data.reading import Reading
from sfumato.data.source import open_with
from sfumato.data.transform import Transform
from sfumato.errors import UserError
from sfumato.io.atomic import hash_json
from sfumato.validate import number_in

Set = TypeVar("Set", ImageSet, LatentSet)


def bucket_sizes(side: int, step: int, largest_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket in pixels, from the tallest to the widest.

    Every multiple of `step` is one side of a bucket, tall and wide; the other is the largest
    multiple with which the area is at most side^2. The square is always there, and no two buckets
    have one aspect.

    Args:
        side: Of the square in pixels, a multiple of `step`.
        step: All sides are its multiples.
        largest_aspect: The largest quotient of the long side and the short one, at least 1.

    Raises:
        UserError: For impossible values.
    """
    if step < 1 or side < 1 or side % step:
        raise UserError(
            f"buckets in steps of {step} pixels do not lead to squares of {side}: "
            "the size must be a multiple of the step"
        )
    number_in("largest_aspect", largest_aspect, 1, hint="1 is the square's")
    # long^2 = aspect * area <= largest_aspect * side^2
    longest = int(side * math.sqrt(largest_aspect))
    pairs = [(a, side * side // a // step * step) for a in range(step, longest + 1, step)]
    sizes = {
        s for a, b in pairs if 0 < max(a, b) <= largest_aspect * min(a, b) for s in ((a, b), (b, a))
    }
    return tuple(sorted(sizes, key=lambda s: s[1] / s[0]))


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that crops least of an image: the nearest in log aspect, the first of two."""
    return min(sizes, key=lambda s: abs(math.log(width * s[0] / (height * s[1]))))


class _Buckets(Generic[Set]):
    """Sets of different shapes behind one numbering: the first set's, then the second's."""

    def __init__(self, sets: Sequence[Set]):
        self.sets = tuple(sets)
        ends = accumulate((len(s) for s in sets), initial=0)
        self.groups = tuple(range(a, b) for a, b in pairwise(ends))

    def __len__(self) -> int:
        return self.groups[-1].stop

    def _shapes(self) -> str:
        return ", ".join(f"{len(s)} of {by(s.shape)}" for s in self.sets)

    @cached_property
    def labels(self) -> Int64[Tensor, " N"] | None:
        """The class of every image, -1 where it has none; None when the source has no classes."""
        labels = [s.labels for s in self.sets if s.labels is not None]
        return torch.cat(labels) if len(labels) == len(self.sets) else None

    @cached_property
    def captions(self) -> list[str] | None:
        """The text of every image, or None."""
        captions = [s.captions for s in self.sets if s.captions is not None]
        return [c for texts in captions for c in texts] if len(captions) == len(self.sets) else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of class 0, 1, ...; empty when there are none."""
        return self.sets[0].class_names


@final
class BucketedImages(_Buckets[ImageSet]):
    """Images of several shapes behind one numbering. Made by `open_buckets`.

    Attributes:
        sets: An `ImageSet` for each bucket that has images; captions, classes and channels are
            alike in all.
        groups: The indices of each set's images.
        places: int64 (N,), the index of each image among those of the source that could be read.
        skipped: (name, reason) of the images left out when opening with on_error="skip".
    """

    def __init__(
        self,
        sets: Sequence[ImageSet],
        places: Int64[Tensor, " N"],
        skipped: Sequence[tuple[str, str]] = (),
    ):
        super().__init__(sets)
        self.places, self.skipped = places, list(skipped)

    def __repr__(self) -> str:
        return f"BucketedImages({len(self)} images: {self._shapes()})"

    @cached_property
    def caption_choices(self) -> list[tuple[str, ...]] | None:
        """All captions of every image, or None."""
        choices = [s.caption_choices for s in self.sets if s.caption_choices is not None]
        return [c for part in choices for c in part] if len(choices) == len(self.sets) else None

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.sets[0].name

    def subset(self, indices: Indices) -> "BucketedImages":
        """The images with these indices, bucket by bucket, and in this order within each.

        Buckets that lose all their images are left out.

        Raises:
            UserError: For no index.
        """
        chosen = check_indices(indices, len(self))
        parts = [
            (s, rows, g.start)
            for s, g in zip(self.sets, self.groups, strict=True)
            if len(rows := chosen[(chosen >= g.start) & (chosen < g.stop)])
        ]
        if not parts:
            raise UserError("a subset without any image has no bucket: choose at least one")
        sets = [s.subset(rows - start) for s, rows, start in parts]
        rows = torch.cat([rows for _, rows, _ in parts])
        return BucketedImages(sets, self.places[rows], self.skipped)


def open_buckets(
    source: str | Path,
    *,
    side: int,
    step: int,
    split: str = "train",
    channels: int | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
    flip: bool = False,
    largest_aspect: float = 2.0,
    reading: Reading | None = None,
    cache: PixelCache | None = CACHE,
) -> BucketedImages:
    """Open images into buckets of about side x side pixels; verify each by decoding it once.

    The aspect is that of the upright image (EXIF). The memory limit is for all buckets together.

    Args:
        source: See `open_images`.
        side: Side of the square bucket in pixels, see `bucket_sizes`.
        step: All sides are its multiples.
        split: See `open_images`.
        channels: See `open_images`.
        on_error: See `open_images`.
        limit: See `open_images`.
        flip: See `open_images`.
        largest_aspect: Images beyond it are cropped to it.
        reading: See `open_images`.
        cache: See `open_images`.

    Raises:
        UserError: For everything that is wrong with the source or the sizes.
    """
    options = (side, step, channels, on_error, flip, largest_aspect, cache)
    return open_with(
        lambda listing: buckets_of(listing, *options), source, split, on_error, limit, reading
    )


def buckets_of(
    listing: Listing,
    side: int,
    step: int,
    channels: int | None = None,
    on_error: OnError = "raise",
    flip: bool = False,
    largest_aspect: float = 2.0,
    cache: PixelCache | None = None,
) -> BucketedImages:
    """The images of a listing in buckets; arguments and errors are those of `open_buckets`."""
    sizes = bucket_sizes(side, step, largest_aspect)
    transform = Transform(channels=channels, flip=flip)
    store = None if cache is None else PixelStore(cache, hash_json([transform.hash, sizes]))
    sets, rows, skipped = build_sizes(
        listing,
        lambda height, width: nearest_bucket(height, width, sizes),
        transform,
        on_error,
        store,
    )
    indices = np.concatenate(rows)
    places = torch.from_numpy(np.searchsorted(np.sort(indices), indices))
    return BucketedImages(sets, places, skipped)


@final
class BucketedLatents(_Buckets[LatentSet]):
    """The cached latents of `BucketedImages`, by the same indices.

    Attributes:
        sets: A `LatentSet` a bucket, all with the same channels.
        groups: The indices of each set, which share a shape: a batch is made of one group.
        key: Hash of the keys of the caches.

    Raises:
        UserError: For no set, and sets of different channels.
    """

    def __init__(self, sets: Sequence[LatentSet]):
        channels = sorted({s.shape[0] for s in sets})
        if len(channels) != 1:
            raise UserError(
                f"latents of {channels or 'no'} channels: "
                "expected sets of one autoencoder, at least one"
            )
        super().__init__(sets)
        self.key: str = hash_json([s.key for s in self.sets])

    def __repr__(self) -> str:
        return f"BucketedLatents({self.key[:16]}, {len(self)} latents: {self._shapes()})"

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """`LatentSet.batch` for indices of one group.

        Raises:
            UserError: For no index, and for indices of several groups.
            IndexError: For an index outside 0..N-1.
        """
        chosen = check_indices(indices, len(self))
        if not len(chosen):
            raise UserError("a batch of no latents has no shape: ask for at least one number")
        low, high = int(chosen.min()), int(chosen.max())
        group = bisect_right([g.start for g in self.groups], low) - 1
        if high >= self.groups[group].stop:
            raise UserError(
                f"latents {low} and {high} differ in shape: "
                f"a batch is made of numbers of one of the groups {list(self.groups)}"
            )
        return self.sets[group].batch(chosen - self.groups[group].start)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std a channel over all latents and cells, see `statistics_of`."""
        return statistics_of(self.sets)
