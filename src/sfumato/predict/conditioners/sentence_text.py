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
from typing import ClassVar

import torch

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    EncoderPart,
    SequenceTextConfig,
    SingleEncoderText,
)
from sfumato.predict.text_encoders.sentence import CLASS, SentenceEncoder, load_sentence_encoder

ENCODERS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class SentenceTextConfig(SequenceTextConfig):
    """Settings of `SentenceText`; at most the encoder's positions, 512 as a rule."""

    max_sequence_length: int = 64
    mask_padding: bool = True


@dataclass(frozen=True, eq=False)
class SentenceText(SingleEncoderText):
    """Prompts through BERT. The null condition is the empty prompt.

    Attributes:
        encoder: BERT with its tokenizer, which puts prompts into lower case if it was trained so.
        config: The settings; `UserError` for more positions than the encoder has.
    """

    name = "sentence_text"
    parts: ClassVar = {"": EncoderPart(load_sentence_encoder, "BertTokenizer")}

    encoder: SentenceEncoder
    config: SentenceTextConfig = SentenceTextConfig()

    def __post_init__(self) -> None:
        if self.config.max_sequence_length > self.encoder.length:
            raise UserError(
                f"max_sequence_length={self.config.max_sequence_length}: "
                f"this text encoder has {self.encoder.length} positions, expected at most as many"
            )

    @classmethod
    def from_encoder(
        cls,
        folder: str | Path,
        config: SentenceTextConfig = SentenceTextConfig(),
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "SentenceText":
        """Open an encoder's folder as transformers and sentence-transformers save one.

        config.json, the weights and the tokenizer's files lie side by side. Files
        that sentence-transformers adds (modules.json, 1_Pooling/, ...) are ignored: its pooling,
        its limit of length, its dense layers.

        Args:
            folder: The encoder's folder.
            config: The settings.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        return cls(load_sentence_encoder(Path(folder), Path(folder), dtype, variant), config)
