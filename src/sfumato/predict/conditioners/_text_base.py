"""Conditioners with text encoders, and their settings.

A text becomes the hidden states of an encoder's positions (`tokens`) and a mask that is False on
padding.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor

from sfumato.config import read_config
from sfumato.errors import UserError, explained, unknown
from sfumato.io.atomic import read_table
from sfumato.predict.conditioners.base import CONFIG, Conditioner, Prompts
from sfumato.predict.text_encoders.base import Encoder, SequenceEncoder
from sfumato.types import Conditioning, ImageSpec
from sfumato.validate import whole_number

TRUNCATIONS = ("refuse", "cut")
_RENAMED = {"masked": "mask_padding", "long": "truncation"}
"""Settings in files of earlier versions, and today's names."""


# ---- settings ------------------------------------------------------------------------------------


class TextConfig:
    """Settings of a `TextConditioner`: each subclass is a frozen dataclass."""

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
            for name, value in asdict(cast(Any, self)).items()
        }


C = TypeVar("C", bound=TextConfig)


def check_settings(config: Any) -> None:
    """Raise `UserError` for impossible values of the settings that these conditioners share."""
    if config.truncation not in TRUNCATIONS:
        raise unknown("truncation", config.truncation, TRUNCATIONS)
    check_flag("mask_padding", config.mask_padding)
    whole_number("max_sequence_length", config.max_sequence_length, 2)


def check_flag(name: str, value: Any) -> None:
    """Raise `UserError` unless a setting is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: expected true or false")


def read_settings(
    cls: type[C], name: str, folder: Path, defaults: Mapping[str, Any], source: Path | None = None
) -> C:
    """The settings of a model's folder, from conditioner/config.json where there is one.

    Args:
        cls: The settings' class.
        name: The conditioner's name, which the file must have.
        folder: The model's folder.
        defaults: What follows from the folder's other files, for settings that the file does not
            have.
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
            f"{path} is of class {values.get('_class_name')!r}: expected {name}, as the folder has its text encoders"
        )
    with explained(path):
        return cls.from_dict({**defaults, **values})


# ---- conditioners --------------------------------------------------------------------------------


class TextConditioner(Conditioner):
    """A conditioner with text encoders.

    Each subclass is a frozen dataclass with fields encoder, encoder_2, ... and config. Brackets are
    text, but for `ClipText`. `dataclasses.replace` changes the settings; encoders are shared, not
    copied.

    Attributes:
        part: The encoders' folders, before their ending.
        config: The settings.
    """

    part: ClassVar[str] = "text_encoder"
    config: Any

    @property
    @abstractmethod
    def encoders(self) -> Mapping[str, Encoder]:
        """Text encoders by the ending of their folder's name: "", "_2", ...."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a token."""

    @property
    def masks_padding(self) -> bool:
        """True where the network does not attend to padded tokens."""
        return bool(getattr(self.config, "mask_padding", False))

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

    @abstractmethod
    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""

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


def prompt_pairs(prompts: Prompts, second: Prompts | None) -> list[tuple[str, str]]:
    """Checked prompts as texts, row by row: for the first encoder, and for the others.

    None and whitespace are ""; None in `second` is the first encoder's text.
    """
    texts = prompt_texts(prompts)
    if second is None:
        return list(zip(texts, texts, strict=True))
    others = zip(second, prompt_texts(second), strict=True)
    return [
        (text, text if prompt is None else other)
        for text, (prompt, other) in zip(texts, others, strict=True)
    ]


def prompt_texts(prompts: Prompts) -> list[str]:
    """Checked prompts as texts; None and whitespace are ""."""
    return [prompt if prompt and prompt.strip() else "" for prompt in prompts]


@dataclass(frozen=True, eq=False)
class SingleEncoderText(TextConditioner):
    """One text encoder whose hidden states are the tokens.

    Attributes:
        encoder: The text encoder.
        config: Settings, with max_sequence_length, mask_padding and truncation.
    """

    encoder: SequenceEncoder
    config: Any

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        for text in dict.fromkeys(self._texts(prompts)):
            self.encoder.check(text, self.config.max_sequence_length, self.config.truncation)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """`tokens` (B, L, width), and `mask` (B, L), False on padding, where the settings say so.

        `vector` (B, V) holds the image's size, where the network is conditioned on it.
        """
        texts, settings = self._texts(prompts), self.config
        states = {
            text: self.encoder.encode(
                text, settings.max_sequence_length, settings.mask_padding, settings.truncation
            )
            for text in dict.fromkeys(texts)
        }
        tokens = torch.stack([states[text][0] for text in texts])
        mask = torch.stack([states[text][1] for text in texts]) if settings.mask_padding else None
        vector = self._vector(image_spec)
        return Conditioning(tokens, mask, None if vector is None else vector.expand(len(texts), -1))

    def _texts(self, prompts: Prompts) -> list[str]:
        """Checked prompts as the encoder's input."""
        return prompt_texts(prompts)

    def _vector(self, image_spec: ImageSpec | None) -> Tensor | None:
        """The vector (1, V) beside the text; None: there is none."""
        return None

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The one encoder, by the ending of its folder's name."""
        return {"": self.encoder}

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.encoder.width
