"""Text prompts for Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206, section 4): two
CLIPs and T5.

    tokens   [ CLIP L's states | CLIP G's states | zeros ]   77 rows: side by side, the last layer's
             but one, without the final norm [ T5's states                               ]   256
             rows below them; width: T5's, 4096
    vector   [ CLIP L's pooled text | CLIP G's ], 768 and 1280 wide, which joins the time

Padding is attended to like words: so it was trained. Each encoder was left out for almost half of
the training pictures, so that the model runs without T5, which is most of the memory: its states
are zeros then.

A CLIP reads 75 tokens of a prompt and leaves the rest to T5; what it leaves is said in the log
(level info).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sfumato.errors import UserError
from sfumato.predict.conditioners._clip import CLASSES, ClipEncoder, read_encoder
from sfumato.predict.conditioners._parts import (
    check_settings,
    pairs,
    read_settings,
    require_count,
    table,
)
from sfumato.predict.conditioners._reading import TextReader
from sfumato.predict.conditioners._t5 import CLASS, T5Encoder, read_t5
from sfumato.types import Conditioning, ImageSpec

Row = tuple[Tensor, Tensor, Tensor]
"""What a prompt becomes: tokens (L, D), mask (L,), vector (V,)."""


_CLIPS = {f"text_encoder{end}": CLASSES[True] for end in ("", "_2")}
READS = (_CLIPS, _CLIPS | {"text_encoder_3": CLASS})


@dataclass(frozen=True)
class Sd3TextConfig:
    """max_sequence_length: T5's positions of a prompt, its end token among them. masked: whether
    padding is left out, in T5's attention and (by a mask) in the network's; SD 3 was trained with
    padding in it. long: "refuse" a prompt of more tokens than T5 has positions, or "cut" it.
    joint_attention_dim: the width of tokens, T5's and the network's; None: T5's, which must be
    there then.
    """

    max_sequence_length: int = 256
    masked: bool = False
    long: str = "refuse"
    joint_attention_dim: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.joint_attention_dim is not None:
            require_count("joint_attention_dim", self.joint_attention_dim)


@dataclass(frozen=True, eq=False)
class Sd3Text(TextReader):
    """encoder: CLIP L. encoder_2: CLIP G; both with their projections. encoder_3: T5, or None.
    Every character is text: brackets weigh nothing.

    `dataclasses.replace` changes the settings, or leaves T5 out (encoder_3=None, with
    joint_attention_dim told by the settings); the encoders are shared, not copied.
    """

    encoder: ClipEncoder
    encoder_2: ClipEncoder
    encoder_3: T5Encoder | None = None
    config: Sd3TextConfig = Sd3TextConfig()

    NAME: ClassVar[str] = "sd3_text"

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

    def __call__(
        self,
        prompts: Sequence[str | None],
        picture: ImageSpec | None = None,
        prompts_2: Sequence[str | None] | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning of float32: `tokens` (B, 77 + max_sequence_length, width),
        `vector` (B, V); `mask` (B, L) if the settings say so. The picture makes no difference.

        None is "". A row's numbers do not depend on the other prompts. prompts_2: what the second
        CLIP and T5 read instead (diffusers' prompt_2 and prompt_3 in one); None there is the same
        prompt. `UserError` for what is not text, and for a long prompt where the settings refuse
        those.
        """
        rows = pairs(prompts, prompts_2, len(self.encoders))
        read = {row: self._read(*row) for row in dict.fromkeys(rows)}
        tokens, mask, vector = (
            torch.stack(parts) for parts in zip(*(read[row] for row in rows), strict=True)
        )
        return Conditioning(tokens, mask if self.config.masked else None, vector)

    def _read(self, first: str, others: str) -> Row:
        one, pooled, words = self.encoder.read(first, layer=2, norm=False)
        two, pooled_2, words_2 = self.encoder_2.read(others, layer=2, norm=False)
        clip = torch.cat([one, two], 1)
        long, their_words = self._t5(others)
        tokens = torch.cat([pad(clip, (0, self.width - clip.shape[1])), long])
        return tokens, torch.cat([words | words_2, their_words]), torch.cat([pooled, pooled_2])

    def _t5(self, text: str) -> tuple[Tensor, Tensor]:
        """T5's rows, or zeros: with a mask, nobody looks at those."""
        length = self.config.max_sequence_length
        if self.encoder_3 is None:
            return torch.zeros(length, self.width, device=self.device), torch.zeros(
                length, dtype=torch.bool, device=self.device
            )
        return self.encoder_3.encode(text, length, self.config.masked, self.config.long)

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

    # ---- folders ---------------------------------------------------------------------------------

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        clip: dict[str, Any] = {
            f"text_encoder{end}": ["transformers", CLASSES[True]] for end in ("", "_2")
        }
        clip |= {f"tokenizer{end}": ["transformers", "CLIPTokenizer"] for end in ("", "_2")}
        there = self.encoder_3 is not None
        t5 = {
            "text_encoder_3": ["transformers", CLASS],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
        }
        return {**clip, **(t5 if there else {name: [None, None] for name in t5})}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "Sd3Text":
        """Opens the encoders of a folder in diffusers' layout; weights become `dtype` (None: as
        stored). `UserError` for what does not fit.

        variant: the files of weights to prefer, such as "fp16". T5 is left out where
        model_index.json leaves it out ([null, null]), or where there is neither an entry nor a
        folder; the width is then the network's (transformer/config.json). Settings come from
        conditioner/config.json where there is one.
        """
        folder = Path(folder)
        index = table(folder / "model_index.json")
        clips = [
            read_encoder(
                folder / f"tokenizer{end}", folder / f"text_encoder{end}", True, dtype, variant
            )
            for end in ("", "_2")
        ]
        named = index.get(
            "text_encoder_3", None if (folder / "text_encoder_3").is_dir() else [None, None]
        )
        t5 = (
            None
            if named == [None, None]
            else read_t5(folder / "tokenizer_3", folder / "text_encoder_3", dtype, variant)
        )
        wide = (
            table(folder / "transformer" / "config.json").get("joint_attention_dim")
            if t5 is None
            else None
        )
        settings = read_settings(
            Sd3TextConfig, cls.NAME, folder, {} if wide is None else {"joint_attention_dim": wide}
        )
        return cls(clips[0], clips[1], t5, settings)
