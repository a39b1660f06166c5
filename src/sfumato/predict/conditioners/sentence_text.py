"""Text prompts through a small sentence encoder, for models that are trained at home: BERT's
network, such as all-MiniLM-L6-v2, 384 wide (Wang et al. 2020, arXiv:2002.10957; Reimers & Gurevych
2019, arXiv:1908.10084).

    tokens   the states of all positions, 64 unless the settings say otherwise
    mask     [CLS], the words and [SEP]: neither the encoder nor the network looks at padding

The mean of the states that count, brought to length 1, is the sentence's embedding; a network that
wants it takes it from these two, as `ModernDiT` with `caption_channels` does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sfumato.errors import UserError
from sfumato.predict.conditioners._parts import check_settings, read_settings
from sfumato.predict.conditioners._reading import TextAlone
from sfumato.predict.conditioners._sentence import CLASS, SentenceEncoder, read_sentence

READS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class SentenceTextConfig:
    """max_sequence_length: positions of a prompt, [CLS] and [SEP] among them; at most what the
    encoder knows, 512 as a rule. masked: whether padding is left out, in the encoder's attention
    and (by the mask) in the network's. long: "refuse" a prompt of more tokens, or "cut" it.
    """

    max_sequence_length: int = 64
    masked: bool = True
    long: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, eq=False)
class SentenceText(TextAlone):
    """encoder: BERT with its tokenizer, which puts prompts into lower case if it was trained so.
    The null condition is the empty prompt.

    `UserError` for more positions than the encoder knows.
    """

    encoder: SentenceEncoder
    config: SentenceTextConfig = SentenceTextConfig()

    NAME: ClassVar[str] = "sentence_text"

    def __post_init__(self) -> None:
        if self.config.max_sequence_length > self.encoder.length:
            raise UserError(
                f"max_sequence_length={self.config.max_sequence_length}: this text encoder has {self.encoder.length} positions, "
                "expected at most as many"
            )

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes such."""
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
        """Opens text_encoder/ and tokenizer/ of a model's folder, and the settings in
        conditioner/config.json if there are any; weights become `dtype` (None: as stored).
        `UserError` for what does not fit. variant: the files of weights to prefer, such as
        "fp16".
        """
        folder = Path(folder)
        encoder = read_sentence(folder / "tokenizer", folder / "text_encoder", dtype, variant)
        return cls(encoder, read_settings(SentenceTextConfig, cls.NAME, folder, {}))

    @classmethod
    def from_encoder(
        cls,
        folder: str | Path,
        config: SentenceTextConfig = SentenceTextConfig(),
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "SentenceText":
        """Opens an encoder as transformers and sentence-transformers save one: config.json, the
        weights and the tokenizer's files side by side.

        What sentence-transformers adds (modules.json, 1_Pooling/, ...) is not looked at: its
        pooling, its limit of length, its dense layers. The rest as in `from_folder`.
        """
        return cls(read_sentence(Path(folder), Path(folder), dtype, variant), config)
