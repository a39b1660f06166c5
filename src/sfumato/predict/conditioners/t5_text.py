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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.predict.conditioners._text_base import (
    SingleEncoderText,
    TextConfig,
    check_flag,
    check_settings,
    prompt_texts,
    read_settings,
)
from sfumato.predict.conditioners.base import Prompts
from sfumato.predict.text_encoders.base import read_optional_json
from sfumato.predict.text_encoders.t5 import CLASS, T5Encoder, load_t5
from sfumato.types import ImageSpec

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Positions by the `_class_name` of model_index.json."""

ENCODERS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class T5TextConfig(TextConfig):
    """Settings of `T5Text`.

    Attributes:
        max_sequence_length: Positions of a prompt, its end token among them.
        mask_padding: Whether padding is masked, in T5's attention and (by the mask) in the
            network's, as PixArt was trained.
        lower: Whether prompts are put into lower case and stripped, as PixArt's captions were.
        truncation: "refuse" a longer prompt, or "cut" it.
    """

    max_sequence_length: int = 120
    mask_padding: bool = True
    lower: bool = True
    truncation: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)
        check_flag("lower", self.lower)


@dataclass(frozen=True, eq=False)
class T5Text(SingleEncoderText):
    """Prompts through T5. The null condition is the empty prompt, as in PixArt's guidance.

    Attributes:
        encoder: T5 with its tokenizer.
        config: The settings.
    """

    name = "t5_text"

    encoder: T5Encoder
    config: T5TextConfig = T5TextConfig()

    def _texts(self, prompts: Prompts) -> list[str]:
        return [
            text.lower().strip() if self.config.lower else text for text in prompt_texts(prompts)
        ]

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`: the image's height, width and their ratio."""
        return 3

    def _vector(self, image_spec: ImageSpec | None) -> Tensor | None:
        if image_spec is None:
            return None
        height, width = image_spec.size
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
        """Open text_encoder/ and tokenizer/ of a folder in diffusers' layout.

        Settings come from conditioner/config.json where there is one, else the length is that of
        the pipeline in model_index.json.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        folder = Path(folder)
        pipeline = read_optional_json(folder / "model_index.json").get("_class_name")
        defaults = {"max_sequence_length": LENGTHS[pipeline]} if pipeline in LENGTHS else {}
        encoder = load_t5(folder / "tokenizer", folder / "text_encoder", dtype, variant)
        return cls(encoder, read_settings(T5TextConfig, cls.name, folder, defaults))
