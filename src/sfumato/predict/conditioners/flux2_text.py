"""Text prompts for FLUX.2: one language model.

Black Forest Labs 2025, github.com/black-forest-labs/flux2, src/flux2/text_encoder.py.

    dev      Mistral Small 3's states after layers 10, 20 and 30, 3 times 5120 wide; the prompt
             follows a system message
    klein    Qwen3's states after layers 9, 18 and 27; 3 times 2560 (4B) or 4096 (8B) wide

    tokens   those states side by side, at 512 positions; no vector

The language model masks padding in its attention; the diffusion model attends to the states of
padding like those of words: so it was trained. text_encoder/config.json names the language model of
a folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    Encoded,
    EncoderPart,
    SequenceTextConfig,
    TextConditioner,
)
from sfumato.predict.text_encoders.language_model import CLASSES, LanguageModel, load_language_model

SYSTEM = (
    "You are an AI that reasons about image descriptions. "
    "You give structured responses focusing on object relationships, object\n"
    "attribution and actions without speculation."
)
"""The system message that FLUX.2 dev was trained with.

src/flux2/system_messages.py of github.com/black-forest-labs/flux2.
"""
TRAINED: dict[str, dict[str, Any]] = {
    "mistral3": {"layers": (10, 20, 30), "system_message": SYSTEM},
    "qwen3": {"layers": (9, 18, 27), "system_message": None},
}
"""Settings of the published models, by the language model's `model_type`."""
ENCODERS = tuple({"text_encoder": name} for name in CLASSES.values())


@dataclass(frozen=True)
class Flux2TextConfig(SequenceTextConfig):
    """Settings of `Flux2Text`; FLUX.2 was trained with padding in its attention.

    The defaults are dev's; `TRAINED` has klein's. Positions hold a prompt with its chat template.

    Attributes:
        layers: The language model's layers whose states are taken; 1 is the first.
        system_message: The message before the prompt in the chat; None: none.
    """

    layers: tuple[int, ...] = TRAINED["mistral3"]["layers"]
    system_message: str | None = SYSTEM

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.layers, tuple) and all(
            isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in self.layers
        )
        if not whole or not self.layers:
            raise UserError(
                f"layers={self.layers!r}: "
                "expected a list of at least one whole number, 1 for the first layer"
            )
        if not isinstance(self.system_message, str | None):
            raise UserError(
                f"system_message={self.system_message!r}: expected a text, or nothing (null)"
            )


@dataclass(frozen=True, eq=False)
class Flux2Text(TextConditioner):
    """Prompts through a language model.

    Attributes:
        encoder: The language model with its tokenizer.
        config: The settings; `UserError` for layers beyond the language model's.
    """

    name = "flux2_text"
    parts: ClassVar = {"": EncoderPart(load_language_model)}

    encoder: LanguageModel
    config: Flux2TextConfig = Flux2TextConfig()

    def __post_init__(self) -> None:
        if max(self.config.layers) > self.encoder.num_layers:
            raise UserError(
                f"layers={list(self.config.layers)}: "
                f"the language model has {self.encoder.num_layers}; expected none beyond them"
            )

    def _check_row(self, first: str, others: str) -> None:
        config = self.config
        self.encoder.check(
            first, config.system_message, config.max_sequence_length, config.truncation
        )

    def _encode_row(self, first: str, others: str) -> Encoded:
        config = self.config
        encoded = self.encoder.encode(
            first,
            config.system_message,
            config.layers,
            config.max_sequence_length,
            config.truncation,
        )
        return *encoded, None

    @property
    def width(self) -> int:
        """Channels of a token, the network's `joint_attention_dim`."""
        return len(self.config.layers) * self.encoder.width

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        return self.encoder.index()

    @classmethod
    def _default_settings(cls, folder: Path, encoders: Mapping[str, Any]) -> Mapping[str, Any]:
        return TRAINED[encoders["encoder"].kind]
