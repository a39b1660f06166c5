"""Text prompts through T5 alone: PixArt-alpha and PixArt-Sigma.

Chen et al. 2023, arXiv:2310.00426, section 3.1; Sigma: Chen et al. 2024, arXiv:2403.04692.

    tokens   the states of T5's encoder: 120 positions, as alpha was trained, or 300, as Sigma was
    mask     False on padding: neither T5 nor the network attends to it
    vector   (height, width, height / width) of the image in pixels, if one is given: alpha's model
             for 1024 pixels, which was trained on many shapes, is conditioned on it, after SDXL's
             example; other networks ignore it

Prompts are put into lower case and their outer spaces are removed, as the captions were in
training. diffusers can besides take addresses, marks and the like out of captions
(`clean_caption`): that is for captions from the web, and is not done here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from sfumato.predict.conditioners._text_base import (
    EncoderPart,
    SequenceTextConfig,
    SingleEncoderText,
    Texts,
    prompt_texts,
)
from sfumato.predict.conditioners.base import Prompts
from sfumato.predict.text_encoders.base import read_optional_json
from sfumato.predict.text_encoders.t5 import CLASS, T5Encoder, load_t5
from sfumato.types import Conditioning, ImageSpec
from sfumato.validate import flag

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Positions by the `_class_name` of model_index.json."""

ENCODERS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class T5TextConfig(SequenceTextConfig):
    """Settings of `T5Text`: padding is masked, as PixArt was trained.

    Attributes:
        lower: True puts prompts into lower case and strips them, as PixArt's captions were.
    """

    max_sequence_length: int = 120
    mask_padding: bool = True
    lower: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("lower", self.lower)


@dataclass(frozen=True, eq=False)
class T5Text(SingleEncoderText):
    """Prompts through T5. The null condition is the empty prompt, as in PixArt's guidance.

    Attributes:
        encoder: T5 with its tokenizer.
        config: The settings.
    """

    name = "t5_text"
    parts: ClassVar = {"": EncoderPart(load_t5, "T5TokenizerFast")}

    encoder: T5Encoder
    config: T5TextConfig = T5TextConfig()

    def _rows(self, prompts: Prompts, second: Prompts | None) -> list[Texts]:
        texts = prompt_texts(prompts)
        if self.config.lower:
            texts = [text.lower().strip() for text in texts]
        return [(text, text) for text in texts]

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width), `mask` (B, L), and the image's size as `vector` (B, 3)."""
        conditioning = super().encode(prompts, image_spec, second)
        if image_spec is None:
            return conditioning
        height, width = image_spec.size
        sizes = torch.tensor([height, width, height / width], dtype=torch.float32)
        return replace(conditioning, vector=sizes.to(self.device).expand(len(prompts), -1))

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`: the image's height, width and their ratio."""
        return 3

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        slow = {} if self.encoder.spiece is None else {"tokenizer": ["transformers", "T5Tokenizer"]}
        return super().index() | slow

    @classmethod
    def _default_settings(cls, folder: Path, encoders: Mapping[str, Any]) -> Mapping[str, Any]:
        pipeline = str(read_optional_json(folder / "model_index.json").get("_class_name"))
        return {"max_sequence_length": LENGTHS[pipeline]} if pipeline in LENGTHS else {}
