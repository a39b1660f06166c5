"""Tables of images: parquet files, folders saved by `datasets`, datasets of the Hub.

The columns are recognised by type and name: image (type Image, or file bytes), label (ClassLabel,
integers or names), caption (text, or a list of texts). Rows stay in memory-mapped Arrow files;
`datasets` is imported only when such a source is opened.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

from sfumato.data.columns import (
    CAPTIONS,
    LABELS,
    by_name,
    caption_choices,
    choose_column,
    class_labels,
    empty_note,
)
from sfumato.data.images import Listing
from sfumato.data.reading import SIDECAR, Reading, Splits, canonical_split, listed, splits_in
from sfumato.data.transform import RawImage
from sfumato.errors import UserError, quoted
from sfumato.io.atomic import hash_json

logger = logging.getLogger(__name__)

_IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
_SHARD = re.compile(r"[-_.]?(\d+)-of-(\d+)", re.I)


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
        if not isinstance(value, bytes | str):
            kind = f"a list of {len(value)}" if isinstance(value, list) else f"{value!r:.40}"
            raise UserError(
                f"column {self.column} holds {kind}: expected the bytes of one image file, or its "
                "path; another column is chosen by image_column"
            )
        if isinstance(value, str) and not Path(value).is_file():
            raise UserError(
                f"column {self.column} holds {quoted(value)}, no file here: expected the bytes of "
                "an image file, or its path; addresses are not downloaded"
            )
        return value


def is_saved(folder: Path) -> bool:
    """True for a folder that was written by `save_to_disk`."""
    whole = ("state.json", "dataset_info.json"), ("dataset_dict.json",)
    return any(all((folder / name).is_file() for name in names) for names in whole)


def parquet_splits(path: Path, reading: Reading) -> Splits:
    """The splits of a parquet file: itself, and siblings that are named as other splits.

    "pets-train.parquet" has the sibling "pets-test.parquet".

    Raises:
        UserError: For a listing that cannot be read.
    """
    own, pattern = splits_in(_SHARD.sub("", path.stem))
    if match := _SHARD.search(path.stem):
        logger.warning(
            "%s is shard %s of %s: it is read alone; open its folder for all of them",
            path,
            *match.groups(),
        )
    paths = {"train": [path]}
    if own == {"train"}:
        for other in sorted(path.parent.glob("*.parquet")):
            names, alike = splits_in(_SHARD.sub("", other.stem))
            if other != path and alike == pattern and len(names) == 1:
                paths.setdefault(names.pop(), []).append(other)
        paths["train"] = [path]
    return _splits_of_files(paths, path.stem, {s: str(p[0]) for s, p in paths.items()}, reading)


def table_splits(folder: Path, files: Sequence[Path], reading: Reading) -> Splits:
    """The splits of a folder of parquet files, by words in the files' names and folders.

    Raises:
        UserError: For files of which some have no split, and missing shards.
    """
    paths: dict[str, list[Path]] = {}
    bare: list[Path] = []
    for path in files:
        parts = path.relative_to(folder).with_suffix("").parts
        names = next((n for part in reversed(parts) if (n := splits_in(part)[0])), set())
        if len(names) > 1:
            words = " and ".join(sorted(names))
            raise UserError(f"{path} is named as the splits {words}: rename it to one of them")
        for name in names:
            paths.setdefault(name, []).append(path)
        if not names:
            bare.append(path)
    if bare and paths:
        others = listed([p.name for p in bare])
        raise UserError(
            f"{folder} has files of the splits {' and '.join(sorted(paths))}, and {others}, which "
            "name no split: move these away, rename them, or open one file"
        )
    paths = paths or {"train": bare}
    for split, shards in paths.items():
        _check_shards(split, shards)
    logger.info("splits of %s, by its files: %s", folder, _file_counts(paths))
    titles = dict.fromkeys(paths, str(folder))
    return _splits_of_files(paths, folder.resolve().name, titles, reading)


def _file_counts(paths: Mapping[str, Sequence[Path]]) -> str:
    return ", ".join(
        f"{split} {len(files)} file{'s' if len(files) > 1 else ''}"
        for split, files in paths.items()
    )


def _check_shards(split: str, paths: Sequence[Path]) -> None:
    """Raise `UserError` where shards "i-of-n" of a split are missing."""
    series: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := _SHARD.search(path.stem):
            name = _SHARD.sub("", path.stem)
            series.setdefault((path.parent, name, int(match[2])), set()).add(int(match[1]))
    for (folder, _, count), numbers in series.items():
        first = min(numbers, default=0) if len(numbers) == count else 0
        if missing := sorted({*range(first, first + count)} - numbers):
            raise UserError(
                f"{folder} has {len(numbers)} of {count} shards of {split}: number "
                f"{missing[0]} is missing; download it, or open the files that you mean one by one"
            )


def _splits_of_files(
    paths: Mapping[str, Sequence[Path]], name: str, titles: Mapping[str, str], reading: Reading
) -> Splits:
    def make(split: str) -> Listing:
        data, identity = _read_parquet(paths[split])
        return _list(data, name, titles[split], reading, identity)

    return {split: partial(make, split) for split in paths}


def saved_splits(folder: Path, reading: Reading) -> Splits:
    """The splits of a folder written by `save_to_disk`: one dataset or a dictionary.

    Raises:
        UserError: For files that cannot be read.
    """
    data = _load(lambda datasets: datasets.load_from_disk(str(folder)), str(folder))
    return _splits_of(data, folder.resolve().name, str(folder), reading)


def hub_splits(name: str, reading: Reading, split: str | None = None) -> Splits:
    """The splits of a dataset of the Hugging Face Hub, downloaded into its own cache.

    Args:
        name: Of the dataset.
        reading: Settings.
        split: A part of a split as `datasets` writes it ("train[:10%]"); None: all splits.

    Raises:
        UserError: For a dataset that cannot be opened.
    """
    if not name:
        raise UserError("hf: names no dataset: give for example hf:zalando-datasets/fashion_mnist")
    title = f"hf:{name}"
    data = _load(lambda datasets: datasets.load_dataset(name, split=split), title)
    return _splits_of({split: data} if split else data, name, title, reading)


def _splits_of(data: Any, name: str, title: str, reading: Reading) -> Splits:
    if not isinstance(data, dict):  # DatasetDict is one
        data = {"train": data}
    common = Counter(canonical_split(str(split)) for split in data)
    # "val" beside "validation": each keeps its own name
    names = {s: c if common[c := canonical_split(str(s))] == 1 else str(s) for s in data}
    return {names[s]: partial(_list, part, name, title, reading) for s, part in data.items()}


def _read_parquet(paths: Sequence[Path]) -> tuple[Any, str]:
    """The rows of files with equal columns, and a hash of the files.

    The Arrow copy that `datasets` makes is kept by the files' content: by its own key of size and
    time, a file that was replaced would not be seen.
    """
    title = str(paths[0])
    paths = _load(lambda datasets: _same_columns(paths), title)
    hashes: list[str] = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    identity = hash_json(hashes)

    def read(datasets: Any) -> Any:
        return datasets.load_dataset(
            "parquet",
            data_files={"train": [str(p) for p in paths]},
            split="train",
            cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "sfumato" / identity[:16]),
        )

    return _load(read, title), identity


def _same_columns(paths: Sequence[Path]) -> Sequence[Path]:
    """The files that have rows, after a check that their columns agree."""
    if len(paths) == 1:
        return paths
    from pyarrow.parquet import ParquetFile

    full: list[Path] = []
    first: tuple[Path, Any] | None = None
    for path in paths:
        with ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        if not rows:
            continue
        full.append(path)
        columns = {f.name: str(f.type).replace("large_", "") for f in schema}
        note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = {k: json.dumps(v) for k, v in note.get("info", {}).get("features", {}).items()}
        columns = {name: features.get(name, kind) for name, kind in columns.items()}
        if first is None:
            first = path, columns
        elif columns != first[1]:
            odd = sorted({k for k, _ in columns.items() ^ first[1].items()})
            raise UserError(
                f"{first[0].name} and {path.name} differ in the columns {listed(odd)}: "
                "files of one split have the same; open one of them"
            )
    if empty := len(paths) - len(full):
        logger.warning("left out %d files of %s: no rows %d", empty, paths[0].parent, empty)
    return full or paths


@contextmanager
def quiet(datasets: Any) -> Iterator[None]:
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
        with quiet(datasets):
            return read(datasets)
    except UserError:
        raise
    except Exception as error:  # whatever its readers raise: missing, offline, truncated, not Arrow
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        advice = "check the name, the file and the connection"
        raise UserError(f"{title} cannot be opened ({reason[0]}): {advice}") from error


def _list(data: Any, name: str, source: str, reading: Reading, identity: str = "") -> Listing:
    import datasets

    features = data.features
    column = _image_column(features, datasets, source, reading)
    if len(data) == 0:
        raise UserError(f"{source} has no rows: choose another file or split")
    if isinstance(features[column], datasets.Image):
        # broken files are ours to report
        data = data.cast_column(column, datasets.Image(decode=False))
    others = [c for c in features if c != column]
    typed = [c for c in others if isinstance(features[c], datasets.ClassLabel)]
    candidates = [*typed, *(c for c in by_name(others, LABELS) if c not in typed)]
    label = choose_column("label", others, candidates, reading.label_column, source)
    text = reading.caption_column
    if text == SIDECAR:
        raise UserError(f"caption_column={SIDECAR}: {source} is a table; name one of its columns")
    text = choose_column("caption", others, by_name(others, CAPTIONS), text, source)
    labels, classes = None, ()
    if label is not None and label in typed:
        labels = [-1 if v is None else int(v) for v in data[label]]
        classes = tuple(features[label].names)
    elif label is not None:
        labels, classes = class_labels(list(data[label]), label, source)
    row_name = partial("row {1} of {0}".format, source)
    captions = None if text is None else caption_choices(list(data[text]), text, row_name)
    rest = [c for c in others if c not in (label, text)]
    words = empty_note(labels, captions)
    logger.info(
        "%s: %d rows; images from column %s; %s; %s%s",
        source,
        len(data),
        column,
        f"{len(classes)} classes from column {label}" if label else "no classes",
        f"captions from column {text}" if text else "no captions",
        "".join(f"; {note}" for note in (rest and f"not read: {listed(rest)}", words) if note),
    )
    rows = Rows(data.select_columns([column]), column)
    return Listing(name, rows, row_name, labels, classes, captions, identity=identity)


def _image_column(features: Any, datasets: Any, source: str, reading: Reading) -> str:
    typed = [c for c in features if isinstance(features[c], datasets.Image)]
    candidates = typed or by_name(features, _IMAGES)
    name = reading.image_column
    if name is None and "image" in candidates:
        name = "image"  # beside a mask, a depth map ...
    column = choose_column("image", [*features], candidates, name, source)
    if column is None:
        raise UserError(
            f"{source} has no column of images (found {', '.join(features) or 'none'}): "
            "expected one named image, or image_column"
        )
    return column
