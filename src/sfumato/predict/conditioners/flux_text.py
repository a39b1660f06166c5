"""Text prompts for FLUX.1: CLIP and T5.

Black Forest Labs 2024, github.com/black-forest-labs/flux, src/flux/modules/conditioner.py and
util.py.

    tokens   the states of T5's encoder, 4096 wide: 512 positions, 256 for the model schnell
    vector   CLIP L's state of the end token after the final norm, 768 wide, which is added to the
             time embedding

Padding is attended to like words: so it was trained. CLIP takes 75 tokens of a prompt and leaves
the rest to T5, which is logged (level info).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    TextConditioner,
    TextConfig,
    check_settings,
    prompt_pairs,
    read_settings,
)
from sfumato.predict.conditioners.base import Prompts
from sfumato.predict.text_encoders.base import read_optional_json
from sfumato.predict.text_encoders.clip import CLASSES, ClipEncoder, load_clip
from sfumato.predict.text_encoders.t5 import CLASS, T5Encoder, load_t5
from sfumato.types import Conditioning, ImageSpec

SCHNELL = 256
"""T5's positions of schnell, the model without a guidance embedding."""
ENCODERS = ({"text_encoder": CLASSES[False], "text_encoder_2": CLASS},)


@dataclass(frozen=True)
class FluxTextConfig(TextConfig):
    """Settings of `FluxText`.

    Attributes:
        max_sequence_length: T5's positions of a prompt, its end token among them.
        mask_padding: Whether padding is masked, in T5's attention and (by a mask) in the network's;
            FLUX.1 was trained with padding in it.
        truncation: "refuse" a prompt of more tokens than T5 has positions, or "cut" it.
    """

    max_sequence_length: int = 512
    mask_padding: bool = False
    truncation: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, eq=False)
class FluxText(TextConditioner):
    """Prompts through CLIP L and T5.

    Attributes:
        encoder: CLIP L without a projection.
        encoder_2: T5.
        config: The settings.
    """

    name = "flux_text"

    encoder: ClipEncoder
    encoder_2: T5Encoder
    config: FluxTextConfig = FluxTextConfig()

    def __post_init__(self) -> None:
        if self.encoder.projected:
            raise UserError(
                "first text encoder of FLUX.1 with a projection: expected one of class CLIPTextModel"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        for text in dict.fromkeys(other for _, other in prompt_pairs(prompts, second)):
            self.encoder_2.check(text, self.config.max_sequence_length, self.config.truncation)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width), `vector` (B, V), and `mask` (B, L) where the settings say so.

        `second` is for T5. The image makes no difference.
        """
        pairs = prompt_pairs(prompts, second)
        pooled = {
            text: self.encoder.encode_text(text, layer=1, norm=True)[1]
            for text in dict.fromkeys(first for first, _ in pairs)
        }
        states = {
            text: self._encode_t5(text) for text in dict.fromkeys(other for _, other in pairs)
        }
        tokens, mask = (torch.stack([states[other][k] for _, other in pairs]) for k in (0, 1))
        return Conditioning(
            tokens,
            mask if self.config.mask_padding else None,
            torch.stack([pooled[first] for first, _ in pairs]),
        )

    def _encode_t5(self, text: str) -> tuple[Tensor, Tensor]:
        config = self.config
        return self.encoder_2.encode(
            text, config.max_sequence_length, config.mask_padding, config.truncation
        )

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, ClipEncoder | T5Encoder]:
        """The encoders by the ending of their folders' names: "" and "_2"."""
        return {"": self.encoder, "_2": self.encoder_2}

    @property
    def width(self) -> int:
        """Channels of a token, the network's `joint_attention_dim`."""
        return self.encoder_2.width

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`, the network's `pooled_projection_dim`."""
        return self.encoder.pooled_width

    # ---- folders ---------------------------------------------------------------------------------

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        clip = {
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "text_encoder": ["transformers", CLASSES[False]],
        }
        return {
            **clip,
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "text_encoder_2": ["transformers", CLASS],
        }

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "FluxText":
        """Open the encoders of a folder in diffusers' layout.

        Settings come from conditioner/config.json where there is one. Else T5 has `SCHNELL`
        positions for a network without `guidance_embeds` (transformer/config.json), and 512 for
        others.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        folder = Path(folder)
        clip = load_clip(folder / "tokenizer", folder / "text_encoder", False, dtype, variant)
        t5 = load_t5(folder / "tokenizer_2", folder / "text_encoder_2", dtype, variant)
        network = read_optional_json(folder / "transformer" / "config.json")
        defaults = (
            {"max_sequence_length": SCHNELL}
            if network and not network.get("guidance_embeds", False)
            else {}
        )
        return cls(clip, t5, read_settings(FluxTextConfig, cls.name, folder, defaults))
