"""Classes as one learned token: the conditioner of Latent Diffusion's ImageNet models (Rombach et
al. 2022, arXiv:2112.10752, section 4.3).

tokens = E[class], (B, 1, width). The last row of the table stands for no class, for guidance (Ho &
Salimans 2022, arXiv:2207.12598): ImageNet's 1001 are 1000 classes and that one. A table of exactly
1000 (the first of these models) has no such row.

    conditioner/config.json                           {"_class_name": "class_embedding",
                                                      "class_names": [...] or [], "unconditional":
                                                      true}
    conditioner/diffusion_pytorch_model.safetensors   embedding.weight (classes, width)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.config import read_config
from sfumato.errors import NumericalError, UserError, unknown
from sfumato.io.atomic import read_json, read_tensors, write_json, write_tensors
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.types import Conditioning, ImageSpec

KEY, WEIGHTS = "embedding.weight", "diffusion_pytorch_model.safetensors"
IMAGENET = 1000
"""Classes of ImageNet: a table of so many rows has none for "no class"."""


@dataclass(frozen=True)
class ClassEmbeddingConfig:
    """class_names: in the order of the rows, of all classes or of none (empty). unconditional:
    whether the last row stands for no class; None: unless there are 1000 rows.
    """

    class_names: tuple[str, ...] = ()
    unconditional: bool | None = None

    def __post_init__(self) -> None:
        if self.class_names:
            ClassNames(self.class_names)  # which refuses what are no names


@dataclass(frozen=True, eq=False)
class ClassEmbedding:
    """table: (rows, width). A class is asked for by its number, "207", or by its name where names
    are known.
    """

    table: Float[Tensor, "N D"]
    config: ClassEmbeddingConfig = ClassEmbeddingConfig()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"a table of {len(self.table)} classes: expected at least one besides that for none"
            )
        known = len(self.config.class_names)
        if known not in (0, self.count):
            raise UserError(
                f"{known} class names for {self.count} classes: expected one a class, or none at all"
            )

    @property
    def unconditional(self) -> bool:
        """Whether the last row stands for no class."""
        said = self.config.unconditional
        return len(self.table) != IMAGENET if said is None else said

    @property
    def count(self) -> int:
        """Classes, without that for none."""
        return len(self.table) - self.unconditional

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What to ask for: the names of the classes, or their numbers."""
        return self.config.class_names or tuple(map(str, range(self.count)))

    def label(self, prompt: str | None) -> int:
        """The row of a prompt, -1 for None or an empty one. `UserError` for a number that is too
        large, and for an unknown name.
        """
        if prompt is None or not prompt.strip():
            return -1
        if prompt not in self.config.class_names and re.fullmatch(r"\s*[+-]?[0-9]+\s*", prompt):
            if len(prompt.strip()) < 10 and 0 <= int(prompt) < self.count:
                return int(prompt)
            none = "; for no class leave the prompt empty" if self.unconditional else ""
            raise UserError(
                f"class number {prompt.strip()[:20]}: expected 0 to {self.count - 1}{none}"
            )
        if self.config.class_names:
            return ClassNames(self.config.class_names).label(prompt)
        if self.count <= 8:
            raise unknown("class", prompt, self.names)
        raise UserError(
            f"class {prompt[:80]!r}: expected a number from 0 to {self.count - 1}, this model does not know its classes' names"
        )

    def __call__(
        self, prompts: Sequence[str | None], picture: ImageSpec | None = None
    ) -> Conditioning:
        """Prompts -> Conditioning with `tokens` (B, 1, width), float32. The picture makes no
        difference.
        """
        if (
            isinstance(prompts, str)
            or not prompts
            or not all(p is None or isinstance(p, str) for p in prompts)
        ):
            raise UserError(
                f"prompts {prompts!r}: expected a list of at least one, each a class's number or name, or None"
            )
        return self.from_labels(torch.tensor([self.label(prompt) for prompt in prompts]))

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Labels (B,) int64 -> Conditioning; -1 is no class (`UserError` where the table has no row
        for that).
        """
        if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < self.count:
            raise UserError(
                f"labels from {int(labels.min())} to {int(labels.max())}: expected 0 to {self.count - 1}, or -1 for none"
            )
        if not self.unconditional and bool((labels < 0).any()):
            raise UserError(
                "this model has no row for no class: expected a class for every image, and guidance 1"
            )
        labels = labels.to(self.table.device)
        rows = torch.where(labels < 0, len(self.table) - 1, labels)
        return Conditioning(self.table[rows].float()[:, None])

    def null(self, count: int, picture: ImageSpec | None = None) -> Conditioning:
        """No class, `count` times."""
        return self.from_labels(torch.full((count,), -1))

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return self.table.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The table by its name, not a copy."""
        return {KEY: self.table}

    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the table, as JSON."""
        return self.to_config()

    def to(self, device: str | torch.device) -> "ClassEmbedding":
        """The same on a device; this one is left where it is."""
        try:
            return replace(self, table=self.table.to(device))
        except (RuntimeError, AssertionError) as error:
            # torch's words for a device that it does not know, or that is not there
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device {str(device)!r} cannot be used ({reason}): expected one such as cpu or cuda"
            ) from error

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json."""
        return {
            "_class_name": "class_embedding",
            "class_names": list(self.config.class_names),
            "unconditional": self.unconditional,
        }

    def index(self) -> dict[str, Any]:
        """Its entry of model_index.json."""
        return {"conditioner": ["sfumato", "class_embedding"]}

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes conditioner/ into a model's folder, the table in `dtype` (its own by default);
        `NumericalError` if it is not finite in it.
        """
        table = self.table if dtype is None else self.table.to(dtype)
        if not torch.isfinite(table).all():
            raise NumericalError(
                f"weight {KEY} is NaN or infinite in {table.dtype}: nothing was written"
            )
        (Path(folder) / "conditioner").mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "conditioner" / "config.json", self.to_config())
        write_tensors(Path(folder) / "conditioner" / WEIGHTS, {KEY: table})

    @classmethod
    def from_folder(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> "ClassEmbedding":
        """The inverse of `save`; the table becomes `dtype`. `UserError` for what is not such a
        folder.
        """
        folder = Path(folder) / "conditioner"
        values = read_json(folder / "config.json")
        if not isinstance(values, dict) or values.get("_class_name") != "class_embedding":
            raise UserError(
                f"{folder / 'config.json'} holds {str(values)[:80]}: expected an object of class class_embedding"
            )
        return cls.from_tensors(read_tensors(folder / WEIGHTS), values, dtype, folder)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], values: dict[str, Any], dtype: torch.dtype, where: object
    ) -> "ClassEmbedding":
        """From the table by its name and the fields of the config. where: what they were read from,
        for what is said about them.
        """
        table = tensors.get(KEY)
        if (
            tensors.keys() != {KEY}
            or table is None
            or table.ndim != 2
            or not table.is_floating_point()
        ):
            listed = ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items())
            raise UserError(
                f"{where} holds {listed[:200] or 'nothing'}: expected {KEY} alone, a table (classes, width)"
            )
        if not torch.isfinite(table).all():
            raise UserError(
                f"{where}: {KEY} has NaN or infinite numbers; the file is damaged or its training diverged"
            )
        names, last = values.get("class_names", []), values.get("unconditional")
        if (
            not isinstance(names, list)
            or not all(isinstance(n, str) for n in names)
            or not (last is None or isinstance(last, bool))
        ):
            raise UserError(
                f"{where}: class_names={str(names)[:80]}, unconditional={last!r}: expected a list of names, and true, false or null"
            )
        try:
            return cls(table.to(dtype).contiguous(), read_config(ClassEmbeddingConfig, values, {}))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
