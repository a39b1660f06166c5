"""The one way in: a name, a folder or a file -> `ImageSet`.

fashion-mnist | folder of IDX files | folder of pictures | file.parquet | folder saved by `datasets`
| hf:NAME
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from sfumato.data import idx, image_folder, parquet
from sfumato.data.images import ImageSet, Listing, build, from_array
from sfumato.data.transform import Transform
from sfumato.errors import UserError
from sfumato.validate import one_of, positive_int

T = TypeVar("T")


def open_images(
    source: str | Path,
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    flip: bool = False,
) -> ImageSet:
    """Opens pictures and verifies each by decoding it once.

    source    "fashion-mnist", a folder (IDX files; class subfolders or flat, with an optional
              metadata.csv or .jsonl of file_name and text; saved by `datasets`), a .parquet file,
              or "hf:NAME" for a Hugging Face dataset
    split     "train", "test", or another that the source has
    size, channels  see `Transform`; None keeps the data's own
    on_error  what a truncated or corrupt picture does: "raise" a `UserError` that names it, or
              "skip" it (listed in `.skipped`)
    limit     only the first so many pictures of the source
    flip      mirror half of the pictures of each batch

    Raises `UserError`, one sentence, for everything that is wrong with the source.
    """
    transform = Transform(size, channels, flip=flip)
    return open_with(
        lambda listing: opened(listing, transform, on_error),
        source,
        split=split,
        on_error=on_error,
        limit=limit,
    )


def opened(listing: Listing, transform: Transform, on_error: Literal["raise", "skip"]) -> ImageSet:
    """The pictures of a listing, verified; an array that needs no resizing is shared as it is."""
    if isinstance(listing.pictures, np.ndarray) and transform.sides in (
        None,
        listing.pictures.shape[1:],
    ):
        return from_array(listing, listing.pictures, transform)
    return build(listing, transform, on_error)


def open_with(
    make: Callable[[Listing], T],
    source: str | Path,
    *,
    split: str,
    on_error: Literal["raise", "skip"],
    limit: int | None,
) -> T:
    """What `make` makes of the pictures of a source, none of them decoded yet. Arguments and errors
    as in `open_images`.
    """
    one_of("on_error", on_error, ("raise", "skip"))
    if limit is not None:
        positive_int("limit", limit, unit="images", hint="None is all")
    try:
        return make(_list(source, split, on_error, limit))
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from error


def _list(
    source: str | Path, split: str, on_error: Literal["raise", "skip"], limit: int | None
) -> Listing:
    name = str(source)
    if name.startswith("hf:"):
        return parquet.list_hub(name.removeprefix("hf:"), split, limit)
    if name == "fashion-mnist":
        return _list_idx(idx.fashion_mnist_folder(), split, name, limit)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"{name} does not exist: expected fashion-mnist, a folder of pictures, a .parquet file or hf:NAME"
        )
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(
                f"{name} is a {path.suffix or 'plain'} file: expected a .parquet file, or the folder that holds the pictures"
            )
        return parquet.list_parquet(path, split, limit)
    if idx.has_idx(path):
        return _list_idx(path, split, path.resolve().name, limit)
    if parquet.is_saved(path):
        return parquet.list_saved(path, split, limit)
    return image_folder.list_folder(path, split, limit, on_error)


def _list_idx(folder: Path, split: str, name: str, limit: int | None) -> Listing:
    listing, pixels = idx.list_idx(folder, split, name)
    return replace(
        listing,
        pictures=pixels[:limit],
        labels=None if listing.labels is None else listing.labels[:limit],
    )
