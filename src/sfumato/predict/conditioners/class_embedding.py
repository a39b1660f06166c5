"""Classes as one learned token: the conditioner of Latent Diffusion's ImageNet models.

tokens = E[class], (B, 1, width) (Rombach et al. 2022, arXiv:2112.10752, section 4.3). The last row
of the table is no class, for guidance (Ho & Salimans 2022, arXiv:2207.12598): ImageNet's 1001 are
1000 classes and that one. A table of exactly 1000 (the first of these models) has no such row.

    conditioner/config.json                           {"_class_name": "class_embedding",
                                                       "class_names": [...] or [], "unconditional":
                                                       true}
    conditioner/diffusion_pytorch_model.safetensors   embedding.weight (classes, width)
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.config import read_config
from sfumato.errors import NumericalError, UserError, explained, unknown, usable_device
from sfumato.io.atomic import read_json, read_tensors, write_tensors
from sfumato.predict.conditioners.base import CONFIG, ClassConditioner, Prompts, class_number
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.types import Conditioning, ImageSpec

KEY, WEIGHTS = "embedding.weight", "diffusion_pytorch_model.safetensors"
IMAGENET = 1000
"""Classes of ImageNet: a table of so many rows has no row for no class."""


@dataclass(frozen=True)
class ClassEmbeddingConfig:
    """Settings of `ClassEmbedding`.

    Attributes:
        class_names: Of all classes, in the order of the rows; empty where they have none.
        unconditional: True for a last row that is no class; None: unless there are 1000 rows.
    """

    class_names: tuple[str, ...] = ()
    unconditional: bool | None = None

    def __post_init__(self) -> None:
        if self.class_names:
            ClassNames(self.class_names)  # whose constructor checks them


@dataclass(frozen=True, eq=False)
class ClassEmbedding(ClassConditioner):
    """Classes as rows of a table.

    A prompt is a number, "207", or a name where the classes have names.

    Attributes:
        table: The embedding, (rows, width).
        config: The settings.
    """

    name = "class_embedding"

    table: Float[Tensor, "N D"]
    config: ClassEmbeddingConfig = ClassEmbeddingConfig()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"a table of {len(self.table)} classes: expected at least one besides that for none"
            )
        named = len(self.config.class_names)
        if named not in (0, self.count):
            raise UserError(
                f"{named} class names for {self.count} classes: "
                "expected one a class, or none at all"
            )

    @property
    def unconditional(self) -> bool:
        """True where the last row is no class."""
        setting = self.config.unconditional
        return len(self.table) != IMAGENET if setting is None else setting

    @property
    def count(self) -> int:
        """Number of classes, without the row for none."""
        return len(self.table) - self.unconditional

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The names of the classes, or their numbers."""
        return self.config.class_names or tuple(map(str, range(self.count)))

    def label(self, prompt: str | None) -> int:
        """The row of a prompt's class; -1 for None and an empty prompt.

        Raises:
            UserError: For a number that is too large and for an unknown name.
        """
        if prompt is None or not prompt.strip():
            return -1
        if prompt in self.config.class_names:
            return self.config.class_names.index(prompt)
        number = class_number(prompt, self.count, self.unconditional)
        if number is not None:
            return number
        if self.config.class_names:
            return ClassNames(self.config.class_names).label(prompt)
        if self.count <= 8:
            raise unknown("class", prompt, self.class_names)
        raise UserError(
            f"class {prompt[:80]!r}: expected a number from 0 to {self.count - 1}, "
            "this model has no names for its classes"
        )

    def check(
        self, prompts: Prompts, image_spec: ImageSpec | None = None, second: Prompts | None = None
    ) -> None:
        """Raise every `UserError` that these prompts would raise, without using the table."""
        super().check(prompts, image_spec, second)
        self._check_none(any(self.label(prompt) < 0 for prompt in prompts))

    def _check_none(self, none: bool) -> None:
        """Raise `UserError` for no class, where the table has no row for that."""
        if none and not self.unconditional:
            raise UserError(
                "this model has no row for no class: "
                "expected a class for every image, and guidance 1"
            )

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels (B,) int64 -> `Conditioning` with `tokens` (B, 1, width), float32.

        -1 is no class.

        Raises:
            UserError: For labels out of range, and -1 where the table has no row for no class.
        """
        if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < self.count:
            raise UserError(
                f"labels from {int(labels.min())} to {int(labels.max())}: "
                f"expected 0 to {self.count - 1}, or -1 for none"
            )
        self._check_none(bool((labels < 0).any()))
        labels = labels.to(self.table.device)
        rows = torch.where(labels < 0, len(self.table) - 1, labels)
        return Conditioning(self.table[rows].float()[:, None])

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return self.table.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The table by its name, not a copy."""
        return {KEY: self.table}

    def to(self, device: str | torch.device) -> "ClassEmbedding":
        """The same with its table on a device; `UserError` for a device that cannot be used."""
        with usable_device(device):
            return replace(self, table=self.table.to(device))

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {
            "_class_name": self.name,
            "class_names": list(self.config.class_names),
            "unconditional": self.unconditional,
        }

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write conditioner/ into a model's folder.

        Args:
            folder: The model's folder.
            dtype: Of the stored table; None keeps its own.

        Raises:
            NumericalError: For a table that is not finite in `dtype`; nothing is written then.
        """
        table = self.table if dtype is None else self.table.to(dtype)
        if not torch.isfinite(table).all():
            raise NumericalError(
                f"weight {KEY} is NaN or infinite in {table.dtype}: nothing was written"
            )
        super().save(folder, dtype)
        write_tensors((Path(folder) / CONFIG).with_name(WEIGHTS), {KEY: table})

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "ClassEmbedding":
        """The inverse of `save`.

        Arguments as in `Conditioner.from_folder`; there are no variants.
        """
        path = Path(folder) / CONFIG
        values = read_json(path)
        if not isinstance(values, dict) or values.get("_class_name") != cls.name:
            raise UserError(
                f"{path} holds {str(values)[:80]}: expected an object of class {cls.name}"
            )
        return cls.from_tensors(read_tensors(path.with_name(WEIGHTS)), values, dtype, path.parent)

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        dtype: torch.dtype | None,
        source: object,
    ) -> "ClassEmbedding":
        """Build it from a table and a config.

        Args:
            tensors: {KEY: the table}.
            values: Fields of conditioner/config.json.
            dtype: Of the table; None leaves it as stored.
            source: Where they are from, for messages.

        Raises:
            UserError: For other tensors, a table that is not finite, and values of another kind.
        """
        table = tensors[KEY] if tensors.keys() == {KEY} else torch.empty(0)
        if table.ndim != 2 or not table.is_floating_point():
            listed = ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items())
            raise UserError(
                f"{source} holds {listed[:200] or 'nothing'}: "
                f"expected {KEY} alone, a table (classes, width)"
            )
        if not torch.isfinite(table).all():
            raise UserError(
                f"{source}: {KEY} has NaN or infinite numbers; "
                "the file is damaged or its training diverged"
            )
        names, flag = values.get("class_names", []), values.get("unconditional")
        texts = isinstance(names, list) and all(isinstance(n, str) for n in names)
        if not texts or not isinstance(flag, bool | None):
            raise UserError(
                f"{source}: class_names={str(names)[:80]}, unconditional={flag!r}: "
                "expected a list of names, and true, false or null"
            )
        with explained(str(source)):
            config = read_config(ClassEmbeddingConfig, values, {})
            return cls(table.to(dtype or table.dtype).contiguous(), config)
