"""Settings of reading a source, and the names of its splits.

A source is read by its layout: folders of splits and of classes, columns of a table. Each setting
here decides where two readings are possible.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from sfumato.data.images import Listing
from sfumato.validate import one_of

Layout = Literal["auto", "splits", "classes", "flat"]
LAYOUTS = ("auto", "splits", "classes", "flat")
NONE = "none"
"""Name of a column that is left out: no classes, or no captions."""
SIDECAR = "sidecar"
"""Name of the captions in text files beside the images, as a column."""
SHOWN = 12
"""Most reasons, names or columns that a line of the log lists."""

Splits = Mapping[str, Callable[[], Listing]]
"""Name of a split -> its listing."""

_SPLITS = {"train": "train", "training": "train"}
_SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_TOKEN = re.compile(rf"(?<![a-z])(?:{'|'.join(sorted(_SPLITS, reverse=True))})(?![a-z])", re.I)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Settings that decide how a source is read.

    Attributes:
        layout: Of a folder of images. "splits": subfolders such as train/ and test/ hold the
            splits. "classes": each subfolder is a class. "flat": subfolders mean nothing. "auto":
            the one of these that is possible.
        image_column: Column of the images in a table, of the file names in metadata.
        label_column: Column of the classes; "none": no classes.
        caption_column: Column of the captions; "sidecar": text files beside the images; "none": no
            captions.

    Raises:
        UserError: For an unknown layout.
    """

    layout: Layout = "auto"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)

    @property
    def values(self) -> dict[str, str]:
        """The settings that decide something."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "auto")}


def canonical_split(name: str) -> str:
    """The common name of a split: "val" and "Valid" are "validation"; others stay."""
    return _SPLITS.get(name.lower(), name)


def is_split(name: str) -> bool:
    """True for a name that splits have."""
    return name.lower() in _SPLITS


def splits_in(text: str) -> tuple[set[str], str]:
    """Splits that a file's name has as a word, and the name with "*" in their place.

    "pets-train-00000.parquet" is of "train"; "constrained.parquet" is of none.
    """
    names = {canonical_split(match) for match in _TOKEN.findall(text)}
    return names, _TOKEN.sub("*", text)


def listed(names: Mapping[str, int] | list[str]) -> str:
    """Names for a line of the log, the first or most frequent `SHOWN`, with their counts."""
    if isinstance(names, list):
        shown = names[:SHOWN]
    else:
        shown = [f"{name} {count}" for name, count in Counter(names).most_common(SHOWN)]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
