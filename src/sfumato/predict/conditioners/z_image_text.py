"""Text prompts for Z-Image (Z-Image team 2025, arXiv:2511.22699): Qwen3.

    tokens  (B, L, D)  the states after Qwen3's last layer but one, not normed; 2560 wide (4B)
    mask    (B, L)     False on padding

The prompt is a user's message in the chat template, which ends where an answer that begins with
thinking would begin. The network leaves masked tokens out, so Qwen3 is not run on padding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    TRUNCATIONS,
    Encoded,
    EncoderPart,
    TextConditioner,
    TextConfig,
)
from sfumato.predict.text_encoders.language_model import (
    BASES,
    CLASSES,
    LanguageModel,
    load_language_model,
)
from sfumato.validate import one_of, whole_number

KIND = "qwen3"
"""The language model's `model_type`."""
ENCODERS = ({"text_encoder": BASES[KIND]}, {"text_encoder": CLASSES[KIND]})


@dataclass(frozen=True)
class ZImageTextConfig(TextConfig):
    """Settings of `ZImageText`.

    Attributes:
        max_sequence_length: Positions of a prompt with its chat template.
        truncation: "refuse" a longer prompt, or "cut" it.
    """

    max_sequence_length: int = 512
    truncation: str = "refuse"

    def __post_init__(self) -> None:
        one_of("truncation", self.truncation, TRUNCATIONS)
        whole_number("max_sequence_length", self.max_sequence_length, 2)


@dataclass(frozen=True, eq=False)
class ZImageText(TextConditioner):
    """Prompts through Qwen3. The null condition is the empty prompt.

    Attributes:
        encoder: Qwen3 with its tokenizer; `UserError` for another language model.
        config: The settings.
    """

    name = "z_image_text"
    parts: ClassVar = {"": EncoderPart(load_language_model)}

    encoder: LanguageModel
    config: ZImageTextConfig = ZImageTextConfig()

    def __post_init__(self) -> None:
        if self.encoder.kind != KIND:
            raise UserError(
                f"the language model is of type {self.encoder.kind!r}: Z-Image reads prompts with "
                f"{KIND}; use the text encoder of its own folder"
            )

    def _check_row(self, first: str, others: str) -> None:
        length, truncation = self.config.max_sequence_length, self.config.truncation
        self.encoder.check(first, None, length, truncation, thinking=True)

    def _encode_row(self, first: str, others: str) -> Encoded:
        length, layers = self.config.max_sequence_length, (self.encoder.num_layers - 1,)
        states, _ = self.encoder.encode(
            first, None, layers, length, self.config.truncation, thinking=True, padding=False
        )
        tokens = states.new_zeros(length, self.width)
        tokens[: len(states)] = states
        return tokens, torch.arange(length, device=states.device) < len(states), None

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cap_feat_dim`."""
        return self.encoder.width

    @property
    def masks_padding(self) -> bool:
        """True: the network leaves padded tokens out."""
        return True

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, which name the language model without its head."""
        return {**self.encoder.index(), "text_encoder": ["transformers", BASES[KIND]]}
