"""Encoder: a network with its tokenizer, read from and written to two folders of a model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.text_encoders._transformers import (
    check_length,
    last_states,
    on_device,
    read_optional_json,
    tokenizer_hash,
    write_network,
)

__all__ = ["Encoder", "SequenceEncoder", "read_optional_json", "require_transformers"]


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder: `encode` of each subclass turns one text into hidden states in float32.

    Attributes:
        CONFIG_FIELDS: Fields of the network's config that change states, and that the shapes of the
            weights do not all show.
        tokenizer: A tokenizer of transformers.
        model: The network, an `nn.Module` with `config` and `device`.
    """

    CONFIG_FIELDS: ClassVar[tuple[str, ...]] = ()

    tokenizer: Any
    model: Any

    @property
    def class_name(self) -> str:
        """The network's class in model_index.json and config.json."""
        return type(self.model).__name__

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.model.config.hidden_size

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the names that files have; not copies."""
        return self.model.state_dict()

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the states, for hashing."""
        config = {field: getattr(self.model.config, field) for field in self.CONFIG_FIELDS}
        return {"config": config, "tokenizer": tokenizer_hash(self.tokenizer)}

    def to(self, device: str | torch.device) -> Self:
        """The same encoder on a device; tensors that are there already are shared.

        Raises:
            UserError: For a device that cannot be used.
        """
        return replace(self, model=on_device(self.model, device))

    # ---- folders ---------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, as transformers writes it."""
        return {**self.model.config.to_dict(), "architectures": [self.class_name]}

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)

    def save(self, tokenizer: Path, encoder: Path, dtype: torch.dtype | None = None) -> None:
        """Write both folders.

        Args:
            tokenizer: The tokenizer's folder.
            encoder: The network's folder.
            dtype: Of the stored weights; None keeps their own.

        Raises:
            NumericalError: For weights that are not finite in `dtype`; nothing is written then.
        """
        write_network(encoder, self.to_config(), self.tensors(), dtype)
        self.write_tokenizer(tokenizer)


class SequenceEncoder(Encoder):
    """An encoder whose last hidden states, at a fixed number of positions, are the result."""

    def check(self, text: str, length: int, truncation: str) -> None:
        """Raise every `UserError` of `encode`, without running the network."""
        if truncation == "refuse":
            check_length(self.tokenizer, text, length, text)

    def encode(
        self, text: str, length: int, mask_padding: bool, truncation: str
    ) -> tuple[Float[Tensor, "L D"], Bool[Tensor, " L"]]:
        """One text -> hidden states (L, width) in float32 and a mask (L,), False on padding.

        Args:
            text: The text.
            length: Positions L, special tokens among them.
            mask_padding: Whether padding is masked in the encoder's own attention.
            truncation: "refuse" a longer text, or "cut" it.

        Raises:
            UserError: For a longer text that is not cut.
            NumericalError: For states beyond the range of the network's dtype.
        """
        self.check(text, length, truncation)
        return last_states(self.tokenizer, self.model, text, length, mask_padding)


def require_transformers() -> None:
    """Raise `UserError` where the package that runs text encoders is not installed."""
    try:
        import transformers  # noqa: F401  (so that its absence is one sentence)
    except ImportError as error:
        raise UserError(
            "text prompts need the package transformers: run `pip install 'sfumato[text]'`"
        ) from error
