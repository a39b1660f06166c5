"""Latents computed once: the encoder's mean and std of every image, in memory-mapped safetensors
shards.

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
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.images import ImageSet, check_indices, labels_of
from sfumato.errors import NumericalError, UserError
from sfumato.io.atomic import hash_json, read_json, read_tensors, write_json, write_tensors
from sfumato.validate import positive_int

FORMAT = 1
"""Raise it when the meaning of a shard changes: every old cache is then a different key."""

Encode = Callable[[Float[Tensor, "B C H W"]], tuple[Tensor, Tensor]]
"""Images (B, C, H, W) in [-1, 1] -> mean and std of the raw latent, both (B, c, h, w), on any
device, in any float dtype."""


@final
class LatentSet:
    """The cached latents of an `ImageSet`, by the same numbers. Made by `cache_latents`.

    shape  (C, h, w) of a latent
    key    what the cache was made from; two sets with one key hold the same numbers
    labels, class_names, captions  those of the images
    """

    def __init__(self, folder: Path, index: dict[str, Any], images: ImageSet):
        self.key: str = index["key"]
        self.shape: tuple[int, ...] = tuple(index["shape"])
        self.labels, self.class_names, self.captions = (
            images.labels,
            images.class_names,
            images.captions,
        )
        self._count: int = index["count"]
        self._shard_size: int = index["shard_size"]
        self._paths = [folder / name for name in sorted(index["shards"])]
        self._open: dict[int, dict[str, Tensor]] = {}
        # mapped now, read later: a file replaced by another process stays ours
        for number, path in enumerate(self._paths):
            rows = min(self._shard_size, self._count - number * self._shard_size)
            if any(tensor.shape != (rows, *self.shape) for tensor in self._shard(number).values()):
                raise UserError(
                    f"{path} does not hold {rows} latents: another process builds with another shard_size; run again when it is done"
                )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return (
            f"LatentSet({self.key[:16]}, {len(self)} latents of {'x'.join(map(str, self.shape))})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # another process maps the files itself instead of being sent their contents
        return {**self.__dict__, "_open": {}}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            self._open[number] = read_tensors(self._paths[number])
        return self._open[number]

    def batch(self, indices: Int[Tensor, " B"] | Sequence[int]) -> dict[str, Tensor]:
        """Raw latents by image number, in the order asked for.

        Returns "mean" and "std", float32 (B, C, h, w), and "label" int64 (B,), -1 where there is
        none. Raises `IndexError` for a number outside 0..N-1.
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
        """Mean and std a channel of the raw latents over all images and places: see
        `statistics_of`.
        """
        return statistics_of([self])


def statistics_of(sets: Sequence[LatentSet]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std a channel of the raw latents over all sets, images and places, as `LatentSpace`
    wants them; each cell counts once.

    Streamed in float64, merging blocks by the pairwise update of Chan, Golub & LeVeque (1979); the
    variance is that of the population. A channel that never changes has std 0.
    """
    count, mean, squares, noise = (
        0,
        *(torch.zeros(sets[0].shape[0], dtype=torch.float64) for _ in range(3)),
    )
    for latents, start in ((s, start) for s in sets for start in range(0, len(s), 1024)):
        block = latents.batch(range(start, min(start + 1024, len(latents))))
        values = block["mean"].double().transpose(0, 1).flatten(1)
        noise += block["std"].double().square().sum(dim=(0, 2, 3))
        n, delta = values.shape[1], values.mean(1) - mean
        squares += (values - values.mean(1, keepdim=True)).square().sum(1) + delta.square() * (
            count * n / (count + n)
        )
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
    progress: Callable[[int, int], None] | None = None,
) -> LatentSet:
    """Encodes every image that is not yet in the cache, and opens it.

    encode        see `Encode`; called without gradients on unflipped images in order
    encoder_hash  identifies the encoder's weights (and dtype, where that matters): another encoder,
                  another cache
    folder        holds one subfolder a key; nothing in it is ever reused for other pixels, another
                  transform or encoder
    progress      called with (images done, images in all) after every batch, and once for what was
                  there already

    A build that was stopped goes on at the first shard that is missing or damaged (size and SHA-256
    are checked every time); two processes may build at once: each takes over the other's finished
    shards. Raises `NumericalError` for a latent that is not finite, `UserError` for a full disk or
    an encoder that returns other shapes.
    """
    if len(images) == 0:
        raise UserError(f"{images.name} has no image left: there is nothing to encode")
    positive_int("batch_size", batch_size)
    positive_int("shard_size", shard_size)
    key = hash_json(
        {
            "format": FORMAT,
            "images": images.fingerprint,
            "transform": images.transform.hash,
            "encoder": encoder_hash,
        }
    )
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
        if (
            entry is None
            or index["shard_size"] != shard_size
            or not _whole(place / name, entry, len(rows))
        ):
            tensors = _encode(images, encode, rows, batch_size, progress)
            now = list(tensors["mean"].shape[1:])
            if shape and now != shape:
                raise UserError(
                    f"encode returned latents of {shape} and then of {now}: one size of image gives one size of latent"
                )
            # no metadata of ours: safetensors writes several in random order
            write_tensors(place / name, tensors)
            size, digest = _measure(place / name)
            entry = {"rows": len(rows), "bytes": size, "sha256": digest, "shape": now}
            # others may have written theirs while we encoded
            known = _read_index(place, key).get("shards", {})
            _write_index(place, key, len(images), shard_size, now, {**known, name: entry})
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
    index = {
        "format": FORMAT,
        "key": key,
        "count": count,
        "shape": shape,
        "shard_size": shard_size,
        "shards": dict(sorted(shards.items())),
    }
    write_json(place / "index.json", index)
    return index


def _read_index(place: Path, key: str) -> dict[str, Any]:
    """The index, or an empty one when there is none or it is damaged: then the shards are built
    again.
    """
    if not (place / "index.json").exists():
        return {}
    try:
        index = read_json(place / "index.json")
    except UserError:
        return {}
    if (
        not isinstance(index, dict)
        or index.get("key") != key
        or not isinstance(index.get("shard_size"), int)
        or index["shard_size"] < 1
    ):
        return {}
    shards = index.get("shards")
    return (
        index
        if isinstance(shards, dict) and all(isinstance(entry, dict) for entry in shards.values())
        else {}
    )


def _measure(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, read as a stream: a mapped file would count as resident
    memory.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _whole(path: Path, entry: dict[str, Any], rows: int) -> bool:
    if (
        not path.is_file()
        or entry.get("rows") != rows
        or not entry.get("shape")
        or path.stat().st_size != entry.get("bytes")
    ):
        return False
    return _measure(path)[1] == entry.get("sha256")


def _sweep(place: Path) -> None:
    """Removes what killed builds left half written. A shard takes seconds to write: an hour old
    means that its writer is gone.
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
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"mean": [], "std": []}
    for start in range(rows.start, rows.stop, batch_size):
        stop = min(start + batch_size, rows.stop)
        with torch.no_grad():
            mean, std = encode(images.batch(range(start, stop))["image"])
        if mean.ndim != 4 or mean.shape != std.shape or len(mean) != stop - start:
            got = f"{tuple(mean.shape)} and {tuple(std.shape)} for {stop - start} images"
            raise UserError(
                f"encode returned {got}: expected mean and std of one shape (B, C, h, w)"
            )
        for name, value in (("mean", mean), ("std", std)):
            bad = (~value.isfinite()).flatten(1).any(1)
            if bad.any():
                first = start + int(bad.nonzero()[0, 0])
                what = f"the {name} of the latent of image {first} is not finite"
                raise NumericalError(
                    f"stage encode: {what} (dtype {value.dtype}); its shard was not written"
                )
            parts[name].append(value.detach().to("cpu", torch.float32))
        if progress is not None:
            progress(stop, len(images))
    return {name: torch.cat(values) for name, values in parts.items()}
