"""Tables of images: parquet files, folders saved by `datasets`, datasets of the Hub.

The columns are recognised by type and name: image (type Image, or file bytes), label (ClassLabel or
integer), caption (string). Rows stay in memory-mapped Arrow files; `datasets` is imported only when
such a source is opened.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

from sfumato.data.image_folder import CAPTIONS
from sfumato.data.images import Listing
from sfumato.data.transform import RawImage
from sfumato.errors import UserError, unknown

_IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
_LABELS = ("label", "labels", "class", "target", "fine_label")
MOST_CLASSES = 100_000
"""Integer labels above this are identifiers, not classes."""


@final
class Rows:
    """The images of a table: bytes of files or paths, never decoded by `datasets` itself."""

    def __init__(self, data: Any, column: str):
        self.data, self.column = data, column

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int, /) -> RawImage:
        value = self.data[index][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise UserError("the row has no image")
        return value


def is_saved(folder: Path) -> bool:
    """True for a folder that was written by `save_to_disk`, or holds parquet files."""
    files = (folder / "state.json", folder / "dataset_dict.json")
    return any(file.is_file() for file in files) or any(folder.glob("*.parquet"))


def list_parquet(path: Path, split: str, limit: int | None) -> Listing:
    """List the rows of a parquet file.

    The file is its own "train"; another split is the sibling whose name has "train" replaced by it.

    Raises:
        UserError: For a split without a file, and a file that cannot be read.
    """
    if split != "train":
        sibling = path.with_name(path.name.replace("train", split))
        if "train" not in path.name or not sibling.is_file():
            raise UserError(
                f"{path} has no {split!r} split beside it: "
                f"expected a sibling file {sibling.name}, or split='train'"
            )
        path = sibling
    return _list(_read_parquet([path]), path.stem, str(path), limit)


def list_saved(folder: Path, split: str, limit: int | None) -> Listing:
    """List the rows of a folder written by `datasets`.

    It holds one dataset (all "train"), a dictionary of splits, or parquet files.

    Raises:
        UserError: For an unknown split, and files that cannot be read.
    """
    name = folder.resolve().name
    if parquet := sorted(folder.glob("*.parquet")):
        named = [p for p in parquet if split in p.stem]
        others = any(s in p.stem for p in parquet for s in ("test", "validation"))
        if not named and (split != "train" or others):
            files = ", ".join(p.name for p in parquet[:5])
            raise UserError(f"{folder} has no parquet file for split {split!r} (found {files})")
        return _list(_read_parquet(named or parquet), name, str(folder), limit)
    from datasets import DatasetDict

    data = _load(lambda datasets: datasets.load_from_disk(str(folder)), str(folder))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise unknown(f"split of {folder}", split, map(str, data))
        data = data[split]
    elif split != "train":
        raise unknown(f"split of {folder}", split, ["train"])
    return _list(data, name, str(folder), limit)


def list_hub(name: str, split: str, limit: int | None) -> Listing:
    """List the rows of a dataset of the Hugging Face Hub, downloaded into its own cache.

    Raises:
        UserError: For a dataset that cannot be opened.
    """
    if not name:
        raise UserError("hf: names no dataset: give for example hf:zalando-datasets/fashion_mnist")
    title = f"hf:{name}, split {split!r}"
    data = _load(lambda datasets: datasets.load_dataset(name, split=split), title)
    return _list(data, name, f"hf:{name}", limit)


def _read_parquet(paths: list[Path]) -> Any:
    files = {"train": [str(p) for p in paths]}
    return _load(
        lambda datasets: datasets.load_dataset("parquet", data_files=files, split="train"),
        str(paths[0]),
    )


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars of `datasets` from inside a library call."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _load(read: Callable[[Any], Any], title: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{title} needs the package datasets: run `pip install 'sfumato[train]'`"
        ) from error
    try:
        with _quiet(datasets):
            return read(datasets)
    except Exception as error:  # whatever its readers raise: missing, offline, truncated, not Arrow
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        advice = "check the name, the file and the connection"
        raise UserError(f"{title} cannot be opened ({reason[0]}): {advice}") from error


def _list(data: Any, name: str, source: str, limit: int | None) -> Listing:
    import datasets

    features = data.features
    column = _image_column(features, datasets, source)
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    if len(data) == 0:
        raise UserError(f"{source} has no rows: choose another file or split")
    if isinstance(features[column], datasets.Image):
        # broken files are ours to report
        data = data.cast_column(column, datasets.Image(decode=False))
    labels, classes = _labels(data, features, datasets, source)
    text = next((c for c in CAPTIONS if _has_dtype(features, c, "string", "large_string")), None)
    captions = [t or "" for t in data[text]] if text else None
    rows = Rows(data.select_columns([column]), column)
    return Listing(name, rows, partial("row {1} of {0}".format, source), labels, classes, captions)


def _has_dtype(features: Any, column: str, *dtypes: str) -> bool:
    """True for a column whose dtype, without its number of bits, is one of these."""
    dtype = str(getattr(features[column], "dtype", "")) if column in features else ""
    return dtype.rstrip("0123456789") in dtypes


def _image_column(features: Any, datasets: Any, source: str) -> str:
    typed = [c for c in features if isinstance(features[c], datasets.Image)]
    named = [c for c in _IMAGES if c in features]
    if not typed and not named:
        columns = ", ".join(features) or "none"
        raise UserError(
            f"{source} has no column of images (found {columns}): expected one named image"
        )
    return next((c for c in named if c in typed), typed[0] if typed else named[0])


def _labels(
    data: Any, features: Any, datasets: Any, source: str
) -> tuple[list[int] | None, tuple[str, ...]]:
    typed = [c for c in features if isinstance(features[c], datasets.ClassLabel)]
    whole = [c for c in _LABELS if _has_dtype(features, c, "int", "uint")]
    words = [c for c in _LABELS if _has_dtype(features, c, "string", "large_string")]
    column = next((c for c in _LABELS if c in typed), next(iter([*typed, *whole, *words]), None))
    if column is None:
        return None, ()
    values = list(data[column])
    if column in words:
        names = sorted({v for v in values if v is not None})
        return [-1 if v is None else names.index(v) for v in values], tuple(names)
    labels = [-1 if v is None else int(v) for v in values]
    if column in typed:
        return labels, tuple(features[column].names)
    if max(labels) > MOST_CLASSES:
        raise UserError(
            f"column {column} of {source} reaches {max(labels)}: "
            f"expected class numbers from 0 to at most {MOST_CLASSES}"
        )
    return labels, tuple(str(n) for n in range(max(labels) + 1))
