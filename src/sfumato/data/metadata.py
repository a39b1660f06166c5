"""Captions and classes of images, from metadata and from text files beside them.

metadata.csv, .jsonl or .parquet has a row a caption: file_name (relative to the metadata), and
columns of captions and of classes, as a table has them. IMAGE.txt or IMAGE.caption has a caption a
line.
"""

import csv
import io
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.data.columns import (
    CAPTIONS,
    LABELS,
    Captions,
    by_name,
    caption_choices,
    choose_column,
    class_labels,
    label_value,
    text_numbers,
    unique,
)
from sfumato.data.reading import NONE, SIDECAR, Reading, listed
from sfumato.data.scan import METADATA, SIDECARS, Tree
from sfumato.errors import UserError

_FILES = ("file_name", "filename", "file", "path", "image")
_EXPECTED = "expected rows with file_name, and text or label"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notes:
    """The words about a folder's images.

    Attributes:
        captions: All captions of each image; None: there are none.
        labels: Class of each image, -1 for none; None: metadata have no classes.
        class_names: Names of the classes.
        origin: The file or column of captions and classes, for the log.
        problems: Name of a file -> reason why it has no words, or why no image.
    """

    captions: dict[Path, Captions] | None = None
    labels: dict[Path, int] | None = None
    class_names: tuple[str, ...] = ()
    origin: str = ""
    problems: tuple[tuple[str, str], ...] = ()


def file_key(name: str) -> str:
    """A relative path as it is compared: with "/", without ".", in Unicode's composed form."""
    return composed(os.path.normpath(name.replace("\\", "/")))


def composed(name: str) -> str:
    """A name in Unicode's composed form: macOS decomposes names of files."""
    return unicodedata.normalize("NFC", name)


def read_notes(
    tree: Tree, reading: Reading, parent: Path | None = None, outside: bool = False
) -> Notes:
    """Read metadata and text files of a tree; text files that no image has are counted in it.

    Args:
        tree: The files.
        reading: Settings; `caption_column` decides between metadata and text files.
        parent: Folder above the tree whose metadata may name its images.
        outside: The parent is no part of the source: metadata that cannot be read, or are about
            other files, are logged there and are no error.

    Raises:
        UserError: For files that cannot be read, and where two readings are possible.
    """
    beside, stray = _sidecars(tree)
    paths = tree.metadata
    if not paths and parent is not None:
        paths = [parent / name for name in METADATA if (parent / name).is_file()]
    try:
        rows = _Rows.read(paths, tree, reading, beside)
    except UserError as error:
        if not outside or tree.metadata:
            raise
        logger.warning("%s is not read: %s", paths[0], error)
        rows = None
    ignored = reading.caption_column != SIDECAR and (
        reading.caption_column is not None or (rows is not None and rows.caption is not None)
    )
    reason = "captions not read" if ignored else ""
    for path in [*stray, *(p for files in beside.values() for p in files if ignored)]:
        tree.left_out[reason or path.suffix.lower()] += 1
    if rows is not None and rows.label is None and rows.caption is None:
        tree.left_out["metadata not read"] += len(tree.metadata if outside else paths)
    _require(reading, tree, rows is not None, bool(beside))
    notes = Notes() if rows is None else rows.notes(tree)
    if ignored or not beside:
        return notes
    return _with_sidecars(notes, tree, beside)


def _require(reading: Reading, tree: Tree, metadata: bool, sidecars: bool) -> None:
    """Raise `UserError` for a column that is named and cannot be there."""
    for kind in ("image", "label", "caption"):
        name = getattr(reading, f"{kind}_column")
        if name == SIDECAR and kind == "caption" and not sidecars:
            raise UserError(
                f"caption_column={SIDECAR}: no image of {tree.root} has a file such as "
                "IMAGE.txt beside it"
            )
        if name not in (None, NONE, SIDECAR) and not metadata:
            raise UserError(
                f"{kind}_column={name}: {tree.root} has no metadata.csv, .jsonl or .parquet "
                "with columns"
            )


def _sidecars(tree: Tree) -> tuple[dict[Path, list[Path]], list[Path]]:
    """The text files of each image that has one, and those of no image."""
    texts: dict[str, list[Path]] = {}
    for path in tree.sidecars:
        name = str(path.with_suffix(path.suffix.lower()))
        texts.setdefault(composed(name), []).append(path)
    beside: dict[Path, list[Path]] = {}
    for image in tree.images:
        names = [f"{stem}{end}" for end in SIDECARS for stem in (image.with_suffix(""), image)]
        keys = dict.fromkeys(map(composed, names))
        if files := [path for key in keys for path in texts.get(key, ())]:
            beside[image] = files
    used = {path for files in beside.values() for path in files}
    return beside, [path for path in tree.sidecars if path not in used]


def _with_sidecars(notes: Notes, tree: Tree, beside: Mapping[Path, Sequence[Path]]) -> Notes:
    captions: dict[Path, Captions] = {}
    endings: Counter[str] = Counter()
    several = 0
    for image, paths in beside.items():
        if len(paths) > 1:
            names = " and ".join(p.name for p in paths)
            raise UserError(f"{image} has two files of captions ({names}): keep one of them")
        lines = [line.strip() for line in _read_text(paths[0]).splitlines()]
        captions[image] = unique(lines)
        several += len(captions[image]) > 1
        endings[paths[0].suffix.lower()] += 1
    missing = [image for image in tree.images if image not in captions]
    reason = f"it has no file of captions, which {len(captions)} other images have"
    origin = f"captions from {listed(endings)} files"
    if several:
        origin += f" ({several} of them have a caption a line)"
    problems = (*notes.problems, *((str(image), reason) for image in missing))
    origin = "; ".join(filter(None, (notes.origin, origin)))
    return Notes(captions, notes.labels, notes.class_names, origin, problems)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): save it in this encoding") from error


@dataclass(frozen=True)
class _Rows:
    """The rows of metadata that name images of a tree."""

    paths: Sequence[Path]
    rows: Mapping[Path, Sequence[Mapping[str, Any]]]
    missing: Sequence[str]
    label: str | None
    caption: str | None

    @classmethod
    def read(
        cls,
        paths: Sequence[Path],
        tree: Tree,
        reading: Reading,
        beside: Mapping[Path, Sequence[Path]],
    ) -> "_Rows | None":
        """Read all metadata; None where there are none about these images."""
        if not paths:
            return None
        folders = Counter(path.parent for path in paths)
        if double := next((f for f, count in folders.items() if count > 1), None):
            names = " and ".join(p.name for p in paths if p.parent == double)
            raise UserError(f"{double} has {names}, two files of metadata: keep one of them")
        above = not paths[0].is_relative_to(tree.root)
        texts: list[dict[str, Any]] = []
        images = {file_key(p.relative_to(tree.root).as_posix()): p for p in tree.images}
        rows: dict[Path, list[Mapping[str, Any]]] = {}
        owner: dict[Path, Path] = {}
        missing: list[str] = []
        columns: dict[str, None] = {}
        for path in paths:
            table, names = _read_rows(path, reading)
            texts += table if path.suffix.lower() == ".csv" else []
            for row, name in zip(table, names, strict=True):
                place = path.parent / name.replace("\\", "/")
                key = file_key(os.path.relpath(place, tree.root))
                image = images.get(key)
                if image is None:
                    # rows of other folders are none of this one's
                    if not above or not key.startswith(".."):
                        missing.append(str(path.parent / name))
                    continue
                if owner.setdefault(image, path) != path:
                    both = f"{owner[image]} and {path}"
                    raise UserError(f"{image} has rows in {both}: keep those of one file")
                rows.setdefault(image, []).append(row)
            columns |= dict.fromkeys(c for row in table for c in row)
        if not rows and above:
            logger.warning("%s names no image of %s and is not read", paths[0], tree.root)
            return None
        source, names = _title(paths), list(columns)
        label = choose_column("label", names, by_name(names, LABELS), reading.label_column, source)
        if label is not None:
            values = text_numbers([row.get(label) for row in texts])
            for row, value in zip(texts, values, strict=True):
                row[label] = value
        word = reading.caption_column
        caption = None
        if word != SIDECAR:
            caption = choose_column("caption", names, by_name(names, CAPTIONS), word, source)
            if caption is not None and word is None and beside:
                raise UserError(
                    f"{source} and {len(beside)} text files beside the images have captions: "
                    f"choose caption_column={caption} or caption_column={SIDECAR}"
                )
        if label is None and caption is None and not beside and reading == Reading():
            raise UserError(
                f"{source} has neither captions nor classes (found {listed(names)}): "
                f"expected one of {', '.join(CAPTIONS)}, {', '.join(LABELS)}"
            )
        return cls(paths, rows, missing, label, caption)

    def notes(self, tree: Tree) -> Notes:
        """Captions and classes by image; none where no column has them."""
        if self.label is None and self.caption is None:
            return Notes()
        source = _title(self.paths)
        order = [image for image in tree.images if image in self.rows]
        problems = [(name, "metadata lists it but the file is missing") for name in self.missing]
        problems += [
            (str(image), "it has no row in metadata")
            for image in tree.images
            if image not in self.rows
        ]
        labels, classes, captions, origin = None, (), None, []
        if self.label is not None:
            values = [_one_label(image, self.label, self.rows[image]) for image in order]
            numbers, classes = class_labels(values, self.label, source)
            labels = None if numbers is None else dict(zip(order, numbers, strict=True))
            origin.append(f"classes from column {self.label} of {source}")
        if self.caption is not None:
            pairs = [(image, row.get(self.caption)) for image in order for row in self.rows[image]]
            values = [_texts(value) for _, value in pairs]
            choices = iter(caption_choices(values, self.caption, lambda k: str(pairs[k][0])))
            captions = {
                image: unique(text for _ in self.rows[image] for text in next(choices))
                for image in order
            }
            origin.append(f"captions from column {self.caption} of {source}")
        return Notes(captions, labels, classes, "; ".join(origin), tuple(problems))


def _title(paths: Sequence[Path]) -> str:
    more = len(paths) - 1
    return f"{paths[0]}{f' and {more} more' if more else ''}"


def _texts(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _one_label(image: Path, column: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    values = [v for row in rows if (v := label_value(row.get(column))) is not None]
    if any(value != values[0] for value in values):
        shown = " and ".join(repr(v) for v in dict.fromkeys(map(str, values)))
        raise UserError(f"{image} has rows of several classes, {shown}: expected one")
    return values[0] if values else None


def _read_rows(path: Path, reading: Reading) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a metadata file and the file name in each."""
    rows = _read_table(path)
    columns = list(dict.fromkeys(c for row in rows for c in row))
    names = by_name(columns, _FILES)
    # the common name, where others may be further columns
    column = reading.image_column
    if column is None and "file_name" in names:
        column = "file_name"
    column = choose_column("image", columns, names, column, str(path))
    if column is None:
        raise UserError(
            f"{path} has no column file_name (found {listed(columns) or 'nothing'}): {_EXPECTED}"
        )
    files: list[str] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str) or not row[column]:
            raise UserError(f"row {number} of {path} lacks {column}: {_EXPECTED}")
        files.append(row[column])
    return rows, files


def _read_table(path: Path) -> list[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    delimiter = _delimiter(text, path) if kind == ".csv" else ","
    try:
        if kind == ".csv":
            # not splitlines: a quoted caption may hold a line break
            rows: list[Any] = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
        else:
            rows = _json_lines(text)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): {_EXPECTED}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"row {number} of {path} is no object: {_EXPECTED}")
        if None in row:
            raise UserError(
                f"row {number} of {path} has more fields than its first line names: "
                f"write captions with {_DELIMITERS[delimiter]} in quotes, "
                f'"a cat{delimiter} asleep"'
            )
    return rows


_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _delimiter(text: str, path: Path) -> str:
    """Return the sign between a table's columns: a comma where its first line has one.

    Spreadsheets of some languages write semicolons.
    """
    header = text.lstrip("\ufeff\r\n").partition("\n")[0]
    signs = [sign for sign in _DELIMITERS if sign in header]
    if "," in signs and len(signs) > 1:
        columns = next(csv.reader([header]))
        signs = [","] if any(name.strip() == "file_name" for name in columns) else signs
    if len(signs) > 1:
        names = " and ".join(_DELIMITERS[sign] for sign in signs)
        raise UserError(
            f"the first line of {path} has {names} between the names of its columns: "
            "divide them by one kind, such as file_name,text"
        )
    return signs[0] if signs else ","


def _json_lines(text: str) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise UserError(
            f"{path} needs the package pyarrow: run `pip install 'sfumato[train]'`"
        ) from error
    try:
        return read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error
