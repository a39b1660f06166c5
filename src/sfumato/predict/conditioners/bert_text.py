"""Text prompts through the transformer of Latent Diffusion's text-to-image model.

tokens: the states of all positions, 77 of them 1280 wide in the published model, after the final
norm (Rombach et al. 2022, arXiv:2112.10752, section 4.3.1). The folder is that of diffusers'
LDMTextToImagePipeline: `bert` and `tokenizer`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.predict.conditioners._text_base import TextConditioner, prompt_texts
from sfumato.predict.conditioners.base import Prompts
from sfumato.predict.text_encoders.bert import CLASS, BertEncoder, load_bert
from sfumato.types import Conditioning, ImageSpec

ENCODERS = ({"bert": CLASS},)


@dataclass(frozen=True, eq=False)
class BertText(TextConditioner):
    """Prompts through Latent Diffusion's text transformer; there are no settings.

    Attributes:
        encoder: The transformer with its tokenizer.
    """

    name = "bert_text"
    part = "bert"

    encoder: BertEncoder

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        for text in dict.fromkeys(prompt_texts(prompts)):
            self.encoder.token_ids(text)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width); the image makes no difference."""
        texts = prompt_texts(prompts)
        states = {text: self.encoder.encode(text) for text in dict.fromkeys(texts)}
        return Conditioning(torch.stack([states[text] for text in texts]))

    @property
    def encoders(self) -> dict[str, BertEncoder]:
        """The one encoder, by the ending that others have in their folder's name."""
        return {"": self.encoder}

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return self.encoder.width

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the result."""
        return {**self.to_config(), **self.encoder.identity()}

    # ---- folders ---------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: the name alone."""
        return {"_class_name": self.name}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        return {"tokenizer": ["transformers", "BertTokenizer"], "bert": ["latent_diffusion", CLASS]}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "BertText":
        """Open bert/ and tokenizer/ of a folder in diffusers' layout.

        Arguments as in `Conditioner.from_folder`; there are no variants.
        """
        return cls(load_bert(Path(folder) / "tokenizer", Path(folder) / "bert", dtype))
