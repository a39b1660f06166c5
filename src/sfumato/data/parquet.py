"""Tables with a column of pictures: parquet files, folders saved by `datasets`, datasets of the
Hugging Face hub.

The columns are found by type and name: image (type Image, or file bytes), label (ClassLabel or
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
from sfumato.data.transform import Picture
from sfumato.errors import UserError, unknown

_IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
_LABELS = ("label", "labels", "class", "target", "fine_label")
MOST_CLASSES = 100_000
"""Integer labels above this are identifiers, not classes."""


@final
class Rows:
    """The pictures of a table, row by row: file bytes or a path, never decoded by `datasets`
    itself.
    """

    def __init__(self, data: Any, column: str):
        self.data, self.column = data, column

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int, /) -> Picture:
        value = self.data[index][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise UserError("the row has no picture")
        return value


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, or holds parquet files."""
    return (
        (folder / "state.json").is_file()
        or (folder / "dataset_dict.json").is_file()
        or any(folder.glob("*.parquet"))
    )


def list_parquet(path: Path, split: str, limit: int | None) -> Listing:
    """The rows of a parquet file. It is its own "train"; another split is the sibling whose name
    says so.
    """
    if split != "train":
        sibling = path.with_name(path.name.replace("train", split))
        if "train" not in path.name or not sibling.is_file():
            raise UserError(
                f"{path} has no {split!r} split beside it: expected a sibling file {sibling.name}, or split='train'"
            )
        path = sibling
    return _list(_read_parquet([path]), path.stem, str(path), limit)


def list_saved(folder: Path, split: str, limit: int | None) -> Listing:
    """The rows of a folder written by `datasets`: one dataset (all "train"), a dictionary of
    splits, or parquet files.
    """
    name = folder.resolve().name
    if parquet := sorted(folder.glob("*.parquet")):
        named = [p for p in parquet if split in p.stem]
        if not named and (
            split != "train" or any(s in p.stem for p in parquet for s in ("test", "validation"))
        ):
            raise UserError(
                f"{folder} has no parquet file for split {split!r} (found {', '.join(p.name for p in parquet[:5])})"
            )
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
    """The rows of a dataset of the Hugging Face hub, downloaded into its own cache when it is not
    there.
    """
    if not name:
        raise UserError("hf: names no dataset: give for example hf:zalando-datasets/fashion_mnist")
    return _list(
        _load(
            lambda datasets: datasets.load_dataset(name, split=split), f"hf:{name}, split {split!r}"
        ),
        name,
        f"hf:{name}",
        limit,
    )


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


def _load(read: Callable[[Any], Any], what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{what} needs the package datasets: run `pip install 'sfumato[train]'`"
        ) from error
    try:
        with _quiet(datasets):
            return read(datasets)
    except Exception as error:  # whatever its readers raise: missing, offline, truncated, not Arrow
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(
            f"{what} cannot be opened ({reason[0]}): check the name, the file and the connection"
        ) from error


def _list(data: Any, name: str, where: str, limit: int | None) -> Listing:
    import datasets

    features = data.features
    column = _image_column(features, datasets, where)
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    if len(data) == 0:
        raise UserError(f"{where} has no rows: choose another file or split")
    if isinstance(features[column], datasets.Image):
        # broken files are ours to report
        data = data.cast_column(column, datasets.Image(decode=False))
    labels, classes = _labels(data, features, datasets, where)
    texts = [
        c
        for c in CAPTIONS
        if c in features and getattr(features[c], "dtype", "") in ("string", "large_string")
    ]
    captions = [t or "" for t in data[texts[0]]] if texts else None
    rows = Rows(data.select_columns([column]), column)
    return Listing(name, rows, partial("row {1} of {0}".format, where), labels, classes, captions)


def _image_column(features: Any, datasets: Any, where: str) -> str:
    typed = [c for c in features if isinstance(features[c], datasets.Image)]
    named = [c for c in _IMAGES if c in features]
    if not typed and not named:
        raise UserError(
            f"{where} has no column of images (found {', '.join(features) or 'none'}): expected one named image"
        )
    return next((c for c in named if c in typed), typed[0] if typed else named[0])


def _labels(
    data: Any, features: Any, datasets: Any, where: str
) -> tuple[list[int] | None, tuple[str, ...]]:
    typed = [c for c in features if isinstance(features[c], datasets.ClassLabel)]
    whole = [
        c
        for c in _LABELS
        if c in features and str(getattr(features[c], "dtype", "")).startswith(("int", "uint"))
    ]
    words = [
        c
        for c in _LABELS
        if c in features and getattr(features[c], "dtype", "") in ("string", "large_string")
    ]
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
            f"column {column} of {where} reaches {max(labels)}: expected class numbers from 0 to at most {MOST_CLASSES}"
        )
    return labels, tuple(str(n) for n in range(max(labels) + 1))
