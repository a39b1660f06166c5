"""Captions as conditions of training: a text encoder reads every different one once, before the
first step.
"""

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
    """What a conditioner makes of N captions, by the caption's number; nothing of the encoder runs
    in training.

    Positions that neither a caption nor the empty prompt uses are cut off, which changes no answer:
    a mask hides them. A conditioner without a mask keeps all.
    """

    batch_key: ClassVar[str] = "number"
    """The entry of a batch that names its captions."""

    def __init__(self, reader: Conditioner, captions: Sequence[str], batch_size: int = 64):
        if not captions:
            raise UserError("no captions: expected one a picture")
        kinds = list(dict.fromkeys(["", *captions]))  # the empty prompt is row 0
        parts = [
            reader(kinds[start : start + batch_size]) for start in range(0, len(kinds), batch_size)
        ]
        self._table = _trimmed(Conditioning.cat(parts))
        number = {text: row for row, text in enumerate(kinds)}
        self._rows = torch.tensor([number[text] for text in captions])
        said = {
            "reader": reader.identity(),
            "weights": hash_tensors(reader.tensors()),
            "captions": hash_json(list(captions)),
        }
        self._identity = {"_class_name": "captions", **said}

    def __len__(self) -> int:
        return len(self._rows)

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Numbers of captions (B,) -> Conditioning."""
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


def open_reader(folder: str | Path) -> Conditioner:
    """The text conditioner of a folder: a model's (diffusers' layout: what its `model_index.json`
    names), or a sentence encoder's own, with config.json, weights and tokenizer side by side.
    `UserError` for another.
    """
    folder = Path(folder).expanduser()
    if (folder / "model_index.json").exists():
        return text_conditioner_class(
            text_encoder_classes(read_index(folder), folder / "model_index.json"), folder
        ).from_folder(folder)
    if not (folder / "config.json").exists():
        raise UserError(
            f"text={folder}: expected a model's folder with text encoders, or a sentence encoder's, which has a config.json"
        )
    return SentenceText.from_encoder(folder)
