"""Text prompts for FLUX.2: one language model.

Black Forest Labs 2025, github.com/black-forest-labs/flux2, src/flux2/text_encoder.py.

    dev      Mistral Small 3's states after layers 10, 20 and 30, 3 times 5120 wide; the prompt
             follows a system message
    klein    Qwen3's states after layers 9, 18 and 27; 3 times 2560 (4B) or 4096 (8B) wide

    tokens   those states side by side, at 512 positions; no vector

The language model masks padding in its attention; the diffusion model attends to the states of
padding like those of words: so it was trained. text_encoder/config.json says which of the two a
folder holds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    TextConditioner,
    TextConfig,
    check_settings,
    prompt_texts,
    read_settings,
)
from sfumato.predict.conditioners.base import Prompts
from sfumato.predict.text_encoders.language_model import CLASSES, LanguageModel, load_language_model
from sfumato.types import Conditioning, ImageSpec

SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, object\n"
    "attribution and actions without speculation."
)
"""The system message that FLUX.2 dev was trained with.

src/flux2/system_messages.py of github.com/black-forest-labs/flux2.
"""
TRAINED: dict[str, dict[str, Any]] = {
    "mistral3": {"layers": (10, 20, 30), "system_message": SYSTEM},
    "qwen3": {"layers": (9, 18, 27), "system_message": None},
}
"""Settings that the published models were trained with, by the language model's `model_type`."""
ENCODERS = tuple({"text_encoder": name} for name in CLASSES.values())


@dataclass(frozen=True)
class Flux2TextConfig(TextConfig):
    """Settings of `Flux2Text`. layers and system_message are dev's; `TRAINED` has klein's.

    Attributes:
        layers: The language model's layers whose states are taken; 1 is the first.
        system_message: The message before the prompt in the chat; None: none.
        max_sequence_length: Positions of a prompt with its chat template.
        mask_padding: Whether padding is masked in the network's attention; FLUX.2 was trained with
            padding in it.
        truncation: "refuse" a longer prompt, or "cut" it.
    """

    layers: tuple[int, ...] = TRAINED["mistral3"]["layers"]
    system_message: str | None = SYSTEM
    max_sequence_length: int = 512
    mask_padding: bool = False
    truncation: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)
        whole = isinstance(self.layers, tuple) and all(
            isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in self.layers
        )
        if not whole or not self.layers:
            raise UserError(
                f"layers={self.layers!r}: expected a list of at least one whole number, 1 for the first layer"
            )
        if self.system_message is not None and not isinstance(self.system_message, str):
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

    encoder: LanguageModel
    config: Flux2TextConfig = Flux2TextConfig()

    def __post_init__(self) -> None:
        if max(self.config.layers) > self.encoder.num_layers:
            raise UserError(
                f"layers={list(self.config.layers)}: the language model has {self.encoder.num_layers}; expected none beyond them"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        config = self.config
        for text in dict.fromkeys(prompt_texts(prompts)):
            self.encoder.check(
                text, config.system_message, config.max_sequence_length, config.truncation
            )

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width), and `mask` (B, L) where the settings say so.

        The image makes no difference.
        """
        texts = prompt_texts(prompts)
        states = {text: self._encode_text(text) for text in dict.fromkeys(texts)}
        tokens, mask = (torch.stack([states[text][k] for text in texts]) for k in (0, 1))
        return Conditioning(tokens, mask if self.config.mask_padding else None)

    def _encode_text(self, text: str) -> tuple[Tensor, Tensor]:
        config = self.config
        return self.encoder.encode(
            text,
            config.system_message,
            config.layers,
            config.max_sequence_length,
            config.truncation,
        )

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, LanguageModel]:
        """The one encoder, by the ending of its folder's name."""
        return {"": self.encoder}

    @property
    def width(self) -> int:
        """Channels of a token, the network's `joint_attention_dim`."""
        return len(self.config.layers) * self.encoder.width

    # ---- folders ---------------------------------------------------------------------------------

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        return self.encoder.index()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "Flux2Text":
        """Open text_encoder/ and tokenizer/ of a folder in diffusers' layout.

        Settings come from conditioner/config.json where there is one, else they are those that the
        published model with such a language model was trained with.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        folder = Path(folder)
        encoder = load_language_model(folder / "tokenizer", folder / "text_encoder", dtype, variant)
        return cls(encoder, read_settings(Flux2TextConfig, cls.name, folder, TRAINED[encoder.kind]))
