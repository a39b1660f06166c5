"""Images of one shape, with labels or captions: verified when opened, read in batches.

    batch(indices)["image"]  float32 (B, C, H, W) in [-1, 1]

Pixels stay uint8 in memory when they fit (`MEMORY_LIMIT`), otherwise in a cache on disk
(`pixel_cache.py`); without a cache each batch decodes its own.
The fingerprint is a hash of the decoded pixels themselves, before resizing: a file that is re-saved
with the same pixels keeps it, one changed pixel does not. Large JPEG files are decoded at a
fraction of their size (`draft.py`), and so hashed.
"""

import copy
import hashlib
import logging
import math
import os
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from sfumato.data.draft import reduced
from sfumato.data.pixel_cache import MappedPixels, PixelCache, PixelStore
from sfumato.data.transform import RawImage, Transform, decode, to_float
from sfumato.errors import UserError
from sfumato.io import progress
from sfumato.io.atomic import hash_bytes
from sfumato.io.image_files import has_frames

MEMORY_LIMIT = 1 << 30
"""Bytes of transformed uint8 pixels up to which a set is held in memory.

Originals with more bytes than that, decoded, are not decoded again: the cache keeps the result."""

OnError = Literal["raise", "skip"]
"""Treatment of truncated and corrupt images: raise a `UserError`, or leave them out."""
Indices = Int[Tensor, " B"] | Sequence[int]
Skipped = list[tuple[str, str]]
"""(name, reason) of each image that was left out."""

logger = logging.getLogger(__name__)


@runtime_checkable
class RawImages(Protocol):
    """A sequence of images before decoding: paths, an array (N, H, W), rows of a table."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawImage: ...


@dataclass(frozen=True)
class Listing:
    """The images of a source before anything is decoded; all sequences have the same length N.

    Attributes:
        name: Of the source.
        images: N images.
        image_name: Index -> name of that image in a message. It can be pickled, and so can the
            `ImageSet`.
        labels: N class numbers, -1 where an image has none; None for a source without classes.
        class_names: Name of class 0, 1, ...; empty when there are none. Kept in Unicode's composed
            form (NFC): macOS decomposes names of folders. Names equal in that form are one class.
        captions: N tuples of texts, all captions of an image, or None.
        skipped: (name, reason) of the images that the source already left out.
        rows: Index of each image in the source; None: 0..N-1.
        identity: Hash of the images' names or of the files that hold them; "" where labels and
            counts are all that is cheap to compare.

    Raises:
        UserError: For sequences of different lengths.
    """

    name: str
    images: RawImages
    image_name: Callable[[int], str]
    labels: Sequence[int] | np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    captions: Sequence[tuple[str, ...]] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    rows: Sequence[int] | None = None
    identity: str = ""

    def __post_init__(self) -> None:
        composed = [unicodedata.normalize("NFC", name) for name in self.class_names]
        if composed != list(self.class_names):
            names = tuple(dict.fromkeys(composed))
            object.__setattr__(self, "class_names", names)
            if self.labels is not None:
                number = np.array([*map(names.index, composed), -1])  # -1 is the last
                object.__setattr__(self, "labels", number[np.asarray(self.labels)])
        for name, values in (("labels", self.labels), ("captions", self.captions)):
            if values is not None and len(values) != len(self.images):
                raise UserError(
                    f"{self.name} has {len(self.images)} images but {len(values)} {name}: "
                    "there must be one each, so a file is incomplete"
                )

    def part(self, rows: Sequence[int]) -> "Listing":
        """The images with these indices, in this order; the classes stay those of all."""
        rows, images = list(rows), self.images
        own = range(len(images)) if self.rows is None else self.rows
        return replace(
            self,
            images=images[rows] if isinstance(images, np.ndarray) else _Part(images, rows),
            image_name=tuple(map(self.image_name, rows)).__getitem__,
            labels=None if self.labels is None else np.asarray(self.labels)[rows],
            captions=None if self.captions is None else [self.captions[i] for i in rows],
            rows=[own[i] for i in rows],
        )

    def spread(self, limit: int | None) -> "Listing":
        """At most `limit` images, spread over the classes: see `spread`."""
        if limit is None or limit >= len(self.images):
            return self
        return self.part(spread(self.labels, len(self.images), limit).tolist())


def spread(
    labels: Sequence[int] | np.ndarray | None, count: int, limit: int
) -> Int64[np.ndarray, " M"]:
    """Choose `limit` of `count` images at random, from each class its share; in order.

    The choice is always the same. Each class has an image before any has a second.

    Args:
        labels: Class of each image, -1 for none; None: no classes.
        count: Number of images.
        limit: Number of images to choose.
    """
    generator = np.random.default_rng(0)
    place = generator.random(count)
    if labels is not None:
        kinds = np.asarray(labels)
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            rank = np.empty(len(rows))
            rank[generator.permutation(len(rows))] = np.arange(len(rows))
            # the first of each class in random order, then ranks as shares of the class
            place[rows] = np.where(rank == 0, place[rows] - 1, (rank + place[rows]) / len(rows))
    return np.sort(np.argsort(place, kind="stable")[:limit])


@dataclass(frozen=True)
class _Part:
    """Some of the images of a source."""

    images: RawImages
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> RawImage:
        return self.images[self.rows[index]]


class _Memory:
    """Pixels in memory: uint8 (N, c, H, W), where c = 1 also serves 3 equal channels."""

    def __init__(self, pixels: Tensor, channels: int, digests: np.ndarray | None = None):
        self.pixels, self.channels, self._digests = pixels, channels, digests
        self.shape = (channels, *pixels.shape[2:])

    def take(self, rows: Tensor) -> Tensor:
        chosen = to_float(self.pixels.index_select(0, rows))
        return chosen.repeat(1, self.channels, 1, 1) if chosen.shape[1] != self.channels else chosen

    @property
    def digests(self) -> np.ndarray:
        # only for data whose transform changed nothing: these are the decoded pixels
        if self._digests is None:
            self._digests = np.stack([digest(image) for image in self.pixels[:, 0].numpy()])
        return self._digests


@dataclass(frozen=True)
class _OnDemand:
    """Pixels decoded for each batch and compared with those at opening."""

    listing: Listing
    rows: list[int]
    transform: Transform
    shape: tuple[int, ...]
    digests: np.ndarray

    def _one(self, row: int) -> np.ndarray:
        index = self.rows[row]
        name = self.listing.image_name(index)
        try:
            image, _ = reduced(self.listing.images[index], lambda shape: self.transform)
            pixels = decode(image)
        except UserError as error:
            reason = f"{name} can no longer be read ({error})"
            raise UserError(f"{reason}: open the images again") from error
        if not np.array_equal(digest(pixels), self.digests[row]):
            raise UserError(f"{name} changed while it was in use: open the images again")
        return self.transform.fit(pixels)

    def take(self, rows: Tensor) -> Tensor:
        with ThreadPoolExecutor(_workers()) as pool:
            return to_float(torch.from_numpy(np.stack(list(pool.map(self._one, rows.tolist())))))


@final
class ImageSet:
    """N images of one shape. Made by `open_images`.

    Attributes:
        name: Of the source.
        shape: (C, H, W) of every image.
        labels: int64 (N,), -1 where an image has no class; None when the source has no classes.
        class_names: Name of class 0, 1, ...; empty when there are none.
        captions: N texts, the first caption of each image, or None.
        caption_choices: N tuples with all captions of each image, or None.
        rows: int64 (N,), the index of each image in its source.
        skipped: (name, reason) of the images left out when opening with on_error="skip".
        transform: The transform of the pixels, its `channels` resolved to those of the data.
    """

    def __init__(
        self,
        pixels: "_Memory | _OnDemand | MappedPixels",
        listing: Listing,
        indices: Sequence[int],
        transform: Transform,
        skipped: Sequence[tuple[str, str]] = (),
    ):
        """The images of a listing with these indices, whose pixels are the rows of `pixels`."""
        self._pixels, self._places, self._fingerprint = pixels, torch.arange(len(indices)), ""
        self.name, self.class_names = listing.name, listing.class_names
        self.transform, self.shape = transform, tuple(pixels.shape)
        self.skipped: Skipped = list(skipped)
        self.labels: Int64[Tensor, " N"] | None = None
        if listing.labels is not None:
            labels = np.asarray(listing.labels, dtype=np.int64)
            self.labels = torch.from_numpy(labels[np.asarray(indices)])
        captions, rows = listing.captions, listing.rows
        self.caption_choices: list[tuple[str, ...]] | None = None
        if captions is not None:
            self.caption_choices = [captions[i] for i in indices]
        chosen = np.asarray(indices, dtype=np.int64)
        source = chosen if rows is None else np.asarray(rows, dtype=np.int64)[chosen]
        self.rows: Int64[Tensor, " N"] = torch.from_numpy(source)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def captions(self) -> list[str] | None:
        """The first caption of each image, or None."""
        choices = self.caption_choices
        return None if choices is None else [texts[0] for texts in choices]

    def __repr__(self) -> str:
        images = f"{len(self)} images of {by(self.shape)}"
        return f"ImageSet({self.name!r}, {images}, {len(self.class_names)} classes)"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the decoded pixels, before the transform, in order.

        Labels and captions are no part of it.
        """
        if not self._fingerprint:
            self._fingerprint = hash_bytes(f"{len(self)} images", self.digests.tobytes())
        return self._fingerprint

    @property
    def digests(self) -> UInt8[np.ndarray, "N 32"]:
        """SHA-256 of each image's decoded pixels, before the transform; copies have the same."""
        return self._pixels.digests[self._places.numpy()]

    def batch(
        self, indices: Indices, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Images and labels by index, in the order of `indices`, repeats allowed.

        With `transform.flip`, each image is mirrored with probability 1/2.

        Args:
            indices: (B,) in 0..N-1.
            generator: Of the mirroring; None: torch's global one.

        Returns:
            "image" float32 (B, C, H, W) in [-1, 1] and "label" int64 (B,), -1 where there is none.

        Raises:
            IndexError: For an index outside 0..N-1.
        """
        chosen = check_indices(indices, len(self))
        image = self._pixels.take(self._places[chosen])
        if self.transform.flip:
            mirrored = torch.rand(len(chosen), generator=generator) < 0.5
            image[mirrored] = image[mirrored].flip(-1)
        return {"image": image, "label": labels_of(self.labels, chosen)}

    def subset(self, indices: Indices) -> "ImageSet":
        """The images with these indices, in this order; pixels are shared, not copied."""
        chosen, part = check_indices(indices, len(self)), copy.copy(self)
        part._places, part._fingerprint = self._places[chosen], ""
        part.rows, part.skipped = self.rows[chosen], list(self.skipped)
        if self.labels is not None:
            part.labels = self.labels[chosen]
        if self.caption_choices is not None:
            part.caption_choices = [self.caption_choices[i] for i in chosen.tolist()]
        return part

    def relabel(self, number: Sequence[int], names: tuple[str, ...]) -> "ImageSet":
        """The images with other class numbers.

        Args:
            number: New label of each class; below -1: the class and its images are left out.
            names: Names of the new classes.
        """
        if self.labels is None:
            return self
        labels = torch.tensor([*number, -1])[self.labels]
        part = self.subset((labels >= -1).nonzero()[:, 0])
        part.labels, part.class_names = (labels[labels >= -1] if names else None), names
        return part

    def unflipped(self) -> "ImageSet":
        """The same images without random mirroring."""
        same = self.subset(range(len(self)))
        same.transform = replace(self.transform, flip=False)
        return same


def by(shape: Sequence[int]) -> str:
    """Write a shape as text, such as 3x32x32."""
    return "x".join(map(str, shape))


def check_indices(indices: Indices, count: int) -> Tensor:
    """Return indices as int64 (B,) on the CPU.

    Raises:
        IndexError: For an index outside 0..count-1; a negative one would hide a mistake.
    """
    chosen = torch.as_tensor(
        indices if isinstance(indices, Tensor) else list(indices), dtype=torch.int64
    ).cpu()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= count):
        requested = f"images {int(chosen.min())}..{int(chosen.max())} were requested"
        raise IndexError(f"{requested}, but there are 0..{count - 1}")
    return chosen


def labels_of(labels: Tensor | None, chosen: Tensor) -> Tensor:
    """int64 (B,): the labels of the chosen indices, -1 where there are none."""
    return torch.full((len(chosen),), -1, dtype=torch.int64) if labels is None else labels[chosen]


def digest(pixels: np.ndarray) -> np.ndarray:
    """SHA-256 of one decoded image and its shape, as uint8 (32,)."""
    hashed = hashlib.sha256(repr(pixels.shape).encode())
    hashed.update(np.ascontiguousarray(pixels).data)
    return np.frombuffer(hashed.digest(), np.uint8)


def _workers() -> int:
    # threads: Pillow's decoders and hashlib let go of the interpreter lock
    return min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Checked:
    pixels: np.ndarray | None
    digest: np.ndarray | None
    shape: tuple[int, ...]
    reason: str = ""
    content: bytes = b""
    """SHA-256 of the original's bytes; empty without a cache."""
    decoded: int = 0
    """Bytes of the original's pixels; 0 where the cache had the result."""
    frames: bool = False
    """The file has further frames or pages."""


def build(
    listing: Listing, transform: Transform, on_error: OnError, cache: PixelCache | None = None
) -> ImageSet:
    """Decode every image once: find the broken ones, the common shape and the digests.

    The pixels are kept if they fit, or in the cache.

    Raises:
        UserError: For a broken image (on_error="raise"), where none is left, and where sizes differ
            and `size` is None.
    """
    store = None if cache is None else PixelStore(cache, transform.hash)
    checked, good, skipped = _check(listing, lambda shape: transform, on_error, store)
    height, width = checked[good[0]].shape[1:]
    for i in good:
        if checked[i].shape[1:] != (height, width):
            raise UserError(
                f"the images of {listing.name} differ in size "
                f"({listing.image_name(good[0])} is {height}x{width}, "
                f"{listing.image_name(i)} is {by(checked[i].shape[1:])}): "
                f"give one size, for example size={min(height, width)}"
            )
    return _sets(listing, checked, [(good, transform)], skipped, store)[0]


def build_sizes(
    listing: Listing,
    size_of: Callable[[int, int], tuple[int, int]],
    transform: Transform,
    on_error: OnError,
    store: PixelStore | None = None,
) -> tuple[list[ImageSet], list[list[int]], Skipped]:
    """`build` for several shapes at once; each image is decoded once.

    Args:
        listing: The images.
        size_of: (height, width) of an upright image -> its size in pixels.
        transform: The other settings.
        on_error: See `build`.
        store: Keeps the pixels; its key has the sizes.

    Returns:
        One set a size that has images, smallest height first; the indices of each set's images in
        the listing; the images left out. All sets together are held in memory, or none.
    """
    checked, good, skipped = _check(
        listing, lambda shape: replace(transform, size=size_of(*shape)), on_error, store
    )
    sizes = sorted({checked[i].shape[1:] for i in good})
    rows = [[i for i in good if checked[i].shape[1:] == size] for size in sizes]
    parts = [(r, replace(transform, size=(h, w))) for (h, w), r in zip(sizes, rows, strict=True)]
    return _sets(listing, checked, parts, skipped, store), rows, skipped


def _check(
    listing: Listing,
    transform_of: Callable[[tuple[int, int]], Transform],
    on_error: OnError,
    store: PixelStore | None,
) -> tuple[list[_Checked], list[int], Skipped]:
    """Every image, decoded once; the indices of the good ones, at least one; all left out."""
    checked = _decode_all(listing, transform_of, on_error, store)
    bad = ((listing.image_name(i), c.reason) for i, c in enumerate(checked) if c.reason)
    skipped = [*listing.skipped, *bad]
    report(listing.name, skipped)
    good = [i for i, c in enumerate(checked) if not c.reason]
    if several := [listing.image_name(i) for i in good if checked[i].frames]:
        logger.warning(
            "%d images of %s have further frames or pages, which are not read: %s%s",
            len(several), listing.name, ", ".join(several[:3]), ", ..." * (len(several) > 3),
        )  # fmt: skip
    if not good:
        first = f": the first, {skipped[0][0]}, failed with {skipped[0][1]}" if skipped else ""
        raise UserError(f"none of the {len(skipped)} images of {listing.name} can be read{first}")
    return checked, good, skipped


def report(source: str, skipped: Skipped) -> None:
    """Log in one line the images that are left out, by reason, with some of their names."""
    if not skipped:
        return
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    parts = [
        f"{reason} ({len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in reasons.items()
    ]
    more = f"; and {len(parts) - 8} more reasons" if len(parts) > 8 else ""
    logger.warning(
        "left out %d images of %s: %s%s", len(skipped), source, "; ".join(parts[:8]), more
    )


def _sets(
    listing: Listing,
    checked: list[_Checked],
    parts: list[tuple[list[int], Transform]],
    skipped: Skipped,
    store: PixelStore | None,
) -> list[ImageSet]:
    """A set for the indices of each part, which share a shape; all have the same channels."""
    good = [i for rows, _ in parts for i in rows]
    channels = max(
        transform.channels or checked[i].shape[0] for rows, transform in parts for i in rows
    )
    fits = sum(channels * math.prod(checked[i].shape[1:]) for i in good) <= MEMORY_LIMIT
    fits = fits and all(checked[i].pixels is not None for i in good)
    sets: list[ImageSet] = []
    for rows, transform in parts:
        shape = (channels, *checked[rows[0]].shape[1:])
        transform = replace(transform, channels=channels)
        digests = np.stack([d for i in rows if (d := checked[i].digest) is not None])
        if fits:
            pixels = np.empty((len(rows), *shape), np.uint8)
            # a grey image among coloured ones is repeated by the assignment
            for row, i in enumerate(rows):
                pixels[row] = np.asarray(checked[i].pixels)
                # let go of each copy at once: the peak stays near one set
                checked[i] = replace(checked[i], pixels=None)
            held = _Memory(torch.from_numpy(pixels), channels, digests)
        else:
            kept = store and store.pixels([checked[i].content for i in rows], shape)
            held = kept or _OnDemand(listing, rows, transform, shape, digests)
        sets.append(ImageSet(held, listing, rows, transform, skipped))
    return sets


def _decode_all(
    listing: Listing,
    transform_of: Callable[[tuple[int, int]], Transform],
    on_error: OnError,
    store: PixelStore | None,
) -> list[_Checked]:
    def one(index: int) -> _Checked:
        try:
            image, content = listing.images[index], b""
            frames = not isinstance(image, np.ndarray) and has_frames(image)
            if store is not None and (data := _original(image)) is not None:
                image, content = data, hashlib.sha256(data).digest()
                if kept := store.find(content):
                    return _Checked(*kept, kept[0].shape, content=content, frames=frames)
            image, transform = reduced(image, transform_of)
            decoded = decode(image)
            transform = transform or transform_of((decoded.shape[0], decoded.shape[1]))
            pixels = transform.fit(decoded)
            shape, size = pixels.shape, decoded.nbytes
            return _Checked(pixels, digest(decoded), shape, "", content, size, frames)
        except UserError as error:
            return _Checked(None, None, (), str(error))

    checked: list[_Checked] = []
    room, keep, count, decoded = MEMORY_LIMIT, True, len(listing.images), 0
    # nothing to decode: handing a tiny array to a thread costs more than resizing it
    small = isinstance(listing.images, np.ndarray)
    if small:  # pixels are no originals of a cache
        store = None
    with ThreadPoolExecutor(_workers()) as pool:
        run = map if small else pool.map
        # a chunk at a time: decoded images must not pile up
        for start in range(0, count, 64):
            progress.report("opening images", start, count)
            for result in run(one, range(start, min(start + 64, count))):
                if result.reason and on_error == "raise":
                    name = listing.image_name(len(checked))
                    raise UserError(
                        f"{name} cannot be read as an image ({result.reason}): "
                        "replace or remove it, or open with on_error='skip' to leave it out "
                        "(evaluate --on-error skip, train --data.on-error skip)"
                    )
                room -= 0 if result.pixels is None else result.pixels.nbytes
                decoded += result.decoded
                if (
                    store is not None
                    and not store.reserved
                    and min(room, MEMORY_LIMIT - decoded) < 0
                ):
                    size = (MEMORY_LIMIT - room) * count // (len(checked) + 1)
                    store.reserve(size, listing.name)
                    for earlier in checked:
                        _keep(earlier, store)
                if store is not None:
                    _keep(result, store)
                if keep and room < 0:
                    keep = False
                    checked = [replace(c, pixels=None) for c in checked]
                checked.append(result if keep else replace(result, pixels=None))
        progress.report("opening images", count, count)
    if store is not None:
        store.finish()
    return checked


def _original(image: RawImage) -> bytes | None:
    """The bytes of an image file; None for pixels, and for a file that cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes() if isinstance(image, str | Path) else None
    except OSError:
        return None  # `decode` says why


def _keep(result: _Checked, store: PixelStore) -> None:
    if result.pixels is not None and result.digest is not None and result.content:
        store.add(result.content, result.digest, result.pixels)


def from_array(listing: Listing, pixels: np.ndarray, transform: Transform) -> ImageSet:
    """A set of grey uint8 (N, H, W) that need no resizing.

    The array is shared, nothing is decoded, and digests are computed on demand.
    """
    transform = replace(transform, channels=transform.channels or 1)
    store = _Memory(torch.from_numpy(pixels)[:, None], transform.channels or 1)
    return ImageSet(store, listing, range(len(pixels)), transform)
