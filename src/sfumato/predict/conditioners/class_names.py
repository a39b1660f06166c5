"""Class names as prompts: "ankle boot" -> a one-hot vector over the classes and one more row that stands for "no class".

The network multiplies it by its embedding table (a look-up), so mixtures of classes are weights that sum to 1. The last row is the
null condition of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError, unknown
from sfumato.types import Conditioning


def _key(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").replace("_", " ").split())


@dataclass(frozen=True)
class ClassNames:
    """names in the order of the labels; a name with "/" answers to each part ("t-shirt/top" to "t-shirt" and to "top")."""

    names: tuple[str, ...]

    def label(self, prompt: str | None) -> int:
        """The label of a prompt; the null row, `len(names)`, for None or an empty prompt; `UserError` with near matches otherwise."""
        if prompt is None or not prompt.strip():
            return len(self.names)
        table = {_key(part): i for i, name in enumerate(self.names) for part in (name, *name.split("/"))}
        key = _key(prompt)
        if key not in table and key.endswith("s"):
            key = key.removesuffix("s")
        if key not in table:
            raise unknown("class", prompt, self.names)
        return table[key]

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """Prompts -> Conditioning with `vector` (B, len(names) + 1)."""
        return self.from_labels(torch.tensor([self.label(p) for p in prompts]))

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels (B,) int64 -> Conditioning; -1 (no label) and `len(names)` are the null row."""
        rows = torch.where(labels < 0, len(self.names), labels)
        if len(rows) and int(rows.max()) > len(self.names):
            raise UserError(f"label {int(rows.max())}: expected 0 to {len(self.names) - 1}, or -1 for none")
        return Conditioning(vector=F.one_hot(rows, len(self.names) + 1).float())

    def null(self, count: int) -> Conditioning:
        """The unconditional row, `count` times."""
        return self.from_labels(torch.full((count,), -1))

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {"_class_name": "class_names", "names": list(self.names)}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "ClassNames":
        """The inverse of `to_config`."""
        return cls(tuple(values["names"]))
