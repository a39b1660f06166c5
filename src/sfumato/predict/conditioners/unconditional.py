"""The conditioner of unconditional models.

Any prompt but None or an empty one is refused, because it would be ignored.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners.base import ClassConditioner
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Unconditional(ClassConditioner):
    """No classes: an empty `Conditioning` for every row."""

    name = "unconditional"

    @property
    def is_conditional(self) -> bool:
        """False."""
        return False

    def label(self, prompt: str | None) -> int:
        """-1 for None and an empty prompt; `UserError` for any other."""
        if prompt is not None and prompt.strip():
            raise UserError(
                f"prompt {prompt!r}: this model is unconditional; leave the prompt empty"
            )
        return -1

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """An empty `Conditioning`, whatever the labels."""
        return Conditioning()

    def identity(self) -> dict[str, Any]:
        """JSON for hashing, with the name of earlier versions, so that a model keeps its hash."""
        return {"_class_name": "nothing"}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "Unconditional":
        """The inverse of `to_config`."""
        return cls()
