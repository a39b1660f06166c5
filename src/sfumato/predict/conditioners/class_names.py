"""Class names as prompts: "ankle boot" -> a one-hot vector.

It has an entry for each class and one more for "no class". The network multiplies it by its
embedding table (a look-up), so that mixtures of classes are weights which sum to 1. The last row is
the null condition of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, section 3.2).
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError, unknown
from sfumato.predict.conditioners.base import ClassConditioner
from sfumato.types import Conditioning


def _key(text: str) -> str:
    """A name composed (NFC), without case, hyphens, underscores and repeated spaces."""
    text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().replace("-", " ").replace("_", " ").replace("/", " / ").split())


def _forms(key: str) -> Iterable[str]:
    """A name as it is, then in singular and plural.

    "boots" is "boot", "dresses" is "dress", "bag" may be "bags".
    """
    yield key
    yield from (key.removesuffix(end) for end in ("s", "es") if key.endswith(end))
    yield from (key + end for end in ("s", "es"))


@dataclass(frozen=True)
class ClassNames(ClassConditioner):
    """Classes with one name each.

    Attributes:
        names: In the order of the labels. Each part of a name with "/" is a name too: "t-shirt" and
            "top" of "t-shirt/top".
    """

    name = "class_names"

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if (
            not self.names
            or not all(isinstance(n, str) and n.strip() for n in self.names)
            or len(set(self.names)) < len(self.names)
        ):
            raise UserError(
                f"class names {list(self.names)!r}: "
                "expected at least one, all of them different texts that are not empty"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names, in the order of the labels."""
        return self.names

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`: one a class, and one for none."""
        return len(self.names) + 1

    @cached_property
    def _tables(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Labels by whole name, and by part of a name."""
        whole: dict[str, list[int]] = {}
        parts: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            whole.setdefault(_key(name), []).append(i)
            for part in {_key(part) for part in name.split("/")}:
                parts.setdefault(part, []).append(i)
        return whole, parts

    def label(self, prompt: str | None) -> int:
        """The label of a prompt; `len(names)` for None and an empty prompt.

        Raises:
            UserError: For an unknown name, with near matches, and for a name of several classes.
        """
        if prompt is None or not prompt.strip():
            return len(self.names)
        if prompt in self.names:
            return self.names.index(prompt)
        for form in _forms(_key(prompt)):
            for table in self._tables:
                labels = table.get(form, [])
                if len(labels) == 1:
                    return labels[0]
                if labels:
                    choices = " or ".join(repr(self.names[i]) for i in labels)
                    raise UserError(f"class {prompt!r} is ambiguous: write {choices}")
        raise unknown("class", prompt, self.names)

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels (B,) int64 -> `Conditioning` with `vector` (B, len(names) + 1), one-hot.

        -1 and `len(names)` are no class.

        Raises:
            UserError: For labels out of range.
        """
        rows = torch.where(labels < 0, len(self.names), labels)
        if len(rows) and int(rows.max()) > len(self.names):
            raise UserError(
                f"label {int(rows.max())}: expected 0 to {len(self.names) - 1}, or -1 for none"
            )
        return Conditioning(vector=F.one_hot(rows, len(self.names) + 1).float())

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {"_class_name": self.name, "names": list(self.names)}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "ClassNames":
        """The inverse of `to_config`; `UserError` for anything but a list of names."""
        return cls(read_names(values, "class names"))


def read_names(values: dict[str, Any], kind: str) -> tuple[str, ...]:
    """`names` of conditioner/config.json; `UserError` for anything but a list of texts."""
    names = values.get("names")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"names is {str(names)[:80]!r}: expected a list of {kind}")
    return tuple(names)
