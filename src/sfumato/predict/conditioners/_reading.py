"""What conditioners with text encoders share: `TextReader`, and `TextAlone` for those with one
encoder whose states the network reads as they are; and `Encoder`, what such encoders share.

tokens   the states of all positions
mask     where they are more than padding
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._parts import (
    moved,
    states_of,
    texts,
    tokenizer_hash,
    write_network,
    write_settings,
)
from sfumato.types import Conditioning, ImageSpec


@dataclass(frozen=True, eq=False)
class Encoder(ABC):
    """A network of transformers with its tokenizer, of which the states after the last layer are
    read.

    NAME: the network's class there. DECISIVE: fields of its config that change states, and that the
    shapes of the weights do not all show.
    """

    NAME: ClassVar[str]
    DECISIVE: ClassVar[tuple[str, ...]]
    tokenizer: Any
    model: Any

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.model.config.hidden_size

    def encode(
        self, text: str, length: int, masked: bool, long: str
    ) -> tuple[Float[Tensor, "L D"], Bool[Tensor, " L"]]:
        """The states of `length` positions in float32, and where they are more than padding:
        `states_of`.
        """
        return states_of(self.tokenizer, self.model, text, length, masked, long)

    def identity(self) -> dict[str, Any]:
        """What decides its states besides the weights, as JSON."""
        config = {field: getattr(self.model.config, field) for field in self.DECISIVE}
        return {"config": config, "tokenizer": tokenizer_hash(self.tokenizer)}

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by the names that files have. Not copies."""
        return self.model.state_dict()

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, as transformers writes it."""
        return {**self.model.config.to_dict(), "architectures": [self.NAME]}

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's folder."""

    def save(self, tokenizer: Path, encoder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes both folders; the weights in `dtype`, by default their own. `NumericalError` for
        weights that are not finite in it.
        """
        write_network(encoder, self.to_config(), self.tensors(), dtype)
        self.write_tokenizer(tokenizer)


class TextReader(ABC):
    """A frozen dataclass whose fields are encoder, encoder_2, ..., networks with their tokenizers,
    such as `T5Encoder`, and config, its settings.

    NAME: the conditioner's file. Every character is text: brackets weigh nothing.
    `dataclasses.replace` changes the settings; encoders are shared, not copied.
    """

    NAME: ClassVar[str]
    config: Any

    @abstractmethod
    def __call__(
        self,
        prompts: Sequence[str | None],
        picture: ImageSpec | None = None,
        prompts_2: Sequence[str | None] | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning of float32."""

    def null(self, count: int, picture: ImageSpec | None = None) -> Conditioning:
        """The empty prompt, `count` times."""
        return self([None] * count, picture)

    # ---- what it is ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def encoders(self) -> dict[str, Any]:
        """The encoders by the ending of their folders' names: "", "_2", ...."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a token."""

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return self.encoders[""].model.device

    def tensors(self) -> dict[str, Tensor]:
        """All weights, by name: "text_encoder." or "text_encoder_2." and the encoder's own names.
        Not copies.
        """
        return {
            f"text_encoder{end}.{key}": tensor
            for end, e in self.encoders.items()
            for key, tensor in e.tensors().items()
        }

    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the weights, as JSON: settings, the encoders' configs,
        the tokenizers' hashes.
        """
        return {
            **self.to_config(),
            **{f"text_encoder{end}": e.identity() for end, e in self.encoders.items()},
        }

    def to(self, device: str | torch.device) -> Self:
        """The same on a device; this one is left where it is."""
        parts: dict[str, Any] = {
            f"encoder{end}": replace(e, model=moved(e.model, device))
            for end, e in self.encoders.items()
        }
        return replace(cast(Any, self), **parts)

    # ---- folders ---------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: the settings."""
        settings = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.config).items()
        }
        return {"_class_name": self.NAME, **settings}

    @abstractmethod
    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes tokenizer/ and text_encoder/, and those of further encoders, into a model's
        folder, as transformers and diffusers open them, and conditioner/config.json; not
        model_index.json (`index`).
        """
        for end, encoder in self.encoders.items():
            encoder.save(
                Path(folder) / f"tokenizer{end}", Path(folder) / f"text_encoder{end}", dtype
            )
        write_settings(Path(folder), self.to_config())


def alone(prompts_2: Sequence[str | None] | None) -> None:
    """`UserError` for prompts for a second encoder, where there is none."""
    if prompts_2 is not None:
        raise UserError(
            f"{len(prompts_2)} prompts for a second text encoder: this model has one, put everything into the prompt"
        )


@dataclass(frozen=True, eq=False)
class TextAlone(TextReader):
    """encoder: a network with its tokenizer, such as `T5Encoder`. config: settings, with
    max_sequence_length, masked and long.
    """

    encoder: Any
    config: Any

    def __call__(
        self,
        prompts: Sequence[str | None],
        picture: ImageSpec | None = None,
        prompts_2: Sequence[str | None] | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning of float32: `tokens` (B, L, width); `mask` (B, L), True where a
        token counts, if the settings say so; `vector` (B, V) of what the network is told of the
        picture, if it is told of it.

        None is "". A row's numbers do not depend on the other prompts. `UserError` for what is not
        text, for a long prompt where the settings refuse those, and for `prompts_2`: there is no
        second encoder.
        """
        alone(prompts_2)
        rows, settings = [self._text(text) for text in texts(prompts)], self.config
        read = {
            text: self.encoder.encode(
                text, settings.max_sequence_length, settings.masked, settings.long
            )
            for text in dict.fromkeys(rows)
        }
        tokens = torch.stack([read[text][0] for text in rows])
        mask = torch.stack([read[text][1] for text in rows]) if settings.masked else None
        vector = self._vector(picture)
        return Conditioning(tokens, mask, None if vector is None else vector.expand(len(rows), -1))

    def _text(self, prompt: str) -> str:
        """A prompt as the encoder is given it."""
        return prompt

    def _vector(self, picture: ImageSpec | None) -> Tensor | None:
        """What the network is told of the picture, (1, V)."""
        return None

    @property
    def encoders(self) -> dict[str, Any]:
        """The one encoder, by the ending of its folder's name."""
        return {"": self.encoder}

    @property
    def width(self) -> int:
        """Channels of a token, the network's `caption_channels`."""
        return self.encoder.width
