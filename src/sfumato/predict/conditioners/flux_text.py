"""Text prompts for FLUX.1: CLIP and T5.

Black Forest Labs 2024, github.com/black-forest-labs/flux, src/flux/modules/conditioner.py and
util.py.

    tokens   the states of T5's encoder, 4096 wide: 512 positions, 256 for the model schnell
    vector   CLIP L's state of the end token after the final norm, 768 wide, which is added to the
             time embedding

Padding is attended to like words: so it was trained. CLIP takes 75 tokens of a prompt and leaves
the rest to T5, which is logged (level info).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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

SCHNELL = 256
"""T5's positions of schnell, the model without a guidance embedding."""
ENCODERS = ({"text_encoder": CLASSES[False], "text_encoder_2": CLASS},)


@dataclass(frozen=True)
class FluxTextConfig(SequenceTextConfig):
    """Settings of `FluxText`, T5's; FLUX.1 was trained with padding in its attention."""


@dataclass(frozen=True, eq=False)
class FluxText(TextConditioner):
    """Prompts through CLIP L and T5.

    Attributes:
        encoder: CLIP L without a projection.
        encoder_2: T5.
        config: The settings.
    """

    name = "flux_text"
    parts: ClassVar = {
        "": EncoderPart(partial(load_clip, projected=False), "CLIPTokenizer"),
        "_2": EncoderPart(load_t5, "T5TokenizerFast"),
    }

    encoder: ClipEncoder
    encoder_2: T5Encoder
    config: FluxTextConfig = FluxTextConfig()

    def __post_init__(self) -> None:
        if self.encoder.projected:
            raise UserError(
                "first text encoder of FLUX.1 with a projection: "
                "expected one of class CLIPTextModel"
            )

    def _check_row(self, first: str, others: str) -> None:
        self.encoder_2.check(others, self.config.max_sequence_length, self.config.truncation)

    def _encode_row(self, first: str, others: str) -> Encoded:
        pooled = self.encoder.encode_text(first, layer=1, norm=True)[1]
        return *encode_sequence(self.encoder_2, others, self.config), pooled

    @property
    def width(self) -> int:
        """Channels of a token, the network's `joint_attention_dim`."""
        return self.encoder_2.width

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`, the network's `pooled_projection_dim`."""
        return self.encoder.pooled_width

    @classmethod
    def _default_settings(cls, folder: Path, encoders: Mapping[str, Any]) -> Mapping[str, Any]:
        network = read_optional_json(folder / "transformer" / "config.json")
        guided = not network or network.get("guidance_embeds", False)
        return {} if guided else {"max_sequence_length": SCHNELL}
