"""Text prompts for FLUX.2 (Black Forest Labs 2025, github.com/black-forest-labs/flux2,
src/flux2/text_encoder.py): one language model.

    dev      Mistral Small 3's states after layers 10, 20 and 30, after a system's message; 3 times
             5120 wide
    klein    Qwen3's states after layers 9, 18 and 27; 3 times 2560 (4B) or 4096 (8B) wide

    tokens   those states side by side, at 512 positions; no vector

The language model leaves padding out of its attention; the diffusion model attends to the states of
padding like those of words: so it was trained. Which of the two a folder holds is told by
text_encoder/config.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._language import CLASSES, LanguageModel, read_language_model
from sfumato.predict.conditioners._parts import check_settings, read_settings, texts
from sfumato.predict.conditioners._reading import TextReader, alone
from sfumato.types import Conditioning, ImageSpec

SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, object\n"
    "attribution and actions without speculation."
)
"""The system's message that FLUX.2 dev was trained with: src/flux2/system_messages.py of
github.com/black-forest-labs/flux2."""
TRAINED: dict[str, dict[str, Any]] = {
    "mistral3": {"layers": (10, 20, 30), "system_message": SYSTEM},
    "qwen3": {"layers": (9, 18, 27), "system_message": None},
}
"""The settings that the published models were trained with, by the `model_type` of their reader."""


READS = tuple({"text_encoder": name} for name in CLASSES.values())


@dataclass(frozen=True)
class Flux2TextConfig:
    """layers: after which of the language model's layers its states are taken (1 is the first).
    system_message: what stands before the prompt in the chat, None for nothing. Both: as dev was
    trained; `TRAINED` has klein's. max_sequence_length: positions of a prompt with its frame.
    masked: whether padding is left out of the network's attention (by a mask); FLUX.2 was trained
    with padding in it. long: "refuse" a prompt of more tokens, or "cut" it.
    """

    layers: tuple[int, ...] = TRAINED["mistral3"]["layers"]
    system_message: str | None = SYSTEM
    max_sequence_length: int = 512
    masked: bool = False
    long: str = "refuse"

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
class Flux2Text(TextReader):
    """encoder: the language model with its tokenizer. Every character is text: brackets weigh
    nothing here.

    `dataclasses.replace` changes the settings; the encoder is shared, not copied.
    """

    encoder: LanguageModel
    config: Flux2TextConfig = Flux2TextConfig()

    NAME: ClassVar[str] = "flux2_text"

    def __post_init__(self) -> None:
        if max(self.config.layers) > self.encoder.layers:
            raise UserError(
                f"layers={list(self.config.layers)}: the language model has {self.encoder.layers}; expected none beyond them"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[str | None],
        picture: ImageSpec | None = None,
        prompts_2: Sequence[str | None] | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning of float32: `tokens` (B, L, width); `mask` (B, L) if the settings
        say so. The picture makes no difference.

        None is "". A row's numbers do not depend on the other prompts. `UserError` for what is not
        text, for a long prompt where the settings refuse those, and for `prompts_2`: there is no
        second encoder.
        """
        alone(prompts_2)
        rows = texts(prompts)
        read = {text: self._read(text) for text in dict.fromkeys(rows)}
        tokens, mask = (torch.stack([read[text][k] for text in rows]) for k in (0, 1))
        return Conditioning(tokens, mask if self.config.masked else None)

    def _read(self, text: str) -> tuple[Tensor, Tensor]:
        config = self.config
        return self.encoder.encode(
            text, config.system_message, config.layers, config.max_sequence_length, config.long
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
        """Opens text_encoder/ and tokenizer/ of a folder in diffusers' layout; weights become
        `dtype` (None: as stored). `UserError` for what does not fit.

        variant: the files of weights to prefer, such as "fp16". Settings come from
        conditioner/config.json where there is one, else they are those that the published model
        with such a reader was trained with.
        """
        folder = Path(folder)
        encoder = read_language_model(folder / "tokenizer", folder / "text_encoder", dtype, variant)
        return cls(encoder, read_settings(Flux2TextConfig, cls.NAME, folder, TRAINED[encoder.kind]))
