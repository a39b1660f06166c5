"""Opening a source of images: a name, a folder or a file -> `ImageSet`.

fashion-mnist | folder of IDX files | folder of images | file.parquet | folder saved by `datasets` |
hf:NAME
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from sfumato.data import idx, image_folder, parquet
from sfumato.data.images import ImageSet, Listing, OnError, build, from_array
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
    on_error: OnError = "raise",
    limit: int | None = None,
    flip: bool = False,
) -> ImageSet:
    """Open images and verify each by decoding it once.

    Args:
        source: "fashion-mnist", a folder (IDX files; class subfolders or flat, with an optional
            metadata.csv or .jsonl of file_name and text; saved by `datasets`), a .parquet file, or
            "hf:NAME" for a Hugging Face dataset.
        split: "train", "test", or another that the source has.
        size: Side in pixels, see `Transform`; None keeps the data's own.
        channels: 1 or 3; None keeps the data's own.
        on_error: Treatment of truncated and corrupt images: "raise" a `UserError` that names the
            first, or "skip" them (listed in `.skipped`).
        limit: Only the first so many images of the source.
        flip: Mirror half of the images of each batch.

    Raises:
        UserError: For everything that is wrong with the source.
    """
    transform = Transform(size, channels, flip=flip)
    return open_with(
        lambda listing: image_set(listing, transform, on_error), source, split, on_error, limit
    )


def image_set(listing: Listing, transform: Transform, on_error: OnError) -> ImageSet:
    """The images of a listing, verified; an array that needs no resizing is shared."""
    images = listing.images
    if isinstance(images, np.ndarray) and transform.sides in (None, images.shape[1:]):
        return from_array(listing, images, transform)
    return build(listing, transform, on_error)


def open_with(
    make: Callable[[Listing], T],
    source: str | Path,
    split: str,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> T:
    """Return `make` of the listing of a source, none of whose images is decoded yet.

    The other arguments and the errors are those of `open_images`.
    """
    one_of("on_error", on_error, ("raise", "skip"))
    if limit is not None:
        positive_int("limit", limit, unit="images", hint="None is all")
    try:
        return make(_list(source, split, on_error, limit))
    except OSError as error:
        reason = f"{source} cannot be read ({error.strerror or error})"
        raise UserError(f"{reason}: check the path and its permissions") from error


def _list(source: str | Path, split: str, on_error: OnError, limit: int | None) -> Listing:
    name = str(source)
    if name.startswith("hf:"):
        return parquet.list_hub(name.removeprefix("hf:"), split, limit)
    if name == "fashion-mnist":
        return idx.list_idx(idx.fashion_mnist_folder(), split, name, limit)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"{name} does not exist: "
            "expected fashion-mnist, a folder of images, a .parquet file or hf:NAME"
        )
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(
                f"{name} is a {path.suffix or 'plain'} file: "
                "expected a .parquet file, or the folder that holds the images"
            )
        return parquet.list_parquet(path, split, limit)
    if idx.has_idx(path):
        return idx.list_idx(path, split, path.resolve().name, limit)
    if parquet.is_saved(path):
        return parquet.list_saved(path, split, limit)
    return image_folder.list_folder(path, split, limit, on_error)
