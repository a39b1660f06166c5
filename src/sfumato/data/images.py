"""A set of pictures of one shape, with labels or captions: verified when it is opened, handed out
in batches.

    batch(indices)["image"]  float32 (B, C, H, W) in [-1, 1]

Pixels stay uint8 in memory when they fit (`MEMORY_LIMIT`), otherwise each batch decodes its own.
The fingerprint is a hash of the decoded pixels themselves, before resizing: a file that is re-saved
with the same pixels keeps it, one changed pixel does not.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from sfumato.data.transform import Picture, Transform, decode, to_float
from sfumato.errors import UserError
from sfumato.io.atomic import hash_bytes

MEMORY_LIMIT = 1 << 30
"""Bytes of transformed uint8 pixels up to which a set is held in memory."""

log = logging.getLogger(__name__)


@runtime_checkable
class Pictures(Protocol):
    """A sequence of undecoded pictures: a tuple of paths, an array (N, H, W), the rows of a
    table.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Picture: ...


@dataclass(frozen=True)
class Listing:
    """What a source knows before anything is decoded; all sequences run over the same N pictures.

    labels     N class numbers, -1 where a picture has none; None for a source without classes
    captions   N texts, or None
    picture_name  number -> what to call that picture in a message; it can be pickled, and so can
                  the `ImageSet`
    skipped    pictures that the source already had to leave out: (name, reason)
    """

    name: str
    pictures: Pictures
    picture_name: Callable[[int], str]
    labels: Sequence[int] | np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    captions: Sequence[str] | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for what, values in (("labels", self.labels), ("captions", self.captions)):
            if values is not None and len(values) != len(self.pictures):
                raise UserError(
                    f"{self.name} has {len(self.pictures)} images but {len(values)} {what}: there must be one each, so a file is incomplete"
                )

    def part(self, rows: Sequence[int]) -> "Listing":
        """The pictures with these numbers, in this order; the classes stay those of all."""
        pictures, labels = self.pictures, None if self.labels is None else np.asarray(self.labels)
        return replace(
            self,
            pictures=pictures[list(rows)]
            if isinstance(pictures, np.ndarray)
            else _Part(pictures, tuple(rows)),
            picture_name=tuple(map(self.picture_name, rows)).__getitem__,
            labels=None if labels is None else labels[list(rows)],
            captions=None if self.captions is None else [self.captions[i] for i in rows],
        )


@dataclass(frozen=True)
class _Part:
    """Some of the pictures of a source."""

    pictures: Pictures
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Picture:
        return self.pictures[self.rows[index]]


class _Memory:
    """All pixels at hand: uint8 (N, c, H, W), where c = 1 also serves 3 equal channels."""

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


class _OnDemand:
    """Pixels decoded for each batch, compared with what was seen when the set was opened."""

    def __init__(
        self,
        listing: Listing,
        rows: list[int],
        transform: Transform,
        shape: tuple[int, ...],
        digests: np.ndarray,
    ):
        self.listing, self.rows, self.transform, self.shape, self.digests = (
            listing,
            rows,
            transform,
            shape,
            digests,
        )

    def _one(self, row: int) -> np.ndarray:
        where = self.rows[row]
        try:
            pixels = decode(self.listing.pictures[where])
        except UserError as error:
            raise UserError(
                f"{self.listing.picture_name(where)} can no longer be read ({error}): open the images again"
            ) from error
        if not np.array_equal(digest(pixels), self.digests[row]):
            raise UserError(
                f"{self.listing.picture_name(where)} changed while it was in use: open the images again"
            )
        return self.transform.fit(pixels)

    def take(self, rows: Tensor) -> Tensor:
        with ThreadPoolExecutor(_workers()) as pool:
            return to_float(torch.from_numpy(np.stack(list(pool.map(self._one, rows.tolist())))))


@final
class ImageSet:
    """N pictures of one shape. Made by `open_images`.

    name         of the source
    shape        (C, H, W) of every image
    labels       int64 (N,), -1 where a picture has no class; None when the source has no classes
    class_names  name of class 0, 1, ...; empty when there are none
    captions     N texts, or None
    skipped      pictures left out when opening with on_error="skip": (name, reason)
    transform    what made the pixels, `channels` resolved to what the data have
    """

    def __init__(
        self,
        pixels: _Memory | _OnDemand,
        rows: Int64[Tensor, " N"],
        *,
        name: str,
        transform: Transform,
        labels: Int64[Tensor, " N"] | None = None,
        class_names: tuple[str, ...] = (),
        captions: list[str] | None = None,
        skipped: list[tuple[str, str]] | None = None,
    ):
        self._pixels, self._rows, self._fingerprint = pixels, rows, ""
        self.name, self.transform, self.shape = name, transform, tuple(pixels.shape)
        self.labels, self.class_names, self.captions = labels, class_names, captions
        self.skipped: list[tuple[str, str]] = list(skipped or [])

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images of {'x'.join(map(str, self.shape))}, {len(self.class_names)} classes)"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the decoded pixels, before the transform, in order. Labels and captions are
        no part of it.
        """
        if not self._fingerprint:
            self._fingerprint = hash_bytes(
                f"{len(self)} images", self._pixels.digests[self._rows.numpy()].tobytes()
            )
        return self._fingerprint

    def batch(
        self,
        indices: Int[Tensor, " B"] | Sequence[int],
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Images and labels by number, in the order asked for, repeats allowed.

        Returns "image" float32 (B, C, H, W) in [-1, 1] and "label" int64 (B,), -1 where there is
        none. With `transform.flip`, each image is mirrored with probability 1/2, drawn from
        `generator` (None: torch's global one). Raises `IndexError` for a number outside 0..N-1.
        """
        chosen = check_indices(indices, len(self))
        image = self._pixels.take(self._rows[chosen])
        if self.transform.flip:
            mirrored = torch.rand(len(chosen), generator=generator) < 0.5
            image[mirrored] = image[mirrored].flip(-1)
        return {"image": image, "label": labels_of(self.labels, chosen)}

    def subset(self, indices: Int[Tensor, " B"] | Sequence[int]) -> "ImageSet":
        """The images with these numbers, in this order; pixels are shared, not copied."""
        chosen = check_indices(indices, len(self))
        return ImageSet(
            self._pixels,
            self._rows[chosen],
            name=self.name,
            transform=self.transform,
            labels=None if self.labels is None else self.labels[chosen],
            class_names=self.class_names,
            captions=None if self.captions is None else [self.captions[i] for i in chosen.tolist()],
            skipped=self.skipped,
        )

    def unflipped(self) -> "ImageSet":
        """The same images without random mirroring."""
        same = self.subset(range(len(self)))
        same.transform = replace(self.transform, flip=False)
        return same


def check_indices(indices: Tensor | Sequence[int], count: int) -> Tensor:
    """Numbers as int64 (B,) on the CPU; `IndexError` outside 0..count-1 (negative numbers would
    hide mistakes).
    """
    chosen = torch.as_tensor(
        indices if isinstance(indices, Tensor) else list(indices), dtype=torch.int64
    ).cpu()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= count):
        raise IndexError(
            f"images {int(chosen.min())}..{int(chosen.max())} were asked for, but there are 0..{count - 1}"
        )
    return chosen


def labels_of(labels: Tensor | None, chosen: Tensor) -> Tensor:
    """int64 (B,): the labels of the chosen, -1 where there are none."""
    return torch.full((len(chosen),), -1, dtype=torch.int64) if labels is None else labels[chosen]


def digest(pixels: np.ndarray) -> np.ndarray:
    """SHA-256 of one decoded picture and its shape, as uint8 (32,)."""
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


def build(listing: Listing, transform: Transform, on_error: Literal["raise", "skip"]) -> ImageSet:
    """Decodes every picture once: finds the broken ones, the common shape and the digests; keeps
    the pixels if they fit.

    Raises `UserError` for a broken picture (on_error="raise"), when none is left, or when sizes
    differ and `size` is None.
    """
    checked, good, skipped = _check(listing, lambda shape: transform, on_error)
    height, width = checked[good[0]].shape[1:]
    for i in good:
        if checked[i].shape[1:] != (height, width):
            other = "x".join(map(str, checked[i].shape[1:]))
            raise UserError(
                f"the images of {listing.name} differ in size ({listing.picture_name(good[0])} is {height}x{width}, "
                f"{listing.picture_name(i)} is {other}): give one size, for example size={min(height, width)}"
            )
    return _held(listing, checked, [(good, transform)], skipped)[0]


def build_sizes(
    listing: Listing,
    size_of: Callable[[int, int], tuple[int, int]],
    transform: Transform,
    on_error: Literal["raise", "skip"],
) -> tuple[list[ImageSet], list[list[int]], list[tuple[str, str]]]:
    """`build` for several shapes at once: each picture, decoded once, gets the size that
    `size_of(height, width)` has for it upright.

    Returns one set a size that has pictures, smallest height first, the numbers of each set's
    pictures in the listing, and what was left out. All sets together are held in memory, or none.
    """
    checked, good, skipped = _check(
        listing, lambda shape: replace(transform, size=size_of(*shape)), on_error
    )
    sizes = sorted({checked[i].shape[1:] for i in good})
    rows = [[i for i in good if checked[i].shape[1:] == size] for size in sizes]
    parts = [(r, replace(transform, size=(h, w))) for (h, w), r in zip(sizes, rows, strict=True)]
    return _held(listing, checked, parts, skipped), rows, skipped


def _check(
    listing: Listing,
    transform_of: Callable[[tuple[int, int]], Transform],
    on_error: Literal["raise", "skip"],
) -> tuple[list[_Checked], list[int], list[tuple[str, str]]]:
    """Every picture, decoded once; the numbers of those that could be, at least one; and what was
    left out, with the source's own.
    """
    checked = _decode_all(listing, transform_of, on_error)
    skipped = [
        *listing.skipped,
        *((listing.picture_name(i), c.reason) for i, c in enumerate(checked) if c.reason),
    ]
    for name, reason in skipped:
        log.warning("left out %s: %s", name, reason)
    good = [i for i, c in enumerate(checked) if not c.reason]
    if not good:
        first = f": the first, {skipped[0][0]}, failed with {skipped[0][1]}" if skipped else ""
        raise UserError(f"none of the {len(skipped)} images of {listing.name} can be read{first}")
    return checked, good, skipped


def _held(
    listing: Listing,
    checked: list[_Checked],
    parts: list[tuple[list[int], Transform]],
    skipped: list[tuple[str, str]],
) -> list[ImageSet]:
    """A set for the numbers of each part, which share a shape; all have the same channels."""
    good = [i for rows, _ in parts for i in rows]
    channels = max(
        transform.channels or checked[i].shape[0] for rows, transform in parts for i in rows
    )
    fits = sum(channels * math.prod(checked[i].shape[1:]) for i in good) <= MEMORY_LIMIT
    fits = fits and all(checked[i].pixels is not None for i in good)
    sets: list[ImageSet] = []
    for rows, transform in parts:
        height, width = checked[rows[0]].shape[1:]
        transform = replace(transform, channels=channels)
        digests = np.stack([d for i in rows if (d := checked[i].digest) is not None])
        if fits:
            pixels = np.empty((len(rows), channels, height, width), np.uint8)
            # a grey picture among coloured ones is repeated by the assignment
            for row, i in enumerate(rows):
                pixels[row] = np.asarray(checked[i].pixels)
                # let go of each copy at once: the peak stays near one set
                checked[i] = replace(checked[i], pixels=None)
            store: _Memory | _OnDemand = _Memory(torch.from_numpy(pixels), channels, digests)
        else:
            store = _OnDemand(listing, rows, transform, (channels, height, width), digests)
        sets.append(assemble(listing, store, rows, transform, skipped))
    return sets


def _decode_all(
    listing: Listing,
    transform_of: Callable[[tuple[int, int]], Transform],
    on_error: Literal["raise", "skip"],
) -> list[_Checked]:
    def one(index: int) -> _Checked:
        try:
            decoded = decode(listing.pictures[index])
            pixels = transform_of((decoded.shape[0], decoded.shape[1])).fit(decoded)
            return _Checked(pixels, digest(decoded), pixels.shape)
        except UserError as error:
            return _Checked(None, None, (), str(error))

    checked: list[_Checked] = []
    room = MEMORY_LIMIT
    keep = True
    # nothing to decode: handing a tiny array to a thread costs more than resizing it
    small = isinstance(listing.pictures, np.ndarray)
    with ThreadPoolExecutor(_workers()) as pool:
        # a chunk at a time: decoded pictures must not pile up
        for start in range(0, len(listing.pictures), 64):
            for result in (map if small else pool.map)(
                one, range(start, min(start + 64, len(listing.pictures)))
            ):
                if result.reason and on_error == "raise":
                    name = listing.picture_name(len(checked))
                    advice = "replace or remove it, or open with on_error='skip' to leave it out"
                    raise UserError(
                        f"{name} cannot be read as an image ({result.reason}): {advice}"
                    )
                room -= 0 if result.pixels is None else result.pixels.nbytes
                if keep and room < 0:
                    keep = False
                    checked = [replace(c, pixels=None) for c in checked]
                checked.append(result if keep else replace(result, pixels=None))
    return checked


def assemble(
    listing: Listing,
    store: "_Memory | _OnDemand",
    good: Sequence[int],
    transform: Transform,
    skipped: list[tuple[str, str]],
) -> ImageSet:
    """An `ImageSet` over the pictures numbered `good` of a listing, whose pixels are the rows of
    `store`.
    """
    return ImageSet(
        store,
        torch.arange(len(good)),
        name=listing.name,
        transform=transform,
        labels=None
        if listing.labels is None
        else torch.from_numpy(np.asarray(listing.labels, dtype=np.int64)[np.asarray(good)]),
        class_names=listing.class_names,
        captions=None if listing.captions is None else [listing.captions[i] for i in good],
        skipped=skipped,
    )


def from_array(listing: Listing, pixels: np.ndarray, transform: Transform) -> ImageSet:
    """Grey uint8 (N, H, W) that needs no resizing: shared as it is, nothing decoded, digests only
    when asked for.
    """
    transform = replace(transform, channels=transform.channels or 1)
    store = _Memory(torch.from_numpy(pixels)[:, None], transform.channels or 1)
    return assemble(listing, store, range(len(pixels)), transform, [])
