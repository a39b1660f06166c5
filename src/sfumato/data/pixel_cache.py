"""Resized pixels on disk, so that large originals are decoded once and not at every step.

    folder/KEY[:16]/NAME.safetensors   "pixels" uint8 (n, c, H, W), "content" and "digest" (n, 32),
                                       "crc" int64 (n,): the CRC-32 of each image's pixels
    KEY = hash(transform, sizes, format)     content = SHA-256 of the original's bytes

An image is found by its content: a file that is replaced, even by one of equal size and time, is
decoded again, and one that moved is not. Shards are written whole, so that a stopped run goes on
behind its last one, and are memory-mapped. The least recently used shards make room for new ones. A
shard whose bits have changed on the disk is removed, and its images are decoded again.
"""

import logging
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from sfumato.data.transform import to_float
from sfumato.errors import UserError
from sfumato.io.atomic import NotWritten, hash_bytes, hash_json, read_tensors, write_tensors
from sfumato.io.paths import cache_folder, expand_user

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when decoding or resizing changes: all pixels are then made anew."""
SHARD = 64 << 20
"""Bytes of pixels in a file, about."""
LIMIT = 20 * 10**9
"""Bytes of the whole cache, where no other limit is set."""
_DECODED = (
    "originals are decoded at every start, and at every step where memory cannot hold their pixels"
)


@dataclass(frozen=True)
class PixelCache:
    """Place and size of the cache.

    Attributes:
        folder: None: $XDG_CACHE_HOME/sfumato/pixels (~/.cache/sfumato/pixels).
        limit: Bytes that all its files may take together.
    """

    folder: Path | None = None
    limit: int = LIMIT

    @property
    def place(self) -> Path:
        """The folder."""
        if self.folder is not None:
            return expand_user(self.folder)
        return cache_folder("pixels")


@dataclass(frozen=True)
class _Place:
    """The place of an image's pixels: a shard and a row."""

    path: Path
    row: int
    crc: int | None


CACHE = PixelCache()


class PixelStore:
    """The cached images of one transform.

    Args:
        cache: Place and size.
        transform: Hash of all that turns originals into pixels.

    Attributes:
        reserved: `reserve` was called.
        writing: New pixels are kept.
    """

    def __init__(self, cache: PixelCache, transform: str):
        key = hash_json({"format": FORMAT, "transform": transform})
        self.cache, self.folder = cache, cache.place / key[:16]
        self.reserved, self.writing = False, False
        self._rows: dict[bytes, _Place] = {}
        self._digests: dict[bytes, np.ndarray] = {}
        self._shards: dict[Path, Tensor] = {}
        self._used: set[Path] = set()
        self._waiting: dict[tuple[int, ...], list[tuple[bytes, np.ndarray, np.ndarray]]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            tensors = read_tensors(path)
            contents, digests = tensors["content"].numpy(), tensors["digest"].numpy()
            self._shards[path] = tensors["pixels"]
            crcs = tensors["crc"].tolist() if "crc" in tensors else None  # earlier: none
        except (UserError, KeyError):  # removed by another process, or damaged
            return
        for row, content in enumerate(contents):
            crc = None if crcs is None else crcs[row]
            self._rows[content.tobytes()] = _Place(path, row, crc)
            self._digests[content.tobytes()] = digests[row].copy()

    def find(self, content: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Pixels (c, H, W) of an original, memory-mapped, and the digest of its decoded self."""
        place = self._rows.get(content)
        if place is None:
            return None
        pixels = self._shards[place.path][place.row].numpy()
        if place.crc is not None and zlib.crc32(pixels.tobytes()) != place.crc:
            self._forget(content, place.path)
            return None
        self._used.add(place.path)
        return pixels, self._digests[content]

    def _forget(self, content: bytes, path: Path) -> None:
        """Leave out an image whose pixels are damaged, and delete their shard.

        The shard stays mapped for its other images, which the next start decodes.
        """
        self._rows.pop(content, None)
        if path.exists():
            logger.warning("%s has changed on the disk: its images are decoded again", path)
        with suppress(OSError):  # a cache that can only be read
            path.unlink(missing_ok=True)

    def reserve(self, size: int, title: str) -> None:
        """Begin to write, if so many bytes find room; else say that they do not.

        Args:
            size: Bytes of all pixels of the source, about.
            title: Name of the source.
        """
        self.reserved = True
        # shards that are open may hold images of the source that come later
        if size > self.cache.limit or not self._make_room(size, self._shards):
            logger.warning(
                "%s has %.1f GB of resized pixels, and the cache in %s holds %.1f GB: %s; training "
                "gives it more with data.cache_size",
                title, size / 1e9, self.cache.place, self.cache.limit / 1e9, _DECODED,
            )  # fmt: skip
            return
        self.writing = True
        logger.info(
            "resized pixels of %s are kept in %s (%.1f GB; the cache holds %.1f GB at most)",
            title, self.folder, size / 1e9, self.cache.limit / 1e9,
        )  # fmt: skip

    def _make_room(self, size: int, own: Collection[Path]) -> bool:
        """Remove the shards that were used longest ago until `size` bytes fit.

        Args:
            size: Bytes of the source, those of the shards in `own` included.
            own: Shards that stay.
        """
        files: list[tuple[float, int, Path]] = []
        for path in self.cache.place.glob("*/*.safetensors"):
            try:
                facts = path.stat()
            except OSError:  # removed by another process
                continue
            files.append((facts.st_mtime, facts.st_size, path))
        kept = sum(s for _, s, path in files if path in own)
        others = sorted(file for file in files if file[2] not in own)
        total, room = sum(s for _, s, _ in others), max(0, self.cache.limit - max(size, kept))
        for _, length, path in others:
            if total <= room:
                break
            with suppress(OSError):  # a cache that can only be read
                path.unlink(missing_ok=True)
                total -= length
        return total <= room

    def add(self, content: bytes, digest: np.ndarray, pixels: np.ndarray) -> None:
        """Keep the pixels (c, H, W) of an original; they are written with others of their shape."""
        if not self.writing or content in self._rows:
            return
        group = self._waiting.setdefault(pixels.shape, [])
        group.append((content, digest, pixels))
        if len(group) * pixels.nbytes >= SHARD:
            self._write(pixels.shape)

    def finish(self) -> None:
        """Write what waits, note which shards were used, and keep the limit."""
        for shape in [*self._waiting]:
            self._write(shape)
        for path in self._used:
            with suppress(OSError):  # removed by another process, or a cache that can only be read
                os.utime(path)
        if self.writing:  # open shards may have been another source's of the same transform
            self._make_room(0, self._used)

    def _write(self, shape: tuple[int, ...]) -> None:
        group = self._waiting.pop(shape)
        contents = np.stack([np.frombuffer(content, np.uint8) for content, _, _ in group])
        tensors = {
            "pixels": torch.from_numpy(np.stack([pixels for _, _, pixels in group])),
            "content": torch.from_numpy(contents),
            "digest": torch.from_numpy(np.stack([digest for _, digest, _ in group])),
            "crc": torch.tensor([zlib.crc32(pixels.tobytes()) for _, _, pixels in group]),
        }
        path = self.folder / f"{hash_bytes(contents.tobytes())[:32]}.safetensors"
        try:
            write_tensors(path, tensors)
        except (NotWritten, OSError) as error:
            self.writing = False
            logger.warning("%s; %s", error, _DECODED)
            return
        self._open(path)
        self._used.add(path)

    def pixels(self, contents: Sequence[bytes], shape: tuple[int, ...]) -> "MappedPixels | None":
        """The pixels of originals, in this order; None where one of them is missing."""
        if any(content not in self._rows for content in contents):
            return None
        digests = np.stack([self._digests[content] for content in contents])
        return MappedPixels([self._rows[c] for c in contents], shape, digests, self._shards)


class MappedPixels:
    """Pixels in memory-mapped shards: uint8 (N, c, H, W), where c = 1 also serves 3 channels.

    Args:
        places: N places.
        shape: (C, H, W) of every image.
        digests: Of the originals, see `ImageSet.digests`.
        shards: The pixels of each shard, mapped: a shard that another process removes stays.
    """

    def __init__(
        self,
        places: Sequence[_Place],
        shape: tuple[int, ...],
        digests: UInt8[np.ndarray, "N 32"],
        shards: Mapping[Path, Tensor],
    ):
        paths = list(dict.fromkeys(place.path for place in places))
        number = {path: i for i, path in enumerate(paths)}
        self._paths, self.shape, self.digests = paths, shape, digests
        self._shard = np.array([number[place.path] for place in places])
        self._row = np.array([place.row for place in places])
        self._open: dict[int, Tensor] = {i: shards[path] for i, path in enumerate(paths)}

    def __getstate__(self) -> dict[str, Any]:
        # another process maps the files itself instead of being sent their contents
        return {**self.__dict__, "_open": {}}

    def _pixels(self, shard: int) -> Tensor:
        if shard not in self._open:
            self._open[shard] = read_tensors(self._paths[shard])["pixels"]
        return self._open[shard]

    def take(self, rows: Tensor) -> Tensor:
        """Float32 (B, C, H, W) in [-1, 1] of the rows."""
        out = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for k, row in enumerate(rows.tolist()):
            # a grey image among coloured ones is repeated by the assignment
            out[k] = self._pixels(int(self._shard[row]))[int(self._row[row])]
        return to_float(out)
