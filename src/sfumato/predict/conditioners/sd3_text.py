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

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sfumato.errors import UserError
from sfumato.predict.conditioners._text_base import (
    Encoded,
    EncoderPart,
    SequenceTextConfig,
    TextConditioner,
    encode_sequence,
)
from sfumato.predict.text_encoders.base import read_optional_json
from sfumato.predict.text_encoders.clip import CLASSES, ClipEncoder, load_clip
from sfumato.predict.text_encoders.t5 import CLASS, T5Encoder, load_t5
from sfumato.validate import positive_int

_CLIPS = {f"text_encoder{end}": CLASSES[True] for end in ("", "_2")}
ENCODERS = (_CLIPS, _CLIPS | {"text_encoder_3": CLASS})


@dataclass(frozen=True)
class Sd3TextConfig(SequenceTextConfig):
    """Settings of `Sd3Text`, T5's; SD 3 was trained with padding in its attention.

    Attributes:
        joint_attention_dim: Channels of a token, T5's and the network's; None: T5's, which must be
            there then.
    """

    max_sequence_length: int = 256
    joint_attention_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
    parts: ClassVar = {
        "": EncoderPart(partial(load_clip, projected=True), "CLIPTokenizer"),
        "_2": EncoderPart(partial(load_clip, projected=True), "CLIPTokenizer"),
        "_3": EncoderPart(load_t5, "T5TokenizerFast"),
    }

    encoder: ClipEncoder
    encoder_2: ClipEncoder
    encoder_3: T5Encoder | None = None
    config: Sd3TextConfig = Sd3TextConfig()

    def __post_init__(self) -> None:
        clip, clip_2, t5 = self.encoder, self.encoder_2, self.encoder_3
        width = self.config.joint_attention_dim
        if not (clip.projected and clip_2.projected):
            raise UserError(
                "text encoders of SD 3 without projection: "
                "expected two of class CLIPTextModelWithProjection"
            )
        if clip.length != clip_2.length:
            raise UserError(
                f"text encoders read {clip.length} and {clip_2.length} tokens: "
                "use parts of one model"
            )
        if width is None and t5 is None:
            raise UserError(
                "SD 3 without T5: expected the setting joint_attention_dim, "
                "the width of the network's tokens (4096 as published)"
            )
        if t5 is not None and width not in (None, t5.width):
            raise UserError(
                f"joint_attention_dim={width}, T5 is {t5.width} wide: use parts of one model"
            )
        if self.width < clip.width + clip_2.width:
            raise UserError(
                f"tokens {self.width} wide, the CLIPs {clip.width} and {clip_2.width}: "
                "expected room for both side by side"
            )

    def _check_row(self, first: str, others: str) -> None:
        if self.encoder_3 is not None:
            self.encoder_3.check(others, self.config.max_sequence_length, self.config.truncation)

    def _encode_row(self, first: str, others: str) -> Encoded:
        states, pooled, mask = self.encoder.encode_text(first, layer=2, norm=False)
        states_2, pooled_2, mask_2 = self.encoder_2.encode_text(others, layer=2, norm=False)
        clip = torch.cat([states, states_2], 1)
        t5, mask_3 = self._encode_t5(others)
        tokens = torch.cat([pad(clip, (0, self.width - clip.shape[1])), t5])
        return tokens, torch.cat([mask | mask_2, mask_3]), torch.cat([pooled, pooled_2])

    def _encode_t5(self, text: str) -> tuple[Tensor, Tensor]:
        """T5's states and mask; without T5 zeros, which the mask hides."""
        if self.encoder_3 is not None:
            return encode_sequence(self.encoder_3, text, self.config)
        zeros = torch.zeros(self.config.max_sequence_length, self.width, device=self.device)
        return zeros, torch.zeros(len(zeros), dtype=torch.bool, device=self.device)

    @property
    def width(self) -> int:
        """Channels of a token, the network's `joint_attention_dim`."""
        t5 = self.encoder_3
        return self.config.joint_attention_dim or (0 if t5 is None else t5.width)

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`, the network's `pooled_projection_dim`."""
        return self.encoder.pooled_width + self.encoder_2.pooled_width

    @classmethod
    def _parts_of(cls, folder: Path) -> Collection[str]:
        """All but T5 where model_index.json leaves it out, or where there is no trace of it."""
        default = None if (folder / "text_encoder_3").is_dir() else [None, None]
        entry = read_optional_json(folder / "model_index.json").get("text_encoder_3", default)
        return ("", "_2") if entry == [None, None] else cls.parts

    @classmethod
    def _default_settings(cls, folder: Path, encoders: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without T5 the width is the network's."""
        if encoders["encoder_3"] is not None:
            return {}
        network = read_optional_json(folder / "transformer" / "config.json")
        width = network.get("joint_attention_dim")
        return {} if width is None else {"joint_attention_dim": width}
