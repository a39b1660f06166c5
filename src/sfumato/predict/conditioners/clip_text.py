"""Text prompts through CLIP: Stable Diffusion 1 and 2, SDXL and its refiner.

Stable Diffusion has one encoder, SDXL two, its refiner the second alone.

    SD 1, SD 2   tokens: the last layer's states after the final norm (Rombach et al. 2022,
                 arXiv:2112.10752, section 3.3; SD 2's file holds one layer less, so that its last
                 is OpenCLIP's last but one)
    SDXL         tokens: the last but one layer's states of both encoders side by side, without
                 the norm; vector: the second's pooled text, then the image's sizes (Podell et al.
                 2023, arXiv:2307.01952, sections 2.1 and 2.2), which the network embeds itself

A prompt longer than the encoders' 77 positions is encoded in chunks (`_chunks.py`). BREAK ends a
chunk, which padding fills up; the next one begins behind it, so that two in a row leave a chunk of
padding, as in AUTOMATIC1111's web UI. "(word:1.3)" weighs words (`_prompt.py`) by one of five rules
(`_weigh.py`). The pooled vector is the first chunk's, unweighted.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sfumato.errors import UserError, quoted
from sfumato.predict.conditioners._chunks import cut
from sfumato.predict.conditioners._text_base import (
    Encoded,
    EncoderPart,
    TextConditioner,
    TextConfig,
    Texts,
    read_settings,
)
from sfumato.predict.conditioners._weigh import LERP, segments, weigh
from sfumato.predict.conditioners.base import CONFIG, PROMPT_WEIGHTS, Prompts
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
        weighting: The rule by which brackets weigh words, one of `PROMPT_WEIGHTS`: "lerp" (the rule
            of ComfyUI, [ ] and BREAK as in A1111), "comfyui", "a1111", "a1111_no_norm", or "none":
            every character is text, as in diffusers. Files hold true for "lerp", false for "none".
        truncation: "chunks" encodes a prompt of any length, "refuse" raises for one that does not
            fit; nothing is ever cut off.
        clip_skip: 1 takes the states one layer earlier than the model does by itself, and so on;
            for all prompts (diffusers leaves negative ones as they are).
        force_zeros_for_empty_prompt: True encodes no prompt (None) as zeros, as for SDXL, and not
            as "".
        requires_aesthetics_score: True ends the vector in the image's score (SDXL's refiner), and
            not in its target size.
    """

    weighting: str = "lerp"
    truncation: str = "chunks"
    clip_skip: int | None = None
    force_zeros_for_empty_prompt: bool = False
    requires_aesthetics_score: bool = False

    def __post_init__(self) -> None:
        one_of("truncation", self.truncation, TRUNCATIONS)
        one_of("weighting", self.weighting, PROMPT_WEIGHTS)
        for name in FLAGS:
            flag(name, getattr(self, name))
        if self.clip_skip is not None:
            whole_number("clip_skip", self.clip_skip, 0, unit="layers")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the fields of conditioner/config.json.

        Raises:
            UserError: For unknown fields and impossible values.
        """
        weighting = values.get("weighting")
        if isinstance(weighting, bool):
            values = {**values, "weighting": "lerp" if weighting else "none"}
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON; a model with the usual weighting keeps its file and its hash."""
        values = super().to_dict()
        values["weighting"] = {"lerp": True, "none": False}.get(self.weighting, self.weighting)
        return values


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
        without a mean, under the rule a1111.
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
        parts = [encoder.tokens(pieces) for pieces in segments(text, self.config.weighting)]
        count = sum(map(len, parts))
        if self.config.truncation == "refuse" and (count > room or len(parts) > 1):
            reason = "BREAK" if len(parts) > 1 else f"{count} tokens"
            raise UserError(
                f"prompt {quoted(text)} has {reason}: expected at most {room} tokens in one chunk; "
                "shorten it, or set truncation='chunks' (--truncation chunks)"
            )
        if len(parts) > 1 and not parts[-1]:  # BREAK at the end begins no chunk
            del parts[-1]
        return [chunk for part in parts for chunk in cut(part, room)]

    def _encode_chunks(
        self, encoder: ClipEncoder, chunks: Sequence[Sequence[Token]]
    ) -> tuple[Tensor, Tensor]:
        rule, two = self.config.weighting, self.encoder_2 is not None
        layer = (self.config.clip_skip or 0) + 1 + two
        encoded = [encoder.encode(chunk, layer=layer, norm=not two) for chunk in chunks]
        weighted = any(token.weight != 1 for chunk in chunks for token in chunk)
        empty = (
            encoder.encode([], layer=layer, norm=not two)[0] if weighted and rule in LERP else None
        )
        weighed = [
            weigh(states, chunk, rule, empty)
            for (states, _), chunk in zip(encoded, chunks, strict=True)
        ]
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
    def prompt_weights(self) -> str:
        """The rule for brackets in prompts."""
        return self.config.weighting

    def with_prompt_weights(self, rule: str | None) -> Self:
        """The same conditioner with another rule for brackets; None: unchanged.

        Raises:
            UserError: For an unknown rule.
        """
        if rule is None:
            return self
        one_of("rule of prompt weights", rule, PROMPT_WEIGHTS)
        return replace(self, config=replace(self.config, weighting=rule))

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
