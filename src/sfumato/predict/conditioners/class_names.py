"""Class names as prompts: "ankle boot" -> a one-hot vector over the classes and one more row that
stands for "no class".

The network multiplies it by its embedding table (a look-up), so mixtures of classes are weights
that sum to 1. The last row is the null condition of classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598, section 3.2).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError, unknown
from sfumato.types import Conditioning, ImageSpec


def _key(text: str) -> str:
    """Case, hyphens, underscores and spaces do not tell names apart."""
    return " ".join(text.casefold().replace("-", " ").replace("_", " ").replace("/", " / ").split())


def _forms(key: str) -> Iterable[str]:
    """The words as they are, then one fewer or one more: "boots" is "boot", "dresses" is "dress",
    "bag" may stand for "bags".
    """
    yield key
    yield from (key.removesuffix(end) for end in ("s", "es") if key.endswith(end))
    yield from (key + end for end in ("s", "es"))


@dataclass(frozen=True)
class ClassNames:
    """names in the order of the labels; a name with "/" answers to each part ("t-shirt/top" to
    "t-shirt" and to "top").
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if (
            not self.names
            or not all(isinstance(n, str) and n.strip() for n in self.names)
            or len(set(self.names)) < len(self.names)
        ):
            raise UserError(
                f"class names {list(self.names)!r}: expected at least one, all of them different texts that are not empty"
            )

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
        """The label of a prompt; the null row, `len(names)`, for None or an empty prompt.

        `UserError` with near matches for an unknown name, and for one that stands for several
        classes.
        """
        if prompt is None or not prompt.strip():
            return len(self.names)
        if prompt in self.names:
            return self.names.index(prompt)
        for form in _forms(_key(prompt)):
            for table in self._tables:
                found = table.get(form, [])
                if len(found) == 1:
                    return found[0]
                if found:
                    choices = " or ".join(repr(self.names[i]) for i in found)
                    raise UserError(f"class {prompt!r} is ambiguous: write {choices}")
        raise unknown("class", prompt, self.names)

    def __call__(
        self, prompts: Sequence[str | None], picture: ImageSpec | None = None
    ) -> Conditioning:
        """Prompts -> Conditioning with `vector` (B, len(names) + 1). The picture makes no
        difference.
        """
        labels = {p: self.label(p) for p in set(prompts)}
        return Conditioning(
            vector=F.one_hot(
                torch.tensor([labels[p] for p in prompts]), len(self.names) + 1
            ).float()
        )

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels (B,) int64 -> Conditioning; -1 (no label) and `len(names)` are the null row."""
        rows = torch.where(labels < 0, len(self.names), labels)
        if len(rows) and int(rows.max()) > len(self.names):
            raise UserError(
                f"label {int(rows.max())}: expected 0 to {len(self.names) - 1}, or -1 for none"
            )
        return Conditioning(vector=F.one_hot(rows, len(self.names) + 1).float())

    def null(self, count: int, picture: ImageSpec | None = None) -> Conditioning:
        """The unconditional row, `count` times."""
        return self.from_labels(torch.full((count,), -1))

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {"_class_name": "class_names", "names": list(self.names)}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "ClassNames":
        """The inverse of `to_config`."""
        names = values.get("names")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise UserError(f"names is {names!r}: expected a list of class names")
        return cls(tuple(names))
