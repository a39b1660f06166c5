"""Cache of latents: the encoder's mean and std of every image, in memory-mapped shards.

    folder/KEY[:16]/shard-00000.safetensors   "mean", "std" float32 (n, C, h, w)
    folder/KEY[:16]/index.json                rows, size and SHA-256 of each shard
    KEY = hash(pixels, transform, encoder, format)

The latent itself is drawn at training time, z = mean + std * eps, so the cache keeps the posterior
(Rombach et al. 2022, arXiv:2112.10752, appendix G) and the data do not shrink to one sample each.
Its variance per channel, by the law of total variance, is Var(mean) + E[std^2].
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.images import ImageSet, Indices, by, check_indices, labels_of
from sfumato.errors import NumericalError, UserError
from sfumato.io.atomic import hash_json, read_json, read_tensors, write_json, write_tensors
from sfumato.validate import positive_int

FORMAT = 1
"""Raise it when the meaning of a shard changes: every old cache is then a different key."""

Encode = Callable[[Float[Tensor, "B C H W"]], tuple[Tensor, Tensor]]
"""Images (B, C, H, W) in [-1, 1] -> mean and std (B, c, h, w) of the raw latent.

The result may lie on any device, in any float dtype."""
Progress = Callable[[int, int], None]
"""Called with the images done and all images."""


@final
class LatentSet:
    """The cached latents of an `ImageSet`, by the same indices. Made by `cache_latents`.

    Attributes:
        shape: (C, h, w) of a latent.
        key: Hash of the images, the transform and the encoder; sets with one key hold the same
            numbers.
        labels: Those of the images.
        class_names: Those of the images.
        captions: Those of the images.
    """

    def __init__(self, folder: Path, index: dict[str, Any], images: ImageSet):
        self.key: str = index["key"]
        self.shape: tuple[int, ...] = tuple(index["shape"])
        self.labels, self.captions = images.labels, images.captions
        self.class_names = images.class_names
        self._count: int = index["count"]
        self._shard_size: int = index["shard_size"]
        self._paths = [folder / name for name in sorted(index["shards"])]
        self._open: dict[int, dict[str, Tensor]] = {}
        # mapped now, read later: a file replaced by another process stays ours
        for number, path in enumerate(self._paths):
            rows = min(self._shard_size, self._count - number * self._shard_size)
            if any(tensor.shape != (rows, *self.shape) for tensor in self._shard(number).values()):
                raise UserError(
                    f"{path} does not hold {rows} latents: another process builds with another "
                    "shard_size; run again when it is done"
                )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"LatentSet({self.key[:16]}, {len(self)} latents of {by(self.shape)})"

    def __getstate__(self) -> dict[str, Any]:
        # another process maps the files itself instead of being sent their contents
        return {**self.__dict__, "_open": {}}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            self._open[number] = read_tensors(self._paths[number])
        return self._open[number]

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Raw latents by image index, in the order of `indices`.

        Returns:
            "mean" and "std", float32 (B, C, h, w), and "label" int64 (B,), -1 where there is none.

        Raises:
            IndexError: For an index outside 0..N-1.
        """
        chosen = check_indices(indices, len(self))
        mean, std = (torch.empty(len(chosen), *self.shape) for _ in range(2))
        shards = chosen // self._shard_size
        for number in shards.unique().tolist():
            here = (shards == number).nonzero()[:, 0]
            rows = chosen[here] - number * self._shard_size
            for name, out in (("mean", mean), ("std", std)):
                out[here] = self._shard(number)[name].index_select(0, rows)
        return {"mean": mean, "std": std, "label": labels_of(self.labels, chosen)}

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std a channel of the raw latents, see `statistics_of`."""
        return statistics_of([self])


def statistics_of(sets: Sequence[LatentSet]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std a channel of the raw latents over all sets, images and cells.

    They are those of `LatentSpace`; each cell counts once. Streamed in float64, merging blocks by
    the pairwise update of Chan, Golub & LeVeque (1979); the variance is that of the population. A
    channel that never changes has std 0.
    """
    count, channels = 0, sets[0].shape[0]
    mean, squares, noise = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    for latents, start in ((s, start) for s in sets for start in range(0, len(s), 1024)):
        block = latents.batch(range(start, min(start + 1024, len(latents))))
        values = block["mean"].double().transpose(0, 1).flatten(1)
        noise += block["std"].double().square().sum(dim=(0, 2, 3))
        n, delta = values.shape[1], values.mean(1) - mean
        within = (values - values.mean(1, keepdim=True)).square().sum(1)
        squares += within + delta.square() * (count * n / (count + n))
        mean += delta * (n / (count + n))
        count += n
    std = ((squares + noise) / count).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def cache_latents(
    images: ImageSet,
    encode: Encode,
    encoder_hash: str,
    folder: str | Path,
    *,
    batch_size: int = 256,
    shard_size: int = 8192,
    progress: Progress | None = None,
) -> LatentSet:
    """Encode every image that is not yet in the cache, and open the cache.

    A build that was stopped goes on at the first shard that is missing or damaged (size and SHA-256
    are checked every time). Two processes may build at once: each takes over the other's finished
    shards. Nothing in the cache is ever reused for other pixels, another transform or encoder.

    Args:
        images: The images; they are encoded unflipped and in order.
        encode: See `Encode`; called without gradients.
        encoder_hash: Identifies the encoder's weights (and dtype, where that matters).
        folder: Holds one subfolder a key.
        batch_size: Images encoded at a time.
        shard_size: Images in one file.
        progress: Called after every batch, and once for each shard that was there already.

    Raises:
        NumericalError: For a latent that is not finite.
        UserError: For a full disk, and an encoder that returns other shapes.
    """
    if len(images) == 0:
        raise UserError(f"{images.name} has no image left: there is nothing to encode")
    positive_int("batch_size", batch_size)
    positive_int("shard_size", shard_size)
    parts = {"images": images.fingerprint, "transform": images.transform.hash}
    key = hash_json({"format": FORMAT, **parts, "encoder": encoder_hash})
    place = Path(folder) / key[:16]
    images = images.unflipped()
    _sweep(place)
    if not _read_index(place, key):
        _write_index(place, key, len(images), shard_size, [], {})
    # go on with the shards that are there, ours or another process's
    shard_size = int(_read_index(place, key)["shard_size"])
    shape: list[int] = []
    entries: dict[str, Any] = {}
    for number, start in enumerate(range(0, len(images), shard_size)):
        rows = range(start, min(start + shard_size, len(images)))
        name = f"shard-{number:05d}.safetensors"
        # Read again at every shard: another process may have finished it in the meantime.
        index = _read_index(place, key)
        entry = index.get("shards", {}).get(name)
        same_size = index.get("shard_size") == shard_size
        if entry is None or not same_size or not _whole(place / name, entry, len(rows)):
            tensors = _encode(images, encode, rows, batch_size, progress)
            now = list(tensors["mean"].shape[1:])
            if shape and now != shape:
                raise UserError(
                    f"encode returned latents of {shape} and then of {now}: "
                    "one size of image gives one size of latent"
                )
            # no metadata of ours: safetensors writes several in random order
            write_tensors(place / name, tensors)
            size, digest = _measure(place / name)
            entry = {"rows": len(rows), "bytes": size, "sha256": digest, "shape": now}
            # others may have written theirs while we encoded
            others = _read_index(place, key).get("shards", {})
            _write_index(place, key, len(images), shard_size, now, {**others, name: entry})
        elif progress is not None:
            progress(rows.stop, len(images))
        entries[name] = entry
        shape = shape or entry["shape"]
    index = _read_index(place, key)
    written = index.get("shards", {})
    # one may be lost when two write at one moment
    complete = {name: written.get(name, entry) for name, entry in entries.items()}
    if written != complete or index.get("count") != len(images) or index.get("shape") != shape:
        index = _write_index(place, key, len(images), shard_size, shape, complete)
    return LatentSet(place, index, images)


def _write_index(
    place: Path, key: str, count: int, shard_size: int, shape: list[int], shards: dict[str, Any]
) -> dict[str, Any]:
    index = {"format": FORMAT, "key": key, "count": count, "shape": shape, "shard_size": shard_size}
    index["shards"] = dict(sorted(shards.items()))
    write_json(place / "index.json", index)
    return index


def _read_index(place: Path, key: str) -> dict[str, Any]:
    """The index; empty when it is missing or damaged, so that the shards are built again."""
    try:
        index = read_json(place / "index.json")
    except UserError:
        return {}
    if not isinstance(index, dict) or index.get("key") != key:
        return {}
    size, shards = index.get("shard_size"), index.get("shards")
    if not isinstance(size, int) or size < 1 or not isinstance(shards, dict):
        return {}
    return index if all(isinstance(entry, dict) for entry in shards.values()) else {}


def _measure(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, read as a stream: a mapped one would count as resident."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _whole(path: Path, entry: dict[str, Any], rows: int) -> bool:
    if not path.is_file() or entry.get("rows") != rows or not entry.get("shape"):
        return False
    size = entry.get("bytes")
    return path.stat().st_size == size and _measure(path) == (size, entry.get("sha256"))


def _sweep(place: Path) -> None:
    """Remove files that killed builds left half written.

    A shard takes seconds to write: after an hour its writer is gone.
    """
    for left in place.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _encode(
    images: ImageSet,
    encode: Encode,
    rows: range,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"mean": [], "std": []}
    for start in range(rows.start, rows.stop, batch_size):
        stop = min(start + batch_size, rows.stop)
        with torch.no_grad():
            mean, std = encode(images.batch(range(start, stop))["image"])
        if mean.ndim != 4 or mean.shape != std.shape or len(mean) != stop - start:
            shapes = f"{tuple(mean.shape)} and {tuple(std.shape)} for {stop - start} images"
            raise UserError(
                f"encode returned {shapes}: expected mean and std of one shape (B, C, h, w)"
            )
        for name, value in (("mean", mean), ("std", std)):
            bad = (~value.isfinite()).flatten(1).any(1)
            if bad.any():
                index = start + int(bad.nonzero()[0, 0])
                raise NumericalError(
                    f"stage encode: the {name} of the latent of image {index} is not finite "
                    f"(dtype {value.dtype}); its shard was not written"
                )
            parts[name].append(value.detach().to("cpu", torch.float32))
        if progress is not None:
            progress(stop, len(images))
    return {name: torch.cat(values) for name, values in parts.items()}
