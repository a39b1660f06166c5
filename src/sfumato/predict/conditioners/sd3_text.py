"""Text prompts for Stable Diffusion 3 and 3.5: two CLIPs and T5.

Esser et al. 2024, arXiv:2403.03206, section 4.

    tokens   [ CLIP L's states | CLIP G's states | zeros ]   77 rows: side by side, the last layer's
                                                             but one, without the final norm
             [ T5's states                               ]   256 rows below them; width: T5's, 4096
    vector   [ CLIP L's pooled text | CLIP G's ], 768 and 1280 wide, added to the time embedding

Padding is attended to like words: so it was trained. Each encoder was left out for almost half of
the training images, so that the model runs without T5, which is most of the memory: its states are
zeros then.

A CLIP takes 75 tokens of a prompt and leaves the rest to T5, which is logged (level info).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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
from sfumato.validate import positive_int

_CLIPS = {f"text_encoder{end}": CLASSES[True] for end in ("", "_2")}
ENCODERS = (_CLIPS, _CLIPS | {"text_encoder_3": CLASS})


@dataclass(frozen=True)
class Sd3TextConfig(TextConfig):
    """Settings of `Sd3Text`.

    Attributes:
        max_sequence_length: T5's positions of a prompt, its end token among them.
        mask_padding: Whether padding is masked, in T5's attention and (by a mask) in the network's;
            SD 3 was trained with padding in it.
        truncation: "refuse" a prompt of more tokens than T5 has positions, or "cut" it.
        joint_attention_dim: Channels of a token, T5's and the network's; None: T5's, which must be
            there then.
    """

    max_sequence_length: int = 256
    mask_padding: bool = False
    truncation: str = "refuse"
    joint_attention_dim: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.joint_attention_dim is not None:
            positive_int("joint_attention_dim", self.joint_attention_dim)


@dataclass(frozen=True, eq=False)
class Sd3Text(TextConditioner):
    """Prompts through two CLIPs and T5, which `dataclasses.replace` can leave out.

    Attributes:
        encoder: CLIP L, with its projection.
        encoder_2: CLIP G, with its projection.
        encoder_3: T5; None needs `joint_attention_dim` in the settings.
        config: The settings.
    """

    name = "sd3_text"

    encoder: ClipEncoder
    encoder_2: ClipEncoder
    encoder_3: T5Encoder | None = None
    config: Sd3TextConfig = Sd3TextConfig()

    def __post_init__(self) -> None:
        if not (self.encoder.projected and self.encoder_2.projected):
            raise UserError(
                "text encoders of SD 3 without projection: expected two of class CLIPTextModelWithProjection"
            )
        if self.encoder.length != self.encoder_2.length:
            raise UserError(
                f"text encoders read {self.encoder.length} and {self.encoder_2.length} tokens: use parts of one model"
            )
        if self.config.joint_attention_dim is None and self.encoder_3 is None:
            raise UserError(
                "SD 3 without T5: expected the setting joint_attention_dim, the width of the network's tokens (4096 as published)"
            )
        if self.encoder_3 is not None and self.config.joint_attention_dim not in (
            None,
            self.encoder_3.width,
        ):
            raise UserError(
                f"joint_attention_dim={self.config.joint_attention_dim}, T5 is {self.encoder_3.width} wide: use parts of one model"
            )
        if self.width < self.encoder.width + self.encoder_2.width:
            raise UserError(
                f"tokens {self.width} wide, the CLIPs {self.encoder.width} and {self.encoder_2.width}: expected room for both side by side"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        if self.encoder_3 is None:
            return
        for text in dict.fromkeys(other for _, other in prompt_pairs(prompts, second)):
            self.encoder_3.check(text, self.config.max_sequence_length, self.config.truncation)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, 77 + max_sequence_length, width) and `vector` (B, V).

        `mask` (B, L) is there where the settings say so. `second` is for the second CLIP and T5
        (diffusers' prompt_2 and prompt_3 in one). The image makes no difference.
        """
        pairs = prompt_pairs(prompts, second)
        rows = {pair: self._encode_pair(*pair) for pair in dict.fromkeys(pairs)}
        tokens, mask, vector = (
            torch.stack(parts) for parts in zip(*(rows[pair] for pair in pairs), strict=True)
        )
        return Conditioning(tokens, mask if self.config.mask_padding else None, vector)

    def _encode_pair(self, first: str, others: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (L, D), mask (L,) and vector (V,) of a row."""
        states, pooled, mask = self.encoder.encode_text(first, layer=2, norm=False)
        states_2, pooled_2, mask_2 = self.encoder_2.encode_text(others, layer=2, norm=False)
        clip = torch.cat([states, states_2], 1)
        t5, mask_3 = self._encode_t5(others)
        tokens = torch.cat([pad(clip, (0, self.width - clip.shape[1])), t5])
        return tokens, torch.cat([mask | mask_2, mask_3]), torch.cat([pooled, pooled_2])

    def _encode_t5(self, text: str) -> tuple[Tensor, Tensor]:
        """T5's states and mask; without T5 zeros, which the mask hides."""
        config = self.config
        if self.encoder_3 is None:
            zeros = torch.zeros(config.max_sequence_length, self.width, device=self.device)
            return zeros, torch.zeros(
                config.max_sequence_length, dtype=torch.bool, device=self.device
            )
        return self.encoder_3.encode(
            text, config.max_sequence_length, config.mask_padding, config.truncation
        )

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, ClipEncoder | T5Encoder]:
        """The encoders by the ending of their folders' names: "", "_2" and, for T5, "_3"."""
        return {
            "": self.encoder,
            "_2": self.encoder_2,
            **({} if self.encoder_3 is None else {"_3": self.encoder_3}),
        }

    @property
    def width(self) -> int:
        """Channels of a token, the network's `joint_attention_dim`."""
        return self.config.joint_attention_dim or (
            0 if self.encoder_3 is None else self.encoder_3.width
        )

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`, the network's `pooled_projection_dim`."""
        return self.encoder.pooled_width + self.encoder_2.pooled_width

    # ---- folders ---------------------------------------------------------------------------------

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        clip: dict[str, Any] = {
            f"text_encoder{end}": ["transformers", CLASSES[True]] for end in ("", "_2")
        }
        clip |= {f"tokenizer{end}": ["transformers", "CLIPTokenizer"] for end in ("", "_2")}
        t5 = {
            "text_encoder_3": ["transformers", CLASS],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
        }
        return {**clip, **({name: [None, None] for name in t5} if self.encoder_3 is None else t5)}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "Sd3Text":
        """Open the encoders of a folder in diffusers' layout.

        T5 is left out where model_index.json leaves it out ([null, null]), or where there is
        neither an entry nor a folder; the width is then the network's (transformer/config.json).
        Settings come from conditioner/config.json where there is one.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        folder = Path(folder)
        index = read_optional_json(folder / "model_index.json")
        clips = [
            load_clip(
                folder / f"tokenizer{end}", folder / f"text_encoder{end}", True, dtype, variant
            )
            for end in ("", "_2")
        ]
        entry = index.get(
            "text_encoder_3", None if (folder / "text_encoder_3").is_dir() else [None, None]
        )
        t5 = (
            None
            if entry == [None, None]
            else load_t5(folder / "tokenizer_3", folder / "text_encoder_3", dtype, variant)
        )
        width = (
            read_optional_json(folder / "transformer" / "config.json").get("joint_attention_dim")
            if t5 is None
            else None
        )
        defaults = {} if width is None else {"joint_attention_dim": width}
        return cls(clips[0], clips[1], t5, read_settings(Sd3TextConfig, cls.name, folder, defaults))
