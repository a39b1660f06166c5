"""Opening a source of images: a name, a folder or a file -> `ImageSet`.

fashion-mnist | folder of IDX files | folder of images | file.parquet | folder of parquet files |
folder saved by `datasets` | hf:NAME
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from sfumato.data import idx, parquet
from sfumato.data.image_folder import folder_splits
from sfumato.data.images import ImageSet, Listing, OnError, build, from_array
from sfumato.data.pixel_cache import CACHE, PixelCache
from sfumato.data.reading import Reading, Splits, canonical_split, listed, splits_in
from sfumato.data.scan import ending, scan
from sfumato.data.transform import Transform
from sfumato.errors import UserError, unknown
from sfumato.io.paths import expand_user
from sfumato.validate import one_of, positive_int

T = TypeVar("T")

logger = logging.getLogger(__name__)


def open_images(
    source: str | Path,
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
    flip: bool = False,
    reading: Reading | None = None,
    cache: PixelCache | None = CACHE,
) -> ImageSet:
    """Open images and verify each by decoding it once.

    Files that are no images, and the reading of classes and captions, are logged in a line each.

    Args:
        source: "fashion-mnist", a folder (IDX files; class subfolders or flat, with optional
            metadata.csv, .jsonl or .parquet of file_name and text, or IMAGE.txt beside an image;
            parquet files; saved by `datasets`), a .parquet file, or "hf:NAME" for a Hugging Face
            dataset.
        split: "train", "test", "validation", or another that the source has.
        size: Side in pixels, see `Transform`; None keeps the data's own.
        channels: 1 or 3; None keeps the data's own.
        on_error: Treatment of truncated and corrupt images: "raise" a `UserError` that names the
            first, or "skip" them (listed in `.skipped`).
        limit: Only so many images of the source, chosen at random and always the same, from each
            class its share.
        flip: Mirror half of the images of each batch.
        reading: Decides where a source can be read in two ways.
        cache: Keeps resized pixels on disk where they are too many for memory, or their originals
            are large; None: nowhere.

    Raises:
        UserError: For everything that is wrong with the source.
    """
    transform = Transform(size, channels, flip=flip)
    return open_with(
        lambda listing: image_set(listing, transform, on_error, cache),
        source, split, on_error, limit, reading,
    )  # fmt: skip


def image_set(
    listing: Listing, transform: Transform, on_error: OnError, cache: PixelCache | None = None
) -> ImageSet:
    """The images of a listing, verified; an array that needs no resizing is shared."""
    images = listing.images
    if isinstance(images, np.ndarray) and transform.sides in (None, images.shape[1:]):
        return from_array(listing, images, transform)
    return build(listing, transform, on_error, cache)


def open_with(
    make: Callable[[Listing], T],
    source: str | Path,
    split: str,
    on_error: OnError = "raise",
    limit: int | None = None,
    reading: Reading | None = None,
) -> T:
    """Return `make` of the listing of a source, none of whose images is decoded yet.

    The other arguments and the errors are those of `open_images`.
    """
    with readable(source):
        splits = splits_of(source, on_error, reading, split)
        return make(listing_of(splits, split, source).spread(check_limit(limit)))


def check_limit(limit: int | None) -> int | None:
    """Return a number of images, at least 1, or None for all."""
    if limit is not None:
        positive_int("limit", limit, unit="images", hint="None is all")
    return limit


@contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """Turn errors of the system about a source into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or source} cannot be read ({error.strerror or error})"
        raise UserError(f"{reason}: check the path and its permissions") from error


def listing_of(splits: Splits, split: str, source: str | Path) -> Listing:
    """The listing of a split, by its own name or the common one ("val" for "validation").

    Raises:
        UserError: For a split that the source lacks, and a listing that cannot be read.
    """
    name = split if split in splits else canonical_split(split)
    if name not in splits:
        hint = ""
        if str(source).lower().endswith(".parquet"):
            path = Path(source)
            words, pattern = splits_in(path.stem)
            pattern = f"{pattern}{path.suffix}" if words else f"{path.stem}-*{path.suffix}"
            train, other = (pattern.replace("*", word) for word in ("train", split))
            hint = f"; name the files {train} and {other}, and open the first"
            if words == {"train"}:
                hint = f"; a file beside it that is named as the split is one ({other})"
        raise UserError(f"{unknown(f'split of {source}', split, splits)}{hint}")
    listing = splits[name]()
    _report_alike(listing)
    return listing


def _report_alike(listing: Listing) -> None:
    """Log the classes whose names differ by capitals, blanks or underscores alone."""
    groups: dict[str, list[str]] = {}
    for name in listing.class_names:
        groups.setdefault(re.sub(r"[\s_-]+", "", name.casefold()), []).append(name)
    if alike := [" and ".join(map(repr, names)) for names in groups.values() if len(names) > 1]:
        logger.warning(
            "classes of %s whose names are almost the same stay apart: %s",
            listing.name, listed(alike),
        )  # fmt: skip


def splits_of(
    source: str | Path, on_error: OnError, reading: Reading | None, split: str | None = None
) -> Splits:
    """The splits of a source; nothing is decoded.

    Args:
        source: See `open_images`.
        on_error: See `open_images`.
        reading: See `open_images`.
        split: The one that will be opened; of the Hub's datasets it may be a part.

    Raises:
        UserError: For everything that is wrong with the source.
    """
    one_of("on_error", on_error, ("raise", "skip"))
    name, reading = str(source), reading or Reading()
    if name.startswith("hf:"):
        part = split if split and "[" in split else None
        return parquet.hub_splits(name.removeprefix("hf:"), reading, part)
    if name == "fashion-mnist":
        return _idx_splits(idx.fashion_mnist_folder(), name)
    path = expand_user(source)
    if not path.exists():
        raise UserError(
            f"{name} does not exist: "
            "expected fashion-mnist, a folder of images, a .parquet file or hf:NAME"
        )
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UserError(
                f"{name} is a {path.suffix or 'plain'} file: "
                "expected a .parquet file, or the folder that holds the images"
            )
        return parquet.parquet_splits(path, reading)
    if idx.splits_of_idx(path):
        others = scan(path)
        others.left_out.subtract(ending(file) for file in idx.idx_files(path))
        others.leave_out("beside the IDX files", tables=True)
        others.report()
        return _idx_splits(path, path.resolve().name)
    if parquet.is_saved(path):
        return parquet.saved_splits(path, reading)
    tree = scan(path)
    direct = [p for p in tree.tables if p.parent == path]
    if direct and len(direct) < len(tree.tables):
        tree.left_out["tables in subfolders"] += len(tree.tables) - len(direct)
    if tree.tables and tree.images and not direct:
        raise UserError(
            f"{name} has {len(tree.tables)} parquet files ({tree.tables[0].name} ...) and "
            f"{len(tree.images)} image files: open a .parquet file, or the subfolder with the "
            "files that you mean"
        )
    if tree.tables:
        tree.leave_out("beside the tables")
        tree.report()
        return parquet.table_splits(path, direct or tree.tables, reading)
    return folder_splits(tree, on_error, reading)


def _idx_splits(folder: Path, name: str) -> Splits:
    return {
        split: partial(idx.list_idx, folder, split, name) for split in idx.splits_of_idx(folder)
    }
