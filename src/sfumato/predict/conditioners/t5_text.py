"""Text prompts through T5 alone: PixArt-alpha (Chen et al. 2023, arXiv:2310.00426, section 3.1) and PixArt-Sigma (Chen et al. 2024,
arXiv:2403.04692).

    tokens   the states of T5's encoder: 120 positions, as alpha was trained, or 300, as Sigma was
    mask     the words and the end token: neither T5 nor the network looks at padding
    vector   (height, width, height / width) of the picture in pixels, if one is given: what alpha's model for 1024 pixels, which was trained on
             many shapes, is told, after SDXL's example; the network looks away where it has no use for it

Prompts are put into lower case and their outer spaces are taken off, as the captions were in training. diffusers can besides take addresses,
marks and the like out of captions (`clean_caption`): that is for captions from the web, and is not done here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._parts import check_settings, moved, read_settings, table, texts, write_settings
from sfumato.predict.conditioners._t5 import CLASS, T5Encoder, read_t5
from sfumato.types import Conditioning, Picture

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Positions by the `_class_name` of model_index.json."""


READS = ({"text_encoder": CLASS},)


@dataclass(frozen=True)
class T5TextConfig:
    """max_sequence_length: positions of a prompt, its end token among them.
    masked: whether padding is left out, in T5's attention and (by the mask) in the network's, as PixArt was trained.
    lower: whether prompts are put into lower case and stripped of outer spaces, as PixArt's captions were.
    long: "refuse" a prompt of more tokens, or "cut" it.
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
class T5Text:
    """encoder: T5 with its tokenizer. Every character is text: brackets weigh nothing here.

    `dataclasses.replace` changes the settings; the encoder is shared, not copied.
    """

    encoder: T5Encoder
    config: T5TextConfig = T5TextConfig()

    # ---- prompts -> Conditioning -------------------------------------------------------------------------------------------

    def __call__(
        self, prompts: Sequence[str | None], picture: Picture | None = None, prompts_2: Sequence[str | None] | None = None
    ) -> Conditioning:
        """Prompts -> Conditioning of float32: `tokens` (B, L, width); `mask` (B, L), True where a token counts, if the settings say so;
        `vector` (B, 3) of height, width and their quotient, if there is a picture.

        None is "". A row's numbers do not depend on the other prompts. `UserError` for what is not text, for a long prompt where the
        settings refuse those, and for `prompts_2`: there is no second encoder.
        """
        if prompts_2 is not None:
            raise UserError(f"{len(prompts_2)} prompts for a second text encoder: this model has one, put everything into the prompt")
        rows = [self._text(text) for text in texts(prompts)]
        read = {text: self._read(text) for text in dict.fromkeys(rows)}
        tokens = torch.stack([read[text][0] for text in rows])
        mask = torch.stack([read[text][1] for text in rows]) if self.config.masked else None
        return Conditioning(tokens, mask, None if picture is None else self._numbers(picture).expand(len(rows), -1))

    def null(self, count: int, picture: Picture | None = None) -> Conditioning:
        """The empty prompt, `count` times: what PixArt's guidance goes away from."""
        return self([None] * count, picture)

    def _text(self, prompt: str) -> str:
        return prompt.lower().strip() if self.config.lower else prompt

    def _read(self, text: str) -> tuple[Tensor, Tensor]:
        return self.encoder.encode(text, self.config.max_sequence_length, self.config.masked, self.config.long)

    def _numbers(self, picture: Picture) -> Tensor:
        height, width = picture.size
        return torch.tensor([[height, width, height / width]], dtype=torch.float32, device=self.device)

    # ---- what it is --------------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, T5Encoder]:
        """The one encoder, by the ending of its folder's name."""
        return {"": self.encoder}

    @property
    def width(self) -> int:
        """Channels of a token, the network's `caption_channels`."""
        return self.encoder.width

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.encoder.model.device

    def tensors(self) -> dict[str, Tensor]:
        """All weights, by name: "text_encoder.shared.weight", .... Not copies."""
        return {f"text_encoder.{key}": tensor for key, tensor in self.encoder.tensors().items()}

    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the weights, as JSON: settings, the encoder's config, the tokenizer's hash."""
        return {**self.to_config(), "text_encoder": self.encoder.identity()}

    def to(self, device: str | torch.device) -> "T5Text":
        """The same on a device; this one is left where it is."""
        return replace(self, encoder=replace(self.encoder, model=moved(self.encoder.model, device)))

    # ---- folders -----------------------------------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: the settings."""
        return {"_class_name": "t5_text", **asdict(self.config)}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        tokenizer = "T5TokenizerFast" if self.encoder.spiece is None else "T5Tokenizer"
        return {"tokenizer": ["transformers", tokenizer], "text_encoder": ["transformers", CLASS]}

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes tokenizer/ and text_encoder/ into a model's folder, as transformers and diffusers open them, and
        conditioner/config.json; not model_index.json (`index`)."""
        self.encoder.save(Path(folder) / "tokenizer", Path(folder) / "text_encoder", dtype)
        write_settings(Path(folder), self.to_config())

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = torch.float32, variant: str | None = None) -> "T5Text":
        """Opens text_encoder/ and tokenizer/ of a folder in diffusers' layout; weights become `dtype` (None: as stored). `UserError` for what does not fit.

        variant: the files of weights to prefer, such as "fp16". Settings come from conditioner/config.json where there is one, else the
        length is that of the pipeline which model_index.json names.
        """
        folder = Path(folder)
        pipeline = table(folder / "model_index.json").get("_class_name")
        told = {"max_sequence_length": LENGTHS[pipeline]} if pipeline in LENGTHS else {}
        encoder = read_t5(folder / "tokenizer", folder / "text_encoder", dtype, variant)
        return cls(encoder, read_settings(T5TextConfig, "t5_text", folder, told))
