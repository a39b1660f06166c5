"""Conditioner: prompts -> `Conditioning`.

It is the third part of a model, beside `Autoencoder` and `Network`. A conditioner checks prompts,
then encodes them:

    conditioner(...) = encode(...), after check(...)

`check` raises every `UserError` that the prompts would raise and uses no weight, so that a request
can be refused long before it is run.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.errors import UserError, explained, quoted
from sfumato.io.atomic import read_table, write_json
from sfumato.predict.text_encoders.base import Encoder
from sfumato.types import Conditioning, ImageSpec
from sfumato.validate import one_of

Prompts = Sequence[str | None]
"""One prompt an image; None is no prompt, the null condition of classifier-free guidance."""
CONFIG = Path("conditioner") / "config.json"
"""A conditioner's settings in a model's folder."""
PROMPT_WEIGHTS = ("lerp", "comfyui", "a1111", "a1111_no_norm", "none")
"""Rules by which brackets in a prompt weigh its words (`clip_text.py`)."""


class Conditioner(ABC):
    """Prompts -> `Conditioning`. Immutable; a subclass has at least `name` and `encode`.

    Attributes:
        name: `_class_name` of conditioner/config.json: the name of the file in
            `predict/conditioners`.
        batch_key: The entry of a training batch that conditions an example: its label, or its
            index.
    """

    name: ClassVar[str]
    batch_key: ClassVar[str] = "label"

    # ---- prompts -> Conditioning -----------------------------------------------------------------

    def __call__(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> Conditioning:
        """`check` the prompts and `encode` them.

        Args:
            prompts: One prompt a row, at least one. None is no prompt.
            image_spec: The image to draw, for models that are conditioned on its size.
            second: Prompts for the text encoders after the first; None there is the first's prompt.

        Returns:
            A `Conditioning` of len(prompts) rows in float32. A row does not depend on the others.

        Raises:
            UserError: For prompts that the model cannot take.
            NumericalError: For states beyond the range of a text encoder's dtype.
        """
        self.check(prompts, image_spec, second)
        return self.encode(prompts, image_spec, second)

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight.

        Arguments as in `__call__`.

        Raises:
            UserError: For anything but a list of texts, `second` prompts without a second text
                encoder or of another number, and by the subclass for unknown classes, wrong
                weights, texts that are too long and a missing `image_spec`.
        """
        _check_list(prompts)
        if second is None:
            return
        _check_list(second)
        count = len(self.encoders)
        if count < 2:
            raise UserError(
                f"{len(second)} prompts for a second text encoder: "
                f"this model has {'one' if count else 'none'}, put everything into the prompt"
            )
        if len(second) != len(prompts):
            raise UserError(
                f"{len(second)} prompts for a second text encoder, "
                f"{len(prompts)} for the first: expected as many"
            )
        for prompt, other in zip(prompts, second, strict=True):
            if prompt is None and other is not None:
                raise UserError(
                    f"no prompt but {quoted(other)} for the second text encoder: "
                    "expected both; '' is an empty prompt"
                )

    @abstractmethod
    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """Encode checked prompts; arguments and result as in `__call__`."""

    def null(self, count: int, image_spec: ImageSpec | None = None) -> Conditioning:
        """The null condition of classifier-free guidance: no prompt, `count` times."""
        return self([None] * count, image_spec)

    # ---- properties ------------------------------------------------------------------------------

    @property
    def is_conditional(self) -> bool:
        """False for the conditioner of unconditional models alone."""
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        """The prompts of a class-conditional model, in the order of its labels; else empty."""
        return ()

    @property
    def prompt_weights(self) -> str | None:
        """The rule of `PROMPT_WEIGHTS` for brackets in prompts; None: they cannot weigh words."""
        return None

    def with_prompt_weights(self, rule: str | None) -> Self:
        """The same conditioner with another rule for brackets in prompts.

        Args:
            rule: One of `PROMPT_WEIGHTS`; None: unchanged.

        Raises:
            UserError: For an unknown rule, and for any but "none" where brackets cannot weigh.
        """
        if rule not in (None, "none"):
            one_of("rule of prompt weights", rule, PROMPT_WEIGHTS)
            raise UserError(
                f"prompt_weights={rule!r}: this model cannot weigh the words of a prompt; "
                "expected 'none', so that brackets are text"
            )
        return self

    def unused_weight(self, prompts: Prompts) -> str | None:
        """The first text of these prompts that brackets weigh elsewhere, but not here.

        None: there is none, or brackets weigh here or are no texts at all (classes).
        """
        return None

    def foreign_notation(self, prompts: Prompts) -> str | None:
        """The first notation of other programs in these prompts that is text here.

        None: there is none, or the prompts are no texts (classes).
        """
        return None

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """Text encoders by the ending of their folder's name: "", "_2", ...; none for classes."""
        return {}

    @property
    def width(self) -> int | None:
        """Channels of `Conditioning.tokens`; None: it makes none."""
        return None

    @property
    def vector_width(self) -> int | None:
        """Numbers of `Conditioning.vector`; None: it makes none."""
        return None

    @property
    def masks_padding(self) -> bool:
        """True where the network does not attend to padded tokens."""
        return False

    def tensors(self) -> Mapping[str, Tensor]:
        """All weights by name, empty where there are none; not copies."""
        return {}

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the result, for hashing."""
        return self.to_config()

    def to(self, device: str | torch.device) -> Self:
        """The same conditioner with its weights on a device; this one stays where it is.

        Raises:
            UserError: For a device that cannot be used.
        """
        return self

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same conditioner with other settings, where they are not None.

        Args:
            settings: Setting -> value, such as clip_skip.

        Raises:
            UserError: For a setting that it does not have, or an impossible value.
        """
        for name, value in settings.items():
            if value is not None:
                raise UserError(
                    f"{name} {value}: the prompts of this model are read by {self.name}, "
                    "which has no such setting; leave it out"
                )
        return self

    def with_encoders(self, encoders: Mapping[str, Encoder]) -> Self:
        """The same conditioner with other text encoders; itself where there are none.

        Args:
            encoders: The others, by the keys of `encoders`.
        """
        return self

    # ---- folders ---------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: the name and the settings."""
        return {"_class_name": self.name}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json."""
        return {"conditioner": ["sfumato", self.name]}

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write everything but model_index.json into a model's folder.

        Args:
            folder: The model's folder.
            dtype: Of the stored weights; None keeps their own.

        Raises:
            NumericalError: For weights that are not finite in `dtype`.
        """
        path = Path(folder) / CONFIG
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_config())

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build it from the JSON of conditioner/config.json, where it has no weights.

        Raises:
            UserError: For values that do not fit, and for a conditioner with weights.
        """
        raise UserError(f"a {cls.__name__} has weights: open it with from_folder")

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> Self:
        """Open the conditioner of a model's folder.

        Args:
            folder: The model's folder, in diffusers' layout or as `save` wrote it.
            dtype: Of the weights; None leaves them as stored.
            variant: The files of weights to prefer, such as "fp16".

        Raises:
            UserError: For files that are missing or do not fit.
        """
        path = Path(folder) / CONFIG
        with explained(path):
            return cls.from_config(read_table(path))


class ClassConditioner(Conditioner):
    """A conditioner of classes: a prompt is the name or the number of one."""

    @abstractmethod
    def label(self, prompt: str | None) -> int:
        """The label of a prompt; a label for no class for None and an empty prompt.

        Raises:
            UserError: For an unknown class, with near matches, and for an ambiguous one.
        """

    @abstractmethod
    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels (B,) int64 -> `Conditioning` of B rows; -1 is no class.

        Raises:
            UserError: For labels out of range.
        """

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using a weight."""
        super().check(prompts, image_spec, second)
        for prompt in dict.fromkeys(prompts):
            self.label(prompt)

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        """The classes' rows; the image makes no difference."""
        return self.from_labels(torch.tensor([self.label(prompt) for prompt in prompts]))

    def null(self, count: int, image_spec: ImageSpec | None = None) -> Conditioning:
        """No class, `count` times."""
        return self.from_labels(torch.full((count,), -1))


def class_number(prompt: str, count: int, unconditional: bool = True) -> int | None:
    """The class whose number a prompt is; None for a prompt that is no number.

    Args:
        prompt: The prompt.
        count: Number of classes.
        unconditional: True mentions the empty prompt in the error.

    Raises:
        UserError: For a number of no class.
    """
    number = prompt.strip()
    if not re.fullmatch(r"[+-]?[0-9]+", number):
        return None
    if len(number) < 10 and 0 <= int(number) < count:
        return int(number)
    hint = "; for no class leave the prompt empty" if unconditional else ""
    raise UserError(f"class number {number[:20]}: expected 0 to {count - 1}{hint}")


def _check_list(prompts: Prompts) -> None:
    """Raise `UserError` for anything but a list of texts."""
    texts = not isinstance(prompts, str) and all(isinstance(p, str | None) for p in prompts)
    if not texts or not prompts:
        raise UserError(
            f"prompts {prompts!r}: expected a list of at least one, each a text or None"
        )
