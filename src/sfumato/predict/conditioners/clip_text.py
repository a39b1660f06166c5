"""Text prompts through CLIP: Stable Diffusion 1 and 2 (one encoder), SDXL (two) and its refiner
(the second alone).

    SD 1, SD 2   tokens: the last layer's states after the final norm (Rombach et al. 2022,
                 arXiv:2112.10752, section 3.3; SD 2's file holds one layer less, so that its last
                 is OpenCLIP's last but one)
    SDXL         tokens: the last but one layer's states of both encoders side by side, without the
                 norm; vector: the second's pooled text, then the picture's numbers (Podell et al.
                 2023, arXiv:2307.01952, sections 2.1 and 2.2), which the network embeds itself

A prompt longer than the encoders' 77 positions is read in chunks (`_chunks.py`), "(word:1.3)"
weighs words (`_prompt.py`): a weighted chunk's states are multiplied by their tokens' weights, then
all by one number that restores the chunk's mean (AUTOMATIC1111's way). The pooled vector is the
first chunk's, unweighted.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import read_config
from sfumato.errors import UserError, explained, unknown
from sfumato.io.atomic import read_table, write_json
from sfumato.predict.conditioners._chunks import Token, cut
from sfumato.predict.conditioners._clip import CLASSES, ClipEncoder, read_encoder
from sfumato.predict.conditioners._prompt import parse, shown
from sfumato.types import Conditioning, ImageSpec

LONG = ("chunks", "refuse")
_ONE, _TWO = {"text_encoder": "CLIPTextModel"}, {"text_encoder_2": "CLIPTextModelWithProjection"}
READS = (_ONE, _ONE | _TWO, _TWO)
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""The settings that diffusers keeps in model_index.json."""


@dataclass(frozen=True)
class ClipTextConfig:
    """weighting: whether brackets weigh words, as most people who write prompts expect; off, every
    character is text, as in diffusers. long: "chunks" reads a prompt of any length, "refuse" wants
    one that fits; nothing is ever cut off. clip_skip: 1 takes the states one layer earlier than the
    model does by itself, and so on; for all prompts (diffusers leaves negative ones as they are).
    force_zeros_for_empty_prompt: no prompt (None) is zeros, as SDXL wants it, not the encoding of
    "". requires_aesthetics_score: the picture's numbers end in its score (SDXL's refiner), not in
    its target size.
    """

    weighting: bool = True
    long: str = "chunks"
    clip_skip: int | None = None
    force_zeros_for_empty_prompt: bool = False
    requires_aesthetics_score: bool = False

    def __post_init__(self) -> None:
        if self.long not in LONG:
            raise unknown("way with long prompts", self.long, LONG)
        for name in ("weighting", *FLAGS):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r}: expected true or false")
        if self.clip_skip is not None and (
            not isinstance(self.clip_skip, int)
            or isinstance(self.clip_skip, bool)
            or self.clip_skip < 0
        ):
            raise UserError(
                f"clip_skip={self.clip_skip!r}: expected a whole number of layers, 0 or more"
            )


@dataclass(frozen=True, eq=False)
class ClipText:
    """encoder: Stable Diffusion's, or the first of SDXL's. encoder_2: SDXL's second, with its
    projection. At least one of them.

    `dataclasses.replace` changes the settings; the encoders are shared, not copied.
    """

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
        most = min(e.layers for e in self._all) - (self.encoder_2 is not None)
        if (self.config.clip_skip or 0) > most:
            raise UserError(
                f"clip_skip={self.config.clip_skip}: expected at most {most}, the text encoder has no more layers to skip"
            )

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[str | None],
        picture: ImageSpec | None = None,
        prompts_2: Sequence[str | None] | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning of float32: `tokens` (B, L, width); `mask` (B, L), only where
        some prompts have more chunks than others; for SDXL also `vector` (B, V), which needs the
        `picture`.

        None is no prompt: "" or zeros, see the config. A row's numbers do not depend on the other
        prompts; shorter rows end in masked zeros. `UserError` for what is not text, a wrong weight,
        or a long prompt where the config refuses those. prompts_2: what the second encoder reads
        instead, where there are two; None there is the same prompt.
        """
        for given in (prompts, prompts if prompts_2 is None else prompts_2):
            if (
                isinstance(given, str)
                or not given
                or not all(p is None or isinstance(p, str) for p in given)
            ):
                raise UserError(
                    f"prompts {given!r}: expected a list of at least one, each a text or None"
                )
        pairs = (
            [(prompt, None) for prompt in prompts]
            if prompts_2 is None
            else self._pairs(prompts, prompts_2)
        )
        read = {pair: self._read(*pair) for pair in dict.fromkeys(pairs)}
        rows = [read[pair] for pair in pairs]
        lengths = torch.tensor([len(tokens) for tokens, _ in rows])
        # (B, L, D)
        tokens = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        mask = (
            None
            if len(set(lengths.tolist())) == 1
            else torch.arange(tokens.shape[1]) < lengths[:, None]
        )
        if self.encoder_2 is None:
            return Conditioning(tokens, None if mask is None else mask.to(tokens.device))
        pooled = torch.stack([pooled for _, pooled in rows if pooled is not None])
        numbers = torch.tensor(self._numbers(picture), device=tokens.device).expand(len(rows), -1)
        return Conditioning(
            tokens,
            None if mask is None else mask.to(tokens.device),
            torch.cat([pooled, numbers], 1),
        )

    def null(self, count: int, picture: ImageSpec | None = None) -> Conditioning:
        """No prompt, `count` times."""
        return self([None] * count, picture)

    def _pairs(
        self, prompts: Sequence[str | None], prompts_2: Sequence[str | None]
    ) -> list[tuple[str | None, str | None]]:
        """What each encoder reads, row by row. `UserError` where that cannot be."""
        if len(self._all) < 2 or len(prompts) != len(prompts_2):
            raise UserError(
                f"{len(prompts_2)} prompts for a second text encoder, {len(prompts)} for the first of {len(self._all)}: expected as many, for two"
            )
        for one, two in zip(prompts, prompts_2, strict=True):
            if one is None and two is not None:
                raise UserError(
                    f"no prompt but {shown(two)} for the second text encoder: expected both; '' is no words"
                )
        return list(zip(prompts, prompts_2, strict=True))

    def _read(
        self, prompt: str | None, second: str | None
    ) -> tuple[Float[Tensor, "L D"], Float[Tensor, " V"] | None]:
        """A prompt's states, chunk after chunk, and its pooled vector where there is a second
        encoder; which reads `second`, if that is given.
        """
        if prompt is None and self.config.force_zeros_for_empty_prompt:
            pooled = (
                None
                if self.encoder_2 is None
                else torch.zeros(self.encoder_2.pooled_width, device=self.device)
            )
            return torch.zeros(self._all[0].length, self.width, device=self.device), pooled
        texts = (prompt or "", second if second is not None else prompt or "")
        chunks = [
            self._chunks(encoder, text) for encoder, text in zip(self._all, texts, strict=False)
        ]
        most = max(map(len, chunks))  # equal, but for tokenizers that split words differently
        states, pooled = zip(
            *(
                self._encoded(e, c + [[]] * (most - len(c)))
                for e, c in zip(self._all, chunks, strict=True)
            ),
            strict=True,
        )
        return torch.cat(states, 1), pooled[-1]

    def _chunks(self, encoder: ClipEncoder, prompt: str) -> list[list[Token]]:
        room = encoder.length - 2
        tokens = encoder.tokens(parse(prompt) if self.config.weighting else [(prompt, 1.0)])
        if len(tokens) > room and self.config.long == "refuse":
            raise UserError(
                f"prompt {shown(prompt)} has {len(tokens)} tokens: expected at most {room}; shorten it, or set long='chunks'"
            )
        return cut(tokens, room)

    def _encoded(
        self, encoder: ClipEncoder, chunks: Sequence[Sequence[Token]]
    ) -> tuple[Tensor, Tensor | None]:
        skip, two = self.config.clip_skip or 0, self.encoder_2 is not None
        found = [encoder.encode(chunk, layer=skip + 1 + two, norm=not two) for chunk in chunks]
        return torch.cat(
            [weighed(states, chunk) for (states, _), chunk in zip(found, chunks, strict=True)]
        ), found[0][1]

    def _numbers(self, picture: ImageSpec | None) -> list[float]:
        """SDXL's micro-conditioning: original height and width, crop top and left, target height
        and width; or, last, the score alone.
        """
        if picture is None:
            raise UserError(
                "this model is told the size of the picture: expected picture=ImageSpec(height, width) beside the prompts"
            )
        last = (
            (picture.aesthetic_score,)
            if self.config.requires_aesthetics_score
            else picture.target_size or picture.size
        )
        return [float(v) for v in (*(picture.original_size or picture.size), *picture.crop, *last)]

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
    def device(self) -> torch.device:
        """Where the encoders are."""
        return self._all[0].model.device

    def tensors(self) -> dict[str, Tensor]:
        """All weights, by name: "text_encoder.embeddings...", "text_encoder_2....". Not copies."""
        return {
            f"text_encoder{end}.{key}": tensor
            for end, e in self.encoders.items()
            for key, tensor in e.model.state_dict().items()
        }

    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the weights, as JSON: settings, the encoders' configs,
        the tokenizers' hashes.
        """
        return {
            **self.to_config(),
            **{f"text_encoder{end}": e.identity() for end, e in self.encoders.items()},
        }

    def to(self, device: str | torch.device) -> "ClipText":
        """The same on a device; this one is left where it is."""
        try:
            moved = [
                None if e is None else replace(e, model=copy.deepcopy(e.model).to(device))
                for e in (self.encoder, self.encoder_2)
            ]
        except (RuntimeError, AssertionError) as error:
            # torch's words for a device that it does not know, or that is not there
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device {str(device)!r} cannot be used ({reason}): expected one such as cpu or cuda"
            ) from error
        return replace(self, encoder=moved[0], encoder_2=moved[1])

    # ---- folders ---------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: the settings."""
        return {"_class_name": "clip_text", **asdict(self.config)}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        parts: dict[str, Any] = {}
        for end in ("", "_2") if self.encoder_2 is not None else ("",):
            there = end in self.encoders
            parts[f"tokenizer{end}"] = ["transformers", "CLIPTokenizer"] if there else [None, None]
            parts[f"text_encoder{end}"] = (
                ["transformers", CLASSES[self.encoders[end].projected]] if there else [None, None]
            )
        return {
            **parts,
            **(
                {flag: getattr(self.config, flag) for flag in FLAGS}
                if self.encoder_2 is not None
                else {}
            ),
        }

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes tokenizer/, text_encoder/ and their _2 into a model's folder, as transformers and
        diffusers open them, and conditioner/config.json; not model_index.json (`index`).
        """
        for end, encoder in self.encoders.items():
            encoder.save(
                Path(folder) / f"tokenizer{end}", Path(folder) / f"text_encoder{end}", dtype
            )
        (Path(folder) / "conditioner").mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "conditioner" / "config.json", self.to_config())

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "ClipText":
        """Opens the encoders of a folder in diffusers' layout, as diffusers or `save` wrote it;
        weights become `dtype` (None: as stored).

        variant: the files of weights to prefer, such as "fp16".

        Settings come from conditioner/config.json where there is one, else from model_index.json.
        `UserError` for other kinds of encoders, for parts that do not fit each other, and where the
        two files disagree.
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
        read = [
            read_encoder(
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
        return cls(read[0], read[1], _settings(folder, index, two=read[1] is not None))


def weighed(states: Float[Tensor, "L D"], chunk: Sequence[Token]) -> Float[Tensor, "L D"]:
    """States times their tokens' weights (begin, end and padding have 1), scaled to the mean that
    they had; themselves if all weigh 1.
    """
    if all(token.weight == 1 for token in chunk):
        return states
    weights = torch.ones(len(states), 1)
    weights[1 : len(chunk) + 1, 0] = torch.tensor([token.weight for token in chunk])
    changed = states * weights.to(states.device)
    scale = states.mean() / changed.mean()
    if not torch.isfinite(scale):
        raise UserError(
            f"weights {sorted({token.weight for token in chunk})} leave nothing of a prompt: expected some that are not 0"
        )
    return changed * scale


def _settings(folder: Path, index: dict[str, Any], two: bool) -> ClipTextConfig:
    """The settings of a model's folder; `two`: whether it has SDXL's second encoder."""
    file = folder / "conditioner" / "config.json"
    # What diffusers takes where model_index.json is silent: zeros for SDXL's missing prompts, no
    # score.
    flags = dict(zip(FLAGS, (two, False), strict=True)) | {
        flag: index[flag] for flag in FLAGS if flag in index
    }
    if not file.exists():
        with explained(folder / "model_index.json"):
            return read_config(ClipTextConfig, flags, {})
    values = read_table(file)
    if values.get("_class_name") != "clip_text":
        raise UserError(
            f"{file} is of class {values.get('_class_name')!r}: expected clip_text, as the folder has text encoders"
        )
    with explained(file):
        config = read_config(ClipTextConfig, flags | values, {})
    for flag in FLAGS:
        if flag in index and getattr(config, flag) != index[flag]:
            raise UserError(
                f"{file} has {flag}={getattr(config, flag)}, model_index.json {index[flag]!r}: expected the same in both"
            )
    return config
