"""Text prompts for FLUX.1 (Black Forest Labs 2024, github.com/black-forest-labs/flux,
src/flux/modules/conditioner.py and util.py): CLIP and T5.

    tokens   the states of T5's encoder, 4096 wide: 512 positions, 256 for the model schnell
    vector   CLIP L's state of the end token after the final norm, 768 wide, which joins the time

Padding is attended to like words: so it was trained. CLIP reads 75 tokens of a prompt and leaves
the rest to T5; what it leaves is said in the log (level info).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._clip import CLASSES, ClipEncoder, read_encoder
from sfumato.predict.conditioners._parts import check_settings, pairs, read_settings, table
from sfumato.predict.conditioners._reading import TextReader
from sfumato.predict.conditioners._t5 import CLASS, T5Encoder, read_t5
from sfumato.types import Conditioning, ImageSpec

SCHNELL = 256
"""T5's positions of the model that is not told the strength of guidance: schnell."""


READS = ({"text_encoder": CLASSES[False], "text_encoder_2": CLASS},)


@dataclass(frozen=True)
class FluxTextConfig:
    """max_sequence_length: T5's positions of a prompt, its end token among them. masked: whether
    padding is left out, in T5's attention and (by a mask) in the network's; FLUX.1 was trained with
    padding in it. long: "refuse" a prompt of more tokens than T5 has positions, or "cut" it.
    """

    max_sequence_length: int = 512
    masked: bool = False
    long: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, eq=False)
class FluxText(TextReader):
    """encoder: CLIP L without a projection. encoder_2: T5. Every character is text: brackets weigh
    nothing here.

    `dataclasses.replace` changes the settings; the encoders are shared, not copied.
    """

    encoder: ClipEncoder
    encoder_2: T5Encoder
    config: FluxTextConfig = FluxTextConfig()

    NAME: ClassVar[str] = "flux_text"

    def __post_init__(self) -> None:
        if self.encoder.projected:
            raise UserError(
                "first text encoder of FLUX.1 with a projection: expected one of class CLIPTextModel"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[str | None],
        picture: ImageSpec | None = None,
        prompts_2: Sequence[str | None] | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning of float32: `tokens` (B, L, width), `vector` (B, V); `mask` (B,
        L) if the settings say so. The picture makes no difference.

        None is "". A row's numbers do not depend on the other prompts. prompts_2: what T5 reads
        instead; None there is the same prompt. `UserError` for what is not text, and for a long
        prompt where the settings refuse those.
        """
        rows = pairs(prompts, prompts_2, len(self.encoders))
        pooled = {
            text: self.encoder.read(text, layer=1, norm=True)[1]
            for text in dict.fromkeys(first for first, _ in rows)
        }
        read = {text: self._t5(text) for text in dict.fromkeys(second for _, second in rows)}
        tokens, mask = (torch.stack([read[second][k] for _, second in rows]) for k in (0, 1))
        return Conditioning(
            tokens,
            mask if self.config.masked else None,
            torch.stack([pooled[first] for first, _ in rows]),
        )

    def _t5(self, text: str) -> tuple[Tensor, Tensor]:
        return self.encoder_2.encode(
            text, self.config.max_sequence_length, self.config.masked, self.config.long
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
        """Opens the encoders of a folder in diffusers' layout; weights become `dtype` (None: as
        stored). `UserError` for what does not fit.

        variant: the files of weights to prefer, such as "fp16". Settings come from
        conditioner/config.json where there is one, else T5 has `SCHNELL` positions for a network
        without `guidance_embeds` (transformer/config.json) and 512 for others.
        """
        folder = Path(folder)
        clip = read_encoder(folder / "tokenizer", folder / "text_encoder", False, dtype, variant)
        t5 = read_t5(folder / "tokenizer_2", folder / "text_encoder_2", dtype, variant)
        network = table(folder / "transformer" / "config.json")
        told = (
            {"max_sequence_length": SCHNELL}
            if network and not network.get("guidance_embeds", False)
            else {}
        )
        return cls(clip, t5, read_settings(FluxTextConfig, cls.NAME, folder, told))
