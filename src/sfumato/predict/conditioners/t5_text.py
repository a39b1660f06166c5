"""Text prompts through T5 alone: PixArt-alpha (Chen et al. 2023, arXiv:2310.00426, section 3.1) and
PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692).

    tokens   the states of T5's encoder: 120 positions, as alpha was trained, or 300, as Sigma was
    mask     the words and the end token: neither T5 nor the network looks at padding
    vector   (height, width, height / width) of the picture in pixels, if one is given: what alpha's
             model for 1024 pixels, which was trained on many shapes, is told, after SDXL's example;
             the network looks away where it has no use for it

Prompts are put into lower case and their outer spaces are taken off, as the captions were in
training. diffusers can besides take addresses, marks and the like out of captions
(`clean_caption`): that is for captions from the web, and is not done here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._parts import check_settings, read_settings, table
from sfumato.predict.conditioners._reading import TextAlone
from sfumato.predict.conditioners._t5 import CLASS, T5Encoder, read_t5
from sfumato.types import ImageSpec

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Positions by the `_class_name` of model_index.json."""


READS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class T5TextConfig:
    """max_sequence_length: positions of a prompt, its end token among them.
    masked: whether padding is left out, in T5's attention and (by the mask) in the network's, as
    PixArt was trained. lower: whether prompts are put into lower case and stripped of outer spaces,
    as PixArt's captions were. long: "refuse" a prompt of more tokens, or "cut" it.
    """

    max_sequence_length: int = 120
    masked: bool = True
    lower: bool = True
    long: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)
        if not isinstance(self.lower, bool):
            raise UserError(f"lower={self.lower!r}: expected true or false")


@dataclass(frozen=True, eq=False)
class T5Text(TextAlone):
    """encoder: T5 with its tokenizer. The null condition is the empty prompt: what PixArt's
    guidance goes away from.
    """

    encoder: T5Encoder
    config: T5TextConfig = T5TextConfig()

    NAME: ClassVar[str] = "t5_text"

    def _text(self, prompt: str) -> str:
        return prompt.lower().strip() if self.config.lower else prompt

    def _vector(self, picture: ImageSpec | None) -> Tensor | None:
        if picture is None:
            return None
        height, width = picture.size
        return torch.tensor(
            [[height, width, height / width]], dtype=torch.float32, device=self.device
        )

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        tokenizer = "T5TokenizerFast" if self.encoder.spiece is None else "T5Tokenizer"
        return {"tokenizer": ["transformers", tokenizer], "text_encoder": ["transformers", CLASS]}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "T5Text":
        """Opens text_encoder/ and tokenizer/ of a folder in diffusers' layout; weights become
        `dtype` (None: as stored). `UserError` for what does not fit.

        variant: the files of weights to prefer, such as "fp16". Settings come from
        conditioner/config.json where there is one, else the length is that of the pipeline which
        model_index.json names.
        """
        folder = Path(folder)
        pipeline = table(folder / "model_index.json").get("_class_name")
        told = {"max_sequence_length": LENGTHS[pipeline]} if pipeline in LENGTHS else {}
        encoder = read_t5(folder / "tokenizer", folder / "text_encoder", dtype, variant)
        return cls(encoder, read_settings(T5TextConfig, "t5_text", folder, told))
