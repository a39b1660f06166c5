"""Columns of a table: which one has the classes or the captions, and their values.

A column is recognised by its name (and, in tables of `datasets`, by its type). Where several
qualify, the setting `label_column` or `caption_column` decides.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import NoneType
from typing import Any

from sfumato.data.reading import NONE
from sfumato.errors import UserError, quoted, unknown

CAPTIONS = ("text", "caption", "captions", "prompt", "description", "sentences", "txt")
LABELS = ("label", "labels", "class", "class_name", "cls", "category", "target", "fine_label")
MOST_CLASSES = 100_000
"""Integer labels above this are identifiers, not classes."""
# leading zeros are a name's, as in 007
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?|nan", re.I)

Captions = tuple[str, ...]
"""All captions of one image, at least one; "" is none."""


def choose_column(
    kind: str, columns: Sequence[str], candidates: Sequence[str], name: str | None, source: str
) -> str | None:
    """Return the column of a kind: the one that is named, else the only candidate.

    Args:
        kind: "image", "label" or "caption".
        columns: All columns of the table.
        candidates: Those that look like the kind.
        name: Value of the setting; "none" for no column.
        source: Name of the table, for errors.

    Raises:
        UserError: For a name that is no column, and for several candidates.
    """
    if name == NONE:
        return None
    if name is not None:
        if name not in columns:
            raise unknown(f"{kind}_column of {source}", name, [*columns, NONE])
        return name
    if len(candidates) > 1:
        ignore = "" if kind == "image" else f", or {kind}_column={NONE} for no {kind}s"
        raise UserError(
            f"{source} has several columns that may hold {kind}s ({', '.join(candidates)}): "
            f"choose one, such as {kind}_column={candidates[0]}{ignore}"
        )
    return candidates[0] if candidates else None


def by_name(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Columns whose name, in lower case, is one of `names`."""
    return [c for c in columns if c.lower() in names]


def class_labels(
    values: Sequence[Any], column: str, source: str
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Class numbers and class names of a column's values.

    Names are sorted; numbers are sorted by value. None, NaN and "" mean no class. Floats are
    numbers of classes where all are whole, as pandas writes integers beside missing values.

    Returns:
        A label a value, -1 for no class, and the names; (None, ()) where no value is a class.

    Raises:
        UserError: For values that are no classes.
    """
    cleaned = [label_value(v) for v in values]
    kinds = {type(v) for v in cleaned if v is not None}
    if not kinds:
        return None, ()
    odd = next((v for v in cleaned if type(v) not in (NoneType, bool, int, str)), None)
    advice = f"expected names or class numbers; label_column={NONE} ignores it"
    if odd is not None:
        raise UserError(
            f"column {column} of {source} has values such as {quoted(str(odd))}: {advice}"
        )
    if len(kinds) > 1:
        names = " and ".join(sorted(k.__name__ for k in kinds))
        raise UserError(f"column {column} of {source} mixes values of {names}: {advice}")
    present = sorted({v for v in cleaned if v is not None})
    if kinds == {int} and (present[0] < -1 or present[-1] > MOST_CLASSES):
        reach = present[-1] if present[-1] > MOST_CLASSES else present[0]
        raise UserError(
            f"column {column} of {source} reaches {reach}: expected class numbers from 0 "
            f"to at most {MOST_CLASSES}; label_column={NONE} ignores it"
        )
    if kinds == {int}:  # -1 is how tables write "no class"
        present = [v for v in present if v != -1]
        cleaned = [None if v == -1 else v for v in cleaned]
    number = {v: i for i, v in enumerate(present)}
    return [-1 if v is None else number[v] for v in cleaned], tuple(
        str(v).lower() if isinstance(v, bool) else str(v) for v in present
    )


def label_value(value: Any) -> Any:
    """A label as None, bool, int or str where it is one, else as it is."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value.strip() or None
    return value


def text_numbers(texts: Sequence[Any]) -> Sequence[Any]:
    """The values of a column of text, as a .csv has: numbers where all that are not empty are."""
    present = [t for t in map(label_value, texts) if t is not None]
    if not all(isinstance(t, str) and _NUMBER.fullmatch(t) for t in present):
        return texts
    return [None if label_value(t) is None else float(t) for t in texts]


def caption_choices(
    values: Sequence[Any], column: str, place: Callable[[int], str]
) -> list[Captions]:
    """The captions of each image, from texts or lists of texts; "" where there is none.

    Args:
        values: A text or a list of texts each.
        column: Their name, for errors.
        place: Index -> name of the value's image or row, for errors.

    Raises:
        UserError: For values that are no texts.
    """
    return [_captions(value, column, partial(place, row)) for row, value in enumerate(values)]


def _captions(value: Any, column: str, place: Callable[[], str]) -> Captions:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ("",)
    texts = value if isinstance(value, list | tuple) else [value]
    odd = next((t for t in texts if t is not None and not isinstance(t, str)), None)
    if odd is not None:
        raise UserError(
            f"{place()} has the caption {quoted(str(odd))} of type "
            f"{type(odd).__name__} in column {column}: expected text or a list of texts; "
            f"caption_column={NONE} ignores it"
        )
    return unique(str(t) for t in texts if t)


def empty_note(labels: Sequence[int] | None, captions: Sequence[Captions] | None) -> str:
    """A line about images without class or caption, or with several captions; "" for none."""
    unlabelled = sum(label < 0 for label in labels or ())
    classless = (
        f"{unlabelled} of {len(labels)} images have no class" if labels and unlabelled else ""
    )
    if captions is None:
        return classless
    empty, several = (
        sum(c == ("",) for c in captions),
        sum(len(c) > 1 for c in captions),
    )
    parts = [classless, f"{empty} of {len(captions)} captions are empty" if empty else ""]
    parts.append(f"{several} images have several, of which each visit draws one" if several else "")
    return "; ".join(filter(None, parts))


def unique(texts: Iterable[str]) -> Captions:
    """The texts without repetitions and blank ones; ("",) for none."""
    return tuple(dict.fromkeys(t for t in texts if t.strip())) or ("",)
