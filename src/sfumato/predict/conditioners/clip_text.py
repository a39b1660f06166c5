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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import UserError, quoted, unknown
from sfumato.io.atomic import read_table
from sfumato.predict.conditioners._chunks import cut
from sfumato.predict.conditioners._prompt import parse
from sfumato.predict.conditioners._text_base import (
    TextConditioner,
    TextConfig,
    check_flag,
    read_settings,
)
from sfumato.predict.conditioners.base import CONFIG, Prompts
from sfumato.predict.text_encoders.clip import CLASSES, ClipEncoder, Token, load_clip
from sfumato.types import Conditioning, ImageSpec

TRUNCATIONS = ("chunks", "refuse")
_ONE, _TWO = {"text_encoder": CLASSES[False]}, {"text_encoder_2": CLASSES[True]}
ENCODERS = (_ONE, _ONE | _TWO, _TWO)
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""The settings that diffusers keeps in model_index.json."""


@dataclass(frozen=True)
class ClipTextConfig(TextConfig):
    """Settings of `ClipText`.

    Attributes:
        weighting: Whether brackets weigh words, as most people who write prompts expect; off, every
            character is text, as in diffusers.
        truncation: "chunks" encodes a prompt of any length, "refuse" raises for one that does not
            fit; nothing is ever cut off.
        clip_skip: 1 takes the states one layer earlier than the model does by itself, and so on;
            for all prompts (diffusers leaves negative ones as they are).
        force_zeros_for_empty_prompt: Whether no prompt (None) is zeros, as for SDXL, and not the
            encoding of "".
        requires_aesthetics_score: Whether the vector ends in the image's score (SDXL's refiner),
            and not in its target size.
    """

    weighting: bool = True
    truncation: str = "chunks"
    clip_skip: int | None = None
    force_zeros_for_empty_prompt: bool = False
    requires_aesthetics_score: bool = False

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise unknown("truncation", self.truncation, TRUNCATIONS)
        for name in ("weighting", *FLAGS):
            check_flag(name, getattr(self, name))
        if self.clip_skip is not None and (
            not isinstance(self.clip_skip, int)
            or isinstance(self.clip_skip, bool)
            or self.clip_skip < 0
        ):
            raise UserError(
                f"clip_skip={self.clip_skip!r}: expected a whole number of layers, 0 or more"
            )


@dataclass(frozen=True, eq=False)
class ClipText(TextConditioner):
    """Prompts through one or two CLIPs, at least one of them.

    Attributes:
        encoder: Stable Diffusion's, or the first of SDXL's.
        encoder_2: SDXL's second, with its projection.
        config: The settings.
    """

    name = "clip_text"

    encoder: ClipEncoder | None
    encoder_2: ClipEncoder | None = None
    config: ClipTextConfig = ClipTextConfig()

    def __post_init__(self) -> None:
        projected = [e is not None and e.projected for e in (self.encoder, self.encoder_2)]
        if not self.encoders or projected != [False, self.encoder_2 is not None]:
            raise UserError(
                f"text encoders with projection: {projected}: expected one without, one with, or one of each in this order"
            )
        if len({e.length for e in self._all}) > 1:
            raise UserError(
                f"text encoders read {' and '.join(str(e.length) for e in self._all)} tokens: use parts of one model"
            )
        if self.config.requires_aesthetics_score and self.encoder_2 is None:
            raise UserError(
                "requires_aesthetics_score=True without a second text encoder: expected false, nothing would read the score"
            )
        most = min(e.num_layers for e in self._all) - (self.encoder_2 is not None)
        if (self.config.clip_skip or 0) > most:
            raise UserError(
                f"clip_skip={self.config.clip_skip}: expected at most {most}, the text encoder has no more layers to skip"
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
                "this model is conditioned on the size of the image: expected image_spec=ImageSpec(height, width) beside the prompts"
            )
        for prompt, other in dict.fromkeys(_pairs(prompts, second)):
            self._chunks(prompt, other)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width); `vector` (B, V) where there is a second encoder.

        `mask` (B, L) is there where some prompts have more chunks than others, whose rows end in
        masked zeros. No prompt is "" or zeros: see `force_zeros_for_empty_prompt`.
        """
        pairs = _pairs(prompts, second)
        states = {pair: self._encode_pair(*pair) for pair in dict.fromkeys(pairs)}
        rows = [states[pair] for pair in pairs]
        lengths = torch.tensor([len(tokens) for tokens, _ in rows])
        # (B, L, D)
        tokens = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        mask = (
            None
            if len(set(lengths.tolist())) == 1
            else torch.arange(tokens.shape[1]) < lengths[:, None]
        )
        mask = None if mask is None else mask.to(tokens.device)
        if self.encoder_2 is None:
            return Conditioning(tokens, mask)
        assert image_spec is not None, "checked"
        pooled = torch.stack([pooled for _, pooled in rows if pooled is not None])
        sizes = torch.tensor(self._sizes(image_spec), device=tokens.device).expand(len(rows), -1)
        return Conditioning(tokens, mask, torch.cat([pooled, sizes], 1))

    def _encode_pair(
        self, prompt: str | None, second: str | None
    ) -> tuple[Float[Tensor, "L D"], Float[Tensor, " V"] | None]:
        """A prompt's states, chunk after chunk, and its pooled vector.

        The vector is None without a second encoder.

        second: The text of the second encoder; None is the prompt.
        """
        if prompt is None and self.config.force_zeros_for_empty_prompt:
            pooled = (
                None
                if self.encoder_2 is None
                else torch.zeros(self.encoder_2.pooled_width, device=self.device)
            )
            return torch.zeros(self._all[0].length, self.width, device=self.device), pooled
        chunks = self._chunks(prompt, second)
        most = max(map(len, chunks))  # equal, but for tokenizers that split words differently
        states, pooled = zip(
            *(
                self._encode_chunks(e, c + [[]] * (most - len(c)))
                for e, c in zip(self._all, chunks, strict=True)
            ),
            strict=True,
        )
        return torch.cat(states, 1), pooled[-1]

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
                f"prompt {quoted(text)} has {len(tokens)} tokens: expected at most {room}; shorten it, or set truncation='chunks'"
            )
        return cut(tokens, room)

    def _encode_chunks(
        self, encoder: ClipEncoder, chunks: Sequence[Sequence[Token]]
    ) -> tuple[Tensor, Tensor | None]:
        skip, two = self.config.clip_skip or 0, self.encoder_2 is not None
        encoded = [encoder.encode(chunk, layer=skip + 1 + two, norm=not two) for chunk in chunks]
        return torch.cat(
            [weigh(states, chunk) for (states, _), chunk in zip(encoded, chunks, strict=True)]
        ), encoded[0][1]

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

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, ClipEncoder]:
        """The encoders by the ending of their folders' names: "" and "_2"."""
        return {end: e for end, e in (("", self.encoder), ("_2", self.encoder_2)) if e is not None}

    @property
    def _all(self) -> list[ClipEncoder]:
        return list(self.encoders.values())

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return sum(e.width for e in self._all)

    @property
    def vector_width(self) -> int | None:
        """Numbers of `Conditioning.vector`, pooled text and sizes; None with one encoder alone."""
        return (
            None
            if self.encoder_2 is None
            else self.encoder_2.pooled_width + (5 if self.config.requires_aesthetics_score else 6)
        )

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
        parts: dict[str, Any] = {}
        for end in ("", "_2") if self.encoder_2 is not None else ("",):
            encoder = self.encoders.get(end)
            parts[f"tokenizer{end}"] = (
                [None, None] if encoder is None else ["transformers", "CLIPTokenizer"]
            )
            parts[f"text_encoder{end}"] = (
                [None, None] if encoder is None else ["transformers", encoder.class_name]
            )
        return {
            **parts,
            **(
                {flag: getattr(self.config, flag) for flag in FLAGS}
                if self.encoder_2 is not None
                else {}
            ),
        }

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "ClipText":
        """Open the encoders of a folder in diffusers' layout, as diffusers or `save` wrote it.

        Settings come from conditioner/config.json where there is one, else from model_index.json.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For other kinds of encoders, for parts that do not fit each other, and where
                the two files disagree.
        """
        folder = Path(folder)
        index = (
            read_table(folder / "model_index.json")
            if (folder / "model_index.json").exists()
            else {}
        )
        named = {
            name
            for name, value in index.items()
            if name.startswith("text_encoder") and value != [None, None]
        }
        there = named | {path.name for path in folder.glob("text_encoder*") if path.is_dir()}
        if not there or there - {"text_encoder", "text_encoder_2"}:
            raise UserError(
                f"{folder} has {', '.join(sorted(there)) or 'no text encoder'}: expected text_encoder, text_encoder_2 or both"
            )
        encoders = [
            load_clip(
                folder / f"tokenizer{end}",
                folder / f"text_encoder{end}",
                end == "_2",
                dtype,
                variant,
            )
            if f"text_encoder{end}" in there
            else None
            for end in ("", "_2")
        ]
        return cls(encoders[0], encoders[1], _settings(folder, index, two=encoders[1] is not None))


def _pairs(prompts: Prompts, second: Prompts | None) -> list[tuple[str | None, str | None]]:
    """Checked prompts, row by row: for the first encoder, and for the second (None: the same)."""
    return list(zip(prompts, [None] * len(prompts) if second is None else second, strict=True))


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
            f"weights {sorted({token.weight for token in chunk})} leave nothing of a prompt: expected some that are not 0"
        )
    return weighted * scale


def _settings(folder: Path, index: dict[str, Any], two: bool) -> ClipTextConfig:
    """The settings of a model's folder.

    Args:
        folder: The folder.
        index: Its model_index.json.
        two: Whether it has SDXL's second encoder.
    """
    # diffusers' defaults where model_index.json has none: zeros for SDXL's null prompt, no score
    flags = dict(zip(FLAGS, (two, False), strict=True)) | {
        flag: index[flag] for flag in FLAGS if flag in index
    }
    config = read_settings(
        ClipTextConfig, ClipText.name, folder, flags, folder / "model_index.json"
    )
    for flag in FLAGS:
        if flag in index and getattr(config, flag) != index[flag]:
            raise UserError(
                f"{folder / CONFIG} has {flag}={getattr(config, flag)}, model_index.json {index[flag]!r}: expected the same in both"
            )
    return config
