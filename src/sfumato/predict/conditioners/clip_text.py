"""Text prompts through CLIP: Stable Diffusion 1 and 2, SDXL and its refiner.

Stable Diffusion has one encoder, SDXL two, its refiner the second alone.

    SD 1, SD 2   tokens: the last layer's states after the final norm (Rombach et al. 2022,
                 arXiv:2112.10752, section 3.3; SD 2's file holds one layer less, so that its last
                 is OpenCLIP's last but one)
    SDXL         tokens: the last but one layer's states of both encoders side by side, without
                 the norm; vector: the second's pooled text, then the image's sizes (Podell et al.
                 2023, arXiv:2307.01952, sections 2.1 and 2.2), which the network embeds itself

A prompt longer than the encoders' 77 positions is encoded in chunks (`_chunks.py`), "(word:1.3)"
weighs words (`_prompt.py`): a weighted chunk's states are multiplied by their tokens' weights, then
all by one number that restores the chunk's mean (AUTOMATIC1111's way). The pooled vector is the
first chunk's, unweighted.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import UserError, quoted
from sfumato.predict.conditioners._chunks import cut
from sfumato.predict.conditioners._prompt import parse
from sfumato.predict.conditioners._text_base import (
    Encoded,
    EncoderPart,
    TextConditioner,
    TextConfig,
    Texts,
    read_settings,
)
from sfumato.predict.conditioners.base import CONFIG, Prompts
from sfumato.predict.text_encoders.base import read_optional_json
from sfumato.predict.text_encoders.clip import CLASSES, ClipEncoder, Token, load_clip
from sfumato.types import Conditioning, ImageSpec
from sfumato.validate import flag, one_of, whole_number

TRUNCATIONS = ("chunks", "refuse")
_ONE, _TWO = {"text_encoder": CLASSES[False]}, {"text_encoder_2": CLASSES[True]}
ENCODERS = (_ONE, _ONE | _TWO, _TWO)
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""The settings that diffusers keeps in model_index.json."""


@dataclass(frozen=True)
class ClipTextConfig(TextConfig):
    """Settings of `ClipText`.

    Attributes:
        weighting: True lets brackets weigh words, as most people who write prompts expect; off,
            every character is text, as in diffusers.
        truncation: "chunks" encodes a prompt of any length, "refuse" raises for one that does not
            fit; nothing is ever cut off.
        clip_skip: 1 takes the states one layer earlier than the model does by itself, and so on;
            for all prompts (diffusers leaves negative ones as they are).
        force_zeros_for_empty_prompt: True encodes no prompt (None) as zeros, as for SDXL, and not
            as "".
        requires_aesthetics_score: True ends the vector in the image's score (SDXL's refiner), and
            not in its target size.
    """

    weighting: bool = True
    truncation: str = "chunks"
    clip_skip: int | None = None
    force_zeros_for_empty_prompt: bool = False
    requires_aesthetics_score: bool = False

    def __post_init__(self) -> None:
        one_of("truncation", self.truncation, TRUNCATIONS)
        for name in ("weighting", *FLAGS):
            flag(name, getattr(self, name))
        if self.clip_skip is not None:
            whole_number("clip_skip", self.clip_skip, 0, unit="layers")


@dataclass(frozen=True, eq=False)
class ClipText(TextConditioner):
    """Prompts through one or two CLIPs, at least one of them.

    Attributes:
        encoder: Stable Diffusion's, or the first of SDXL's.
        encoder_2: SDXL's second, with its projection.
        config: The settings.
    """

    name = "clip_text"
    parts: ClassVar = {
        "": EncoderPart(partial(load_clip, projected=False), "CLIPTokenizer"),
        "_2": EncoderPart(partial(load_clip, projected=True), "CLIPTokenizer"),
    }

    encoder: ClipEncoder | None
    encoder_2: ClipEncoder | None = None
    config: ClipTextConfig = ClipTextConfig()

    def __post_init__(self) -> None:
        projected = [e is not None and e.projected for e in (self.encoder, self.encoder_2)]
        two, skip = self.encoder_2 is not None, self.config.clip_skip or 0
        if not self._all or projected != [False, two]:
            raise UserError(
                f"text encoders with projection: {projected}: "
                "expected one without, one with, or one of each in this order"
            )
        lengths = [str(encoder.length) for encoder in self._all]
        if len(set(lengths)) > 1:
            raise UserError(
                f"text encoders read {' and '.join(lengths)} tokens: use parts of one model"
            )
        if self.config.requires_aesthetics_score and not two:
            raise UserError(
                "requires_aesthetics_score=True without a second text encoder: "
                "expected false, nothing would read the score"
            )
        most = min(e.num_layers for e in self._all) - two
        if skip > most:
            raise UserError(
                f"clip_skip={skip}: expected at most {most}, "
                "the text encoder has no more layers to skip"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight.

        One error depends on the states and is raised by `encode` alone: weights that leave a chunk
        without a mean (`weigh`).
        """
        super().check(prompts, image_spec, second)
        if self.encoder_2 is not None and image_spec is None:
            raise UserError(
                "this model is conditioned on the size of the image: "
                "expected image_spec=ImageSpec(height, width) beside the prompts"
            )

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width); `vector` (B, V) where there is a second encoder.

        `mask` (B, L) is there where some prompts have more chunks than others, whose rows end in
        masked zeros. No prompt is "" or zeros: see `force_zeros_for_empty_prompt`.
        """
        conditioning = super().encode(prompts, image_spec, second)
        if conditioning.vector is None:
            return conditioning
        assert image_spec is not None, "checked"
        pooled = conditioning.vector
        sizes = torch.tensor(self._sizes(image_spec), device=pooled.device)
        return replace(
            conditioning, vector=torch.cat([pooled, sizes.expand(len(pooled), -1)], dim=1)
        )

    def _rows(self, prompts: Prompts, second: Prompts | None) -> Sequence[Texts]:
        """None stays, and in `second` it is the first encoder's text."""
        return list(zip(prompts, second or [None] * len(prompts), strict=True))

    def _check_row(self, first: str | None, others: str | None) -> None:
        self._chunks(first, others)

    def _encode_row(self, first: str | None, others: str | None) -> Encoded:
        """A prompt's states, chunk after chunk, and its pooled vector if there are two encoders."""
        if first is None and self.config.force_zeros_for_empty_prompt:
            tokens = torch.zeros(self._all[0].length, self.width, device=self.device)
            width = 0 if self.encoder_2 is None else self.encoder_2.pooled_width
            pooled = torch.zeros(width, device=self.device)
        else:
            chunks = self._chunks(first, others)
            most = max(map(len, chunks))  # equal, but for tokenizers that split words differently
            encoded = [
                self._encode_chunks(e, c + [[]] * (most - len(c)))
                for e, c in zip(self._all, chunks, strict=True)
            ]
            tokens, pooled = torch.cat([states for states, _ in encoded], 1), encoded[-1][1]
        mask = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        return tokens, mask, None if self.encoder_2 is None else pooled

    def _chunks(self, prompt: str | None, second: str | None) -> list[list[list[Token]]]:
        """The chunks of each encoder; `UserError` for wrong weights and a text that is refused."""
        texts = (prompt or "", second if second is not None else prompt or "")
        return [
            self._tokenize(encoder, text) for encoder, text in zip(self._all, texts, strict=False)
        ]

    def _tokenize(self, encoder: ClipEncoder, text: str) -> list[list[Token]]:
        room = encoder.length - 2
        tokens = encoder.tokens(parse(text) if self.config.weighting else [(text, 1.0)])
        if len(tokens) > room and self.config.truncation == "refuse":
            raise UserError(
                f"prompt {quoted(text)} has {len(tokens)} tokens: expected at most {room}; "
                "shorten it, or set truncation='chunks'"
            )
        return cut(tokens, room)

    def _encode_chunks(
        self, encoder: ClipEncoder, chunks: Sequence[Sequence[Token]]
    ) -> tuple[Tensor, Tensor]:
        skip, two = self.config.clip_skip or 0, self.encoder_2 is not None
        encoded = [encoder.encode(chunk, layer=skip + 1 + two, norm=not two) for chunk in chunks]
        weighed = [weigh(states, chunk) for (states, _), chunk in zip(encoded, chunks, strict=True)]
        return torch.cat(weighed), encoded[0][1]

    def _sizes(self, image: ImageSpec) -> list[float]:
        """SDXL's micro-conditioning.

        Original height and width, crop top and left, target height and width. The refiner has the
        score alone in place of the target.
        """
        last = (
            (image.aesthetic_score,)
            if self.config.requires_aesthetics_score
            else image.target_size or image.size
        )
        return [float(v) for v in (*(image.original_size or image.size), *image.crop, *last)]

    # ---- properties ------------------------------------------------------------------------------

    @property
    def _all(self) -> list[ClipEncoder]:
        return [encoder for encoder in (self.encoder, self.encoder_2) if encoder is not None]

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return sum(e.width for e in self._all)

    @property
    def vector_width(self) -> int | None:
        """Numbers of `Conditioning.vector`, pooled text and sizes; None with one encoder alone."""
        if self.encoder_2 is None:
            return None
        return self.encoder_2.pooled_width + (5 if self.config.requires_aesthetics_score else 6)

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, as "text_encoder_2." and the network's own names; not copies.

        Names are not those of files (`ClipEncoder.tensors`), because a model's hash is over these.
        """
        return {
            f"text_encoder{end}.{key}": tensor
            for end, e in self.encoders.items()
            for key, tensor in e.model.state_dict().items()
        }

    # ---- folders ---------------------------------------------------------------------------------

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        entries = super().index()
        if self.encoder_2 is None:
            return {name: entry for name, entry in entries.items() if not name.endswith("_2")}
        return entries | {name: getattr(self.config, name) for name in FLAGS}

    @classmethod
    def _parts_of(cls, folder: Path) -> Collection[str]:
        """Those of model_index.json and those with a folder."""
        index = read_optional_json(folder / "model_index.json")
        listed = {name for name, value in index.items() if value != [None, None]}
        present = {name for name in listed if name.startswith(cls.part)}
        present |= {path.name for path in folder.glob("text_encoder*") if path.is_dir()}
        if not present or present - {"text_encoder", "text_encoder_2"}:
            raise UserError(
                f"{folder} has {', '.join(sorted(present)) or 'no text encoder'}: "
                "expected text_encoder, text_encoder_2 or both"
            )
        return {name.removeprefix(cls.part) for name in present}

    @classmethod
    def _settings_of(cls, folder: Path, encoders: Mapping[str, Any]) -> ClipTextConfig:
        """Settings of conditioner/config.json and of model_index.json, which must agree."""
        index = read_optional_json(folder / "model_index.json")
        stored = {name: index[name] for name in FLAGS if name in index}
        # diffusers' defaults without an entry: zeros for SDXL's null prompt, no score
        defaults = dict(zip(FLAGS, (encoders["encoder_2"] is not None, False), strict=True))
        config = read_settings(
            ClipTextConfig, cls.name, folder, defaults | stored, folder / "model_index.json"
        )
        for name, value in stored.items():
            if getattr(config, name) != value:
                raise UserError(
                    f"{folder / CONFIG} has {name}={getattr(config, name)}, "
                    f"model_index.json {value!r}: expected the same in both"
                )
        return config


def weigh(states: Float[Tensor, "L D"], chunk: Sequence[Token]) -> Float[Tensor, "L D"]:
    """Multiply states by their tokens' weights and restore their mean.

    They are unchanged if all weigh 1.

    Args:
        states: The states of a chunk, in which begin, end and padding weigh 1.
        chunk: The chunk's tokens.

    Raises:
        UserError: For weights that leave no mean to scale.
    """
    if all(token.weight == 1 for token in chunk):
        return states
    weights = torch.ones(len(states), 1)
    weights[1 : len(chunk) + 1, 0] = torch.tensor([token.weight for token in chunk])
    weighted = states * weights.to(states.device)
    scale = states.mean() / weighted.mean()
    if not torch.isfinite(scale):
        raise UserError(
            f"weights {sorted({token.weight for token in chunk})} leave nothing of a prompt: "
            "expected some that are not 0"
        )
    return weighted * scale
