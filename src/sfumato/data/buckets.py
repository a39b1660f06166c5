"""Pictures of different aspects, in buckets of one shape each: little is cropped, and every bucket
has about the same number of pixels.

    height x width <= side^2, both multiples of step;  bucket = argmin |log(w / h) - log(bucket_w /
    bucket_h)|

Cut to aspect r', a picture of aspect r keeps min(r / r', r' / r) = exp(-|log r - log r'|) of its
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
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from sfumato.data.images import ImageSet, Listing, build_sizes, check_indices
from sfumato.data.latent_cache import LatentSet, statistics_of
from sfumato.data.source import open_with
from sfumato.data.transform import Transform
from sfumato.errors import UserError
from sfumato.io.atomic import hash_json
from sfumato.validate import number_in


def bucket_sizes(side: int, step: int, largest_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket in pixels, from the tallest to the widest.

    Every multiple of `step` is one side of a bucket, tall and wide; the other is the largest
    multiple with which the area is at most side^2. Those whose long side is more than
    `largest_aspect` times the short one are left out. The square is always there, so `side` must be
    a multiple of `step`; no two buckets have one aspect.
    """
    if step < 1 or side < 1 or side % step:
        raise UserError(
            f"buckets in steps of {step} pixels do not lead to squares of {side}: the size must be a multiple of the step"
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
    """The size that crops least of a picture: nearest in log aspect, the first of two that are
    equally near.
    """
    return min(sizes, key=lambda s: abs(math.log(width * s[0] / (height * s[1]))))


@final
class BucketedImages:
    """Pictures of several shapes, numbered through: those of the first set, then those of the
    second. Made by `open_buckets`.

    sets      an `ImageSet` for each bucket that has pictures; captions, classes and channels are
              alike in all
    places    int64 (N,): where each picture stands among those of the source that could be read
    skipped   pictures left out when opening with on_error="skip": (name, reason)
    """

    def __init__(
        self,
        sets: Sequence[ImageSet],
        places: Int64[Tensor, " N"],
        skipped: Sequence[tuple[str, str]] = (),
    ):
        self.sets, self.places, self.skipped = tuple(sets), places, list(skipped)
        self.groups = _ranges(self.sets)

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{len(s)} of {'x'.join(map(str, s.shape))}" for s in self.sets)
        return f"BucketedImages({len(self)} images: {shapes})"

    @property
    def labels(self) -> Int64[Tensor, " N"] | None:
        """The class of every picture, -1 where it has none; None when the source has no classes."""
        return _joined_labels(self.sets)

    @property
    def captions(self) -> list[str] | None:
        """The text of every picture, or None."""
        return _joined_captions(self.sets)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of class 0, 1, ...; empty when there are none."""
        return self.sets[0].class_names

    @property
    def name(self) -> str:
        """Of the source."""
        return self.sets[0].name

    def subset(self, indices: Int[Tensor, " B"] | Sequence[int]) -> "BucketedImages":
        """The pictures with these numbers, bucket by bucket and in this order within each; buckets
        that lose all are left out.
        """
        chosen = check_indices(indices, len(self))
        parts = [
            (s, chosen[(chosen >= g.start) & (chosen < g.stop)], g.start)
            for s, g in zip(self.sets, self.groups, strict=True)
        ]
        parts = [(s, numbers, start) for s, numbers, start in parts if len(numbers)]
        if not parts:
            raise UserError("a subset without any image has no bucket: choose at least one")
        sets = [s.subset(numbers - start) for s, numbers, start in parts]
        return BucketedImages(
            sets, self.places[torch.cat([numbers for _, numbers, _ in parts])], self.skipped
        )


def open_buckets(
    source: str | Path,
    *,
    side: int,
    step: int,
    split: str = "train",
    channels: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    flip: bool = False,
    largest_aspect: float = 2.0,
) -> BucketedImages:
    """Opens pictures into buckets of about side x side pixels, and verifies each by decoding it
    once.

    side, step, largest_aspect  see `bucket_sizes`; pictures beyond the largest aspect are cropped
                                to it
    the rest  see `open_images`; the aspect is that of the upright picture (EXIF), and the memory
              limit is for all buckets together

    Raises `UserError`, one sentence, for everything that is wrong with the source or the sizes.
    """
    sizes = bucket_sizes(side, step, largest_aspect)

    def make(listing: Listing) -> BucketedImages:
        transform = Transform(channels=channels, flip=flip)
        sets, rows, skipped = build_sizes(
            listing, lambda height, width: nearest_bucket(height, width, sizes), transform, on_error
        )
        numbers = np.concatenate(rows)
        return BucketedImages(
            sets, torch.from_numpy(np.searchsorted(np.sort(numbers), numbers)), skipped
        )

    return open_with(make, source, split=split, on_error=on_error, limit=limit)


@final
class BucketedLatents:
    """The cached latents of `BucketedImages`, by the same numbers: sets of different shapes behind
    one numbering.

    sets    a `LatentSet` a bucket; all with the same channels
    groups  the numbers of each set: those share a shape, so that a batch is made of one group
    key     what the caches were made from
    """

    def __init__(self, sets: Sequence[LatentSet]):
        if not sets or len({s.shape[0] for s in sets}) != 1:
            raise UserError(
                f"latents of {sorted({s.shape[0] for s in sets}) or 'no'} channels: expected sets of one autoencoder, at least one"
            )
        self.sets = tuple(sets)
        self.groups = _ranges(self.sets)
        self.key: str = hash_json([s.key for s in self.sets])

    def __len__(self) -> int:
        return self.groups[-1].stop

    def __repr__(self) -> str:
        shapes = ", ".join(f"{len(s)} of {'x'.join(map(str, s.shape))}" for s in self.sets)
        return f"BucketedLatents({self.key[:16]}, {len(self)} latents: {shapes})"

    @cached_property
    def labels(self) -> Int64[Tensor, " N"] | None:
        """Those of the images."""
        return _joined_labels(self.sets)

    @cached_property
    def captions(self) -> list[str] | None:
        """Those of the images."""
        return _joined_captions(self.sets)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the images."""
        return self.sets[0].class_names

    def batch(self, indices: Int[Tensor, " B"] | Sequence[int]) -> dict[str, Tensor]:
        """`LatentSet.batch` for numbers of one group; `UserError` for numbers of several,
        `IndexError` outside 0..N-1.
        """
        chosen = check_indices(indices, len(self))
        if not len(chosen):
            raise UserError("a batch of no latents has no shape: ask for at least one number")
        group = bisect_right([g.start for g in self.groups], int(chosen.min())) - 1
        if int(chosen.max()) >= self.groups[group].stop:
            low, high = int(chosen.min()), int(chosen.max())
            raise UserError(
                f"latents {low} and {high} differ in shape: a batch is made of numbers of one of the groups {list(self.groups)}"
            )
        return self.sets[group].batch(chosen - self.groups[group].start)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std a channel over all latents and places, each cell once: see
        `statistics_of`.
        """
        return statistics_of(self.sets)


def _ranges(sets: Sequence[ImageSet] | Sequence[LatentSet]) -> tuple[range, ...]:
    return tuple(range(a, b) for a, b in pairwise(accumulate((len(s) for s in sets), initial=0)))


def _joined_labels(sets: Sequence[ImageSet] | Sequence[LatentSet]) -> Tensor | None:
    labels = [s.labels for s in sets if s.labels is not None]
    return torch.cat(labels) if len(labels) == len(sets) else None


def _joined_captions(sets: Sequence[ImageSet] | Sequence[LatentSet]) -> list[str] | None:
    captions = [s.captions for s in sets if s.captions is not None]
    return [c for texts in captions for c in texts] if len(captions) == len(sets) else None
