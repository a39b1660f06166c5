"""Conditioners with text encoders, and their settings.

A text becomes the hidden states of an encoder's positions (`tokens`) and a mask that is False on
padding.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfumato.config import read_config
from sfumato.errors import UserError, explained
from sfumato.io.atomic import read_table
from sfumato.predict.conditioners._prompt import foreign_notation, weighted_text
from sfumato.predict.conditioners.base import CONFIG, Conditioner, Prompts
from sfumato.predict.text_encoders.base import Encoder, SequenceEncoder
from sfumato.types import Conditioning, ImageSpec
from sfumato.validate import flag, one_of, whole_number

TRUNCATIONS = ("refuse", "cut")
_RENAMED = {"masked": "mask_padding", "long": "truncation"}
"""Settings in files of earlier versions, and today's names."""
Texts = tuple[str | None, str | None]
"""A row's text for the first encoder and for the others."""
Encoded = tuple[Tensor, Tensor, Tensor | None]
"""A row's tokens (L, D), mask (L,), False on padding, and vector (V,), where there is one."""


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    """Settings of a `TextConditioner`, none by themselves."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the fields of conditioner/config.json, by the names of earlier versions too.

        Raises:
            UserError: For unknown fields, impossible values, and a setting under both of its names.
        """
        for old, new in _RENAMED.items():
            if old in values and new in values:
                raise UserError(f"config fields {old} and {new} are one setting: give {new} alone")
        return read_config(
            cls, {_RENAMED.get(name, name): value for name, value in values.items()}, {}
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class SequenceTextConfig(TextConfig):
    """Settings of a conditioner whose encoder has a fixed number of positions.

    Attributes:
        max_sequence_length: Positions of a prompt, the special tokens among them.
        mask_padding: True masks padding in the encoder's attention, where it has such a mask, and
            (by `Conditioning.mask`) in the network's, as the model was trained.
        truncation: "refuse" a longer prompt, or "cut" it.
    """

    max_sequence_length: int = 512
    mask_padding: bool = False
    truncation: str = "refuse"

    def __post_init__(self) -> None:
        check_settings(self)


C = TypeVar("C", bound=TextConfig)


def check_settings(config: SequenceTextConfig) -> None:
    """Raise `UserError` for impossible values of the settings that these conditioners share."""
    one_of("truncation", config.truncation, TRUNCATIONS)
    flag("mask_padding", config.mask_padding)
    whole_number("max_sequence_length", config.max_sequence_length, 2)


def read_settings(
    cls: type[C], name: str, folder: Path, defaults: Mapping[str, Any], source: Path | None = None
) -> C:
    """The settings of a model's folder, from conditioner/config.json where there is one.

    Args:
        cls: The settings' class.
        name: The conditioner's name, which the file must have.
        folder: The model's folder.
        defaults: Settings that follow from the folder's other files, where this file has none.
        source: Where the defaults are from, for messages; None: the folder.

    Raises:
        UserError: For a file of another conditioner, unknown fields and impossible values.
    """
    path = folder / CONFIG
    if not path.exists():
        with explained(source or folder):
            return cls.from_dict(defaults)
    values = read_table(path)
    if values.get("_class_name") != name:
        raise UserError(
            f"{path} is of class {values.get('_class_name')!r}: "
            f"expected {name}, as the folder has its text encoders"
        )
    with explained(path):
        return cls.from_dict({**defaults, **values})


# ---- conditioners --------------------------------------------------------------------------------


class EncoderPart(NamedTuple):
    """A text encoder of a model's folder.

    Attributes:
        load: (tokenizer's folder, encoder's folder, dtype=, variant=) -> the encoder.
        tokenizer: The tokenizer's class in model_index.json; empty where `index` is overridden.
    """

    load: Callable[..., Encoder]
    tokenizer: str = ""


class TextConditioner(Conditioner):
    """A conditioner with text encoders.

    Each subclass is a frozen dataclass with fields encoder, encoder_2, ... and config, and has
    `_encode_row`. Brackets are text, but for `ClipText`. `dataclasses.replace` changes settings
    and encoders, which are shared, not copied.

    Attributes:
        parts: The text encoders by the ending of their folders' names: "", "_2", ....
        part: The encoders' folders, before their ending.
        config: The settings.
    """

    parts: ClassVar[Mapping[str, EncoderPart]] = {}
    part: ClassVar[str] = "text_encoder"
    config: TextConfig = TextConfig()

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        for row in dict.fromkeys(self._rows(prompts, second)):
            self._check_row(*row)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """Encode each different row once: `tokens` (B, L, D), `mask` (B, L) and `vector` (B, V).

        `mask` is there where the settings mask padding, and where some rows are longer: the others
        end in masked zeros then. The image makes no difference.
        """
        rows = self._rows(prompts, second)
        encoded = {row: self._encode_row(*row) for row in dict.fromkeys(rows)}
        tokens, masks, vectors = zip(*(encoded[row] for row in rows), strict=True)
        masked = self.masks_padding or len(set(map(len, tokens))) > 1
        return Conditioning(
            pad_sequence(list(tokens), batch_first=True),
            pad_sequence(list(masks), batch_first=True) if masked else None,
            None if vectors[0] is None else torch.stack(vectors),
        )

    def _rows(self, prompts: Prompts, second: Prompts | None) -> Sequence[Texts]:
        """Checked prompts as texts, row by row: for the first encoder, and for the others."""
        return prompt_pairs(prompts, second)

    def _check_row(self, first: Any, others: Any) -> None:
        """Raise `UserError` for a row's texts that `_encode_row` refuses."""

    def _encode_row(self, first: Any, others: Any) -> Encoded:
        """Encode a row's texts; for subclasses that leave `encode` as it is."""
        raise NotImplementedError

    def unused_weight(self, prompts: Prompts) -> str | None:
        """The first text of these prompts that brackets weigh elsewhere, but not here."""
        if self.prompt_weights is not None:
            return None
        return next((text for text in map(weighted_text, filter(None, prompts)) if text), None)

    def foreign_notation(self, prompts: Prompts) -> str | None:
        """The first notation of other programs in these prompts: <lora:name:1>, AND, {a|b} ..."""
        return next((text for text in map(foreign_notation, filter(None, prompts)) if text), None)

    # ---- properties ------------------------------------------------------------------------------

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """Text encoders by the ending of their folder's name: "", "_2", ...."""
        encoders = {end: getattr(self, f"encoder{end}") for end in self.parts}
        return {end: encoder for end, encoder in encoders.items() if encoder is not None}

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a token."""

    @property
    def masks_padding(self) -> bool:
        """True where the network does not attend to padded tokens."""
        return isinstance(self.config, SequenceTextConfig) and self.config.mask_padding

    @property
    def device(self) -> torch.device:
        """The device of the encoders."""
        return next(iter(self.encoders.values())).model.device

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, as "text_encoder_2." and the encoder's own names; not copies."""
        return {
            f"{self.part}{end}.{key}": tensor
            for end, e in self.encoders.items()
            for key, tensor in e.tensors().items()
        }

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the result, for hashing.

        Settings have the names of earlier versions, so that a model keeps its hash.
        """
        earlier = {new: old for old, new in _RENAMED.items()}
        settings = {earlier.get(name, name): value for name, value in self.to_config().items()}
        return {
            **settings,
            **{f"{self.part}{end}": e.identity() for end, e in self.encoders.items()},
        }

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same conditioner with other settings, where they are not None."""
        changes = {name: value for name, value in settings.items() if value is not None}
        names = {f.name for f in fields(self.config)}
        super().with_settings({k: v for k, v in changes.items() if k not in names})
        if not changes:
            return self
        return replace(cast(Any, self), config=replace(cast(Any, self.config), **changes))

    def with_encoders(self, encoders: Mapping[str, Encoder]) -> Self:
        """The same conditioner with other text encoders, by the keys of `encoders`."""
        return replace(
            cast(Any, self), **{f"encoder{end}": encoder for end, encoder in encoders.items()}
        )

    def to(self, device: str | torch.device) -> Self:
        """The same with its encoders on a device, where those that are there already are shared.

        Raises:
            UserError: For a device that cannot be used.
        """
        return self.with_encoders(
            {end: encoder.to(device) for end, encoder in self.encoders.items()}
        )

    # ---- folders ---------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: the name and the settings."""
        return {"_class_name": self.name, **self.config.to_dict()}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        entries: dict[str, Any] = {}
        for end, part in self.parts.items():
            encoder = self.encoders.get(end)
            names = (None, None) if encoder is None else (part.tokenizer, encoder.class_name)
            for folder, name in zip((f"tokenizer{end}", f"{self.part}{end}"), names, strict=True):
                entries[folder] = [None if name is None else "transformers", name]
        return entries

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folders of tokenizers and encoders, and conditioner/config.json.

        They are as transformers and diffusers open them; model_index.json is not written (`index`).

        Args:
            folder: The model's folder.
            dtype: Of the stored weights; None keeps their own.

        Raises:
            NumericalError: For weights that are not finite in `dtype`.
        """
        for end, encoder in self.encoders.items():
            encoder.save(
                Path(folder) / f"tokenizer{end}", Path(folder) / f"{self.part}{end}", dtype
            )
        super().save(folder, dtype)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> Self:
        """Open the tokenizers and encoders of a folder in diffusers' layout, and the settings.

        Settings come from conditioner/config.json where there is one, else from the folder's other
        files.

        Args:
            folder: The model's folder.
            dtype: Of the weights; None leaves them as stored and unread, to be streamed.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        folder = Path(folder)
        present = cls._parts_of(folder)
        encoders = {
            f"encoder{end}": part.load(
                folder / f"tokenizer{end}",
                folder / f"{cls.part}{end}",
                dtype=dtype,
                variant=variant,
            )
            if end in present
            else None
            for end, part in cls.parts.items()
        }
        return cast(Any, cls)(**encoders, config=cls._settings_of(folder, encoders))

    @classmethod
    def _parts_of(cls, folder: Path) -> Collection[str]:
        """The endings of the text encoders that a model's folder has."""
        return cls.parts

    @classmethod
    def _settings_of(cls, folder: Path, encoders: Mapping[str, Any]) -> TextConfig:
        """The settings of a model's folder.

        Args:
            folder: The model's folder.
            encoders: Its text encoders by the name of the field.
        """
        defaults = cls._default_settings(folder, encoders)
        return read_settings(type(cls.config), cls.name, folder, defaults)

    @classmethod
    def _default_settings(cls, folder: Path, encoders: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings that follow from the folder's other files; arguments as in `_settings_of`."""
        return {}


def prompt_pairs(prompts: Prompts, second: Prompts | None) -> list[tuple[str, str]]:
    """Checked prompts as texts, row by row: for the first encoder, and for the others.

    None and whitespace are ""; None in `second` is the first encoder's text.
    """
    second = [None] * len(prompts) if second is None else second
    rows = zip(prompt_texts(prompts), second, prompt_texts(second), strict=True)
    return [(text, text if prompt is None else other) for text, prompt, other in rows]


def prompt_texts(prompts: Prompts) -> list[str]:
    """Checked prompts as texts; None and whitespace are ""."""
    return [prompt if prompt and prompt.strip() else "" for prompt in prompts]


@dataclass(frozen=True, eq=False)
class SingleEncoderText(TextConditioner):
    """One text encoder whose hidden states are the tokens.

    Attributes:
        encoder: The text encoder.
        config: The settings.
    """

    encoder: SequenceEncoder
    config: SequenceTextConfig = SequenceTextConfig()

    def _check_row(self, first: str, others: str) -> None:
        """Raise `UserError` for a text that is too long."""
        self.encoder.check(first, self.config.max_sequence_length, self.config.truncation)

    def _encode_row(self, first: str, others: str) -> Encoded:
        """The encoder's states and mask; no vector."""
        return *encode_sequence(self.encoder, first, self.config), None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.encoder.width


def encode_sequence(
    encoder: SequenceEncoder, text: str, config: SequenceTextConfig
) -> tuple[Tensor, Tensor]:
    """Encode a text by the settings: states (L, D) in float32 and a mask (L,)."""
    return encoder.encode(text, config.max_sequence_length, config.mask_padding, config.truncation)
