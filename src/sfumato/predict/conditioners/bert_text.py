"""Text prompts through the transformer of Latent Diffusion's text-to-image model.

tokens: the states of all positions, 77 of them 1280 wide in the published model, after the final
norm (Rombach et al. 2022, arXiv:2112.10752, section 4.3.1). The folder is that of diffusers'
LDMTextToImagePipeline: `bert` and `tokenizer`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sfumato.predict.conditioners._text_base import (
    Encoded,
    EncoderPart,
    TextConditioner,
    TextConfig,
)
from sfumato.predict.text_encoders.bert import CLASS, BertEncoder, load_bert

ENCODERS = ({"bert": CLASS},)
NO_SETTINGS = TextConfig()


def _load(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None
) -> BertEncoder:
    return load_bert(tokenizer, encoder, dtype)  # there are no variants


@dataclass(frozen=True, eq=False)
class BertText(TextConditioner):
    """Prompts through Latent Diffusion's text transformer; there are no settings.

    Attributes:
        encoder: The transformer with its tokenizer.
    """

    name = "bert_text"
    parts: ClassVar = {"": EncoderPart(_load, "BertTokenizer")}
    part = "bert"

    encoder: BertEncoder
    config: TextConfig = NO_SETTINGS

    def _check_row(self, first: str, others: str) -> None:
        self.encoder.token_ids(first)

    def _encode_row(self, first: str, others: str) -> Encoded:
        states = self.encoder.encode(first)
        return states, torch.ones(len(states), dtype=torch.bool, device=states.device), None

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return self.encoder.width

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the result."""
        return {**self.to_config(), **self.encoder.identity()}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        return super().index() | {"bert": ["latent_diffusion", CLASS]}
