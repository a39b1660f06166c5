"""Captions as conditions of training, encoded once before the first step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.checkpoints.formats.folder import read_index
from sfumato.errors import UserError
from sfumato.io.atomic import hash_json, hash_tensors
from sfumato.predict.conditioners import text_conditioner_class, text_encoder_classes
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.sentence_text import SentenceText
from sfumato.types import Conditioning


@final
class Captions:
    """The conditionings of N captions by index; no text encoder runs in training.

    Positions that neither a caption nor the empty prompt uses are cut off, which changes no result:
    a mask hides them. A conditioner without a mask keeps all.

    Args:
        conditioner: The text conditioner. Brackets in captions are text, also where they weigh
            words of prompts.
        captions: One text an image, at least one.
        batch_size: Texts encoded at a time.

    Raises:
        UserError: For no captions.
    """

    batch_key: ClassVar[str] = "number"
    """The entry of a batch with the indices of its captions."""

    def __init__(self, conditioner: Conditioner, captions: Sequence[str], batch_size: int = 64):
        if not captions:
            raise UserError("no captions: expected one an image")
        texts = list(dict.fromkeys(["", *captions]))  # the empty prompt is row 0
        starts = range(0, len(texts), batch_size)
        # captions are data: "miku (vocaloid)" weighs nothing
        plain = conditioner.with_prompt_weights("none")
        parts = [plain(texts[start : start + batch_size]) for start in starts]
        self._table = _trimmed(Conditioning.cat(parts))
        row = {text: index for index, text in enumerate(texts)}
        self._rows = torch.tensor([row[text] for text in captions])
        self._identity = {
            "_class_name": "captions",
            "reader": conditioner.identity(),
            "weights": hash_tensors(conditioner.tensors()),
            "captions": hash_json(list(captions)),
        }

    def __len__(self) -> int:
        return len(self._rows)

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Indices of captions (B,) -> `Conditioning`."""
        return self._table[self._rows[labels]]

    def null(self, count: int) -> Conditioning:
        """The empty prompt, `count` times."""
        return self._table[torch.zeros(count, dtype=torch.int64)]

    def identity(self) -> dict[str, Any]:
        """JSON of everything that decides these conditionings."""
        return self._identity


def _trimmed(table: Conditioning) -> Conditioning:
    if table.tokens is None or table.mask is None:
        return table
    used = int(table.mask.any(0).nonzero().max()) + 1
    return replace(table, tokens=table.tokens[:, :used].clone(), mask=table.mask[:, :used].clone())


def open_text_conditioner(folder: str | Path) -> Conditioner:
    """Open the text conditioner of a folder.

    Args:
        folder: A model's, in diffusers' layout with a model_index.json, or a sentence encoder's
            own, with config.json, weights and tokenizer side by side.

    Raises:
        UserError: For another folder.
    """
    folder = Path(folder).expanduser()
    index = folder / "model_index.json"
    if index.exists():
        classes = text_encoder_classes(read_index(folder), index)
        return text_conditioner_class(classes, folder).from_folder(folder)
    if not (folder / "config.json").exists():
        raise UserError(
            f"text={folder}: expected a model's folder with text encoders, "
            "or a sentence encoder's, which has a config.json"
        )
    return SentenceText.from_encoder(folder)
