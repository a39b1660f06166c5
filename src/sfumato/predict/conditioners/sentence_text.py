"""Text prompts through a small sentence encoder, for models that are trained at home.

BERT's network, such as all-MiniLM-L6-v2, 384 wide (Wang et al. 2020, arXiv:2002.10957; Reimers &
Gurevych 2019, arXiv:1908.10084).

    tokens   the states of all positions, 64 unless the settings say otherwise
    mask     False on padding: neither the encoder nor the network attends to it

The mean of the states that the mask keeps, brought to length 1, is the sentence's embedding. A
network computes it from these two, as `ModernDiT` with `caption_channels` does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    SingleEncoderText,
    TextConfig,
    check_settings,
    read_settings,
)
from sfumato.predict.text_encoders.sentence import CLASS, SentenceEncoder, load_sentence_encoder

ENCODERS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class SentenceTextConfig(TextConfig):
    """Settings of `SentenceText`.

    Attributes:
        max_sequence_length: Positions of a prompt, [CLS] and [SEP] among them; at most the
            encoder's, 512 as a rule.
        mask_padding: Whether padding is masked, in the encoder's attention and (by the mask) in the
            network's.
        truncation: "refuse" a longer prompt, or "cut" it.
    """

    max_sequence_length: int = 64
    mask_padding: bool = True
    truncation: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, eq=False)
class SentenceText(SingleEncoderText):
    """Prompts through BERT. The null condition is the empty prompt.

    Attributes:
        encoder: BERT with its tokenizer, which puts prompts into lower case if it was trained so.
        config: The settings; `UserError` for more positions than the encoder has.
    """

    name = "sentence_text"

    encoder: SentenceEncoder
    config: SentenceTextConfig = SentenceTextConfig()

    def __post_init__(self) -> None:
        if self.config.max_sequence_length > self.encoder.length:
            raise UserError(
                f"max_sequence_length={self.config.max_sequence_length}: this text encoder has {self.encoder.length} positions, "
                "expected at most as many"
            )

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers would write them."""
        return {
            "tokenizer": ["transformers", "BertTokenizer"],
            "text_encoder": ["transformers", CLASS],
        }

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "SentenceText":
        """Open text_encoder/ and tokenizer/ of a model's folder, and its settings.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        folder = Path(folder)
        encoder = load_sentence_encoder(
            folder / "tokenizer", folder / "text_encoder", dtype, variant
        )
        return cls(encoder, read_settings(SentenceTextConfig, cls.name, folder, {}))

    @classmethod
    def from_encoder(
        cls,
        folder: str | Path,
        config: SentenceTextConfig = SentenceTextConfig(),
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "SentenceText":
        """Open an encoder's folder as transformers and sentence-transformers save one.

        config.json, the weights and the tokenizer's files lie side by side. What
        sentence-transformers adds (modules.json, 1_Pooling/, ...) is ignored: its pooling, its
        limit of length, its dense layers.

        Args:
            folder: The encoder's folder.
            config: The settings.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        return cls(load_sentence_encoder(Path(folder), Path(folder), dtype, variant), config)
