"""No conditioning: an unconditional model. Any prompt but None or "" is refused, because it would
be ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError
from sfumato.types import Conditioning, ImageSpec


@dataclass(frozen=True)
class Nothing:
    """The conditioner of unconditional models; it has no names."""

    names: tuple[str, ...] = ()

    def __call__(
        self, prompts: Sequence[str | None], picture: ImageSpec | None = None
    ) -> Conditioning:
        """An empty Conditioning; `UserError` if a prompt says something. The picture makes no
        difference.
        """
        for prompt in prompts:
            if prompt is not None and prompt.strip():
                raise UserError(
                    f"prompt {prompt!r}: this model is unconditional, it takes no prompt; leave it empty"
                )
        return Conditioning()

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels are not used."""
        return Conditioning()

    def null(self, count: int, picture: ImageSpec | None = None) -> Conditioning:
        """An empty Conditioning."""
        return Conditioning()

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {"_class_name": "nothing"}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "Nothing":
        """The inverse of `to_config`."""
        return cls()
