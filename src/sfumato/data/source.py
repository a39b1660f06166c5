"""The one way in: a name, a folder or a file -> `ImageSet`.

fashion-mnist | folder of IDX files | folder of pictures | file.parquet | folder saved by `datasets` | hf:NAME
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from sfumato.data import folder as folders
from sfumato.data import idx, table
from sfumato.data.images import ImageSet, build, from_array
from sfumato.data.transform import Transform
from sfumato.errors import UserError, unknown


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

    source    "fashion-mnist", a folder (IDX files; class subfolders or flat, with an optional metadata.csv or .jsonl of
              file_name and text; saved by `datasets`), a .parquet file, or "hf:NAME" for a Hugging Face dataset
    split     "train", "test", or another that the source has
    size, channels  see `Transform`; None keeps the data's own
    on_error  what a truncated or corrupt picture does: "raise" a `UserError` that names it, or "skip" it (listed in `.skipped`)
    limit     only the first so many pictures of the source
    flip      mirror half of the pictures of each batch

    Raises `UserError`, one sentence, for everything that is wrong with the source.
    """
    transform = Transform(size, channels, flip=flip)
    if on_error not in ("raise", "skip"):
        raise unknown("on_error", on_error, ["raise", "skip"])
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves no image: give at least 1, or None for all")
    try:
        return _open(source, split, limit, on_error, transform)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror or error}): check the path and its permissions") from error


def _open(source: str | Path, split: str, limit: int | None, on_error: Literal["raise", "skip"], transform: Transform) -> ImageSet:
    name = str(source)
    if name.startswith("hf:"):
        return build(table.list_hub(name.removeprefix("hf:"), split, limit), transform, on_error)
    if name == "fashion-mnist":
        return _open_idx(idx.fashion_mnist_folder(), split, name, limit, transform)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{name} does not exist: expected fashion-mnist, a folder of pictures, a .parquet file or hf:NAME")
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"{name} is a {path.suffix or 'plain'} file: expected a .parquet file, or the folder that holds the pictures")
        return build(table.list_parquet(path, split, limit), transform, on_error)
    if idx.has_idx(path):
        return _open_idx(path, split, path.resolve().name, limit, transform)
    if table.is_saved(path):
        return build(table.list_saved(path, split, limit), transform, on_error)
    return build(folders.list_folder(path, split, limit, on_error), transform, on_error)


def _open_idx(folder: Path, split: str, name: str, limit: int | None, transform: Transform) -> ImageSet:
    listing, pixels = idx.list_idx(folder, split, name)
    if limit is not None:
        pixels = pixels[:limit]
        listing = replace(listing, pictures=pixels, labels=None if listing.labels is None else listing.labels[:limit])
    if transform.size is None or pixels.shape[1:] == (transform.size, transform.size):
        return from_array(listing, pixels, transform)
    return build(listing, transform, "raise")
