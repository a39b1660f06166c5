"""Classes with several names each, or with numbers alone.

These are the labels of ImageNet's diffusers pipelines: DiT (Peebles & Xie 2022, arXiv:2212.09748).
A label is a text with commas, "tench, Tinca tinca": each of its parts, the whole of it and the
number of the class mean the class. As in model_index.json of a DiTPipeline (`id2label`), two
classes may have the same text: ImageNet has two cranes, a bird and a machine. Their class names
have their numbers: "crane (134)".
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError, unknown
from sfumato.predict.conditioners.base import ClassConditioner, class_number
from sfumato.predict.conditioners.class_names import ClassNames, read_names
from sfumato.types import Conditioning


def _loose(text: str) -> str:
    """A name without case and repeated spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@dataclass(frozen=True)
class ClassLabels(ClassConditioner):
    """Classes with labels.

    Attributes:
        labels: One text a class, in the order of the rows of the network's table, which has one
            more, for no class.
    """

    name = "class_labels"

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        texts = all(isinstance(label, str) and label.strip() for label in self.labels)
        if not self.labels or not texts:
            raise UserError(
                f"class labels {str(list(self.labels))[:80]}: "
                "expected at least one, texts that are not empty"
            )
        twice = [name for name, count in Counter(self.class_names).items() if count > 1]
        if twice:
            raise UserError(
                f"class labels: {twice[0][:80]!r} is a label, "
                "and another class's with its number: expected another text"
            )

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A name for each class: its label, with its number where another class has the same."""
        count = Counter(self.labels)
        return tuple(
            label if count[label] == 1 else f"{label} ({i})" for i, label in enumerate(self.labels)
        )

    @cached_property
    def _tables(self) -> tuple[dict[str, list[int]], ...]:
        """Labels by name, the strictest match first.

        Whole labels, parts of labels, and both but for case.
        """
        tables: tuple[dict[str, list[int]], ...] = ({}, {}, {}, {})
        for i, (name, label) in enumerate(zip(self.class_names, self.labels, strict=True)):
            whole, parts = {name, label}, {part.strip() for part in label.split(",")} - {""}
            keys = whole, parts, set(map(_loose, whole)), set(map(_loose, parts))
            for table, column in zip(tables, keys, strict=True):
                for key in column:
                    table.setdefault(key, []).append(i)
        return tables

    def label(self, prompt: str | None) -> int:
        """The number of a prompt's class; `len(labels)` for None and an empty prompt.

        Raises:
            UserError: For a number that is too large, for an unknown name, with near matches, and
                for a name of several classes.
        """
        if prompt is None or not prompt.strip():
            return len(self.labels)
        exact, loose = prompt.strip(), _loose(prompt)
        for table, key in zip(self._tables, (exact, exact, loose, loose), strict=True):
            numbers = table.get(key, [])
            if len(numbers) == 1:
                return numbers[0]
            if numbers:
                choices = " or ".join(f"{i} ({self.labels[i]})" for i in numbers[:8])
                raise UserError(f"class {prompt!r} is ambiguous: write its number, {choices}")
        number = class_number(prompt, len(self.labels))
        if number is None:
            names = {part.strip() for label in self.labels for part in label.split(",")}
            raise unknown("class", prompt, names)
        return number

    @cached_property
    def _one_hot(self) -> ClassNames:
        return ClassNames(self.class_names)

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`: one a class, and one for none."""
        return self._one_hot.vector_width

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Numbers (B,) int64 -> `Conditioning` with `vector` (B, len(labels) + 1), one-hot.

        -1 and `len(labels)` are no class.

        Raises:
            UserError: For numbers out of range.
        """
        return self._one_hot.from_labels(labels)

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {"_class_name": self.name, "names": list(self.labels)}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "ClassLabels":
        """The inverse of `to_config`; `UserError` for anything but a list of labels."""
        return cls(read_names(values, "class labels"))

    def to_id2label(self) -> dict[str, str]:
        """`id2label` of a DiTPipeline's model_index.json: {"0": label, ...}."""
        return {str(i): label for i, label in enumerate(self.labels)}

    @classmethod
    def from_id2label(cls, table: Any, count: int) -> "ClassLabels":
        """The inverse of `to_id2label`.

        Args:
            table: `id2label`; None where it is missing, as in folders that diffusers saved.
            count: Number of classes. A class without a label is called by its number.

        Raises:
            UserError: For anything but a table of numbers and labels.
        """
        if not isinstance(table, dict | None) or not all(
            isinstance(label, str) for label in (table or {}).values()
        ):
            raise UserError(
                f"id2label is {str(table)[:80]}: "
                "expected an object with the label of each class's number"
            )
        labels = list(map(str, range(count)))
        for key, label in (table or {}).items():
            if not re.fullmatch(r"[0-9]{1,9}", str(key)) or int(key) >= count:
                raise UserError(
                    f"id2label has {str(key)[:20]!r}: "
                    f"expected numbers of classes from 0 to {count - 1}"
                )
            labels[int(key)] = label
        return cls(tuple(labels))
