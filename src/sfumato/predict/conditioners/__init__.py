"""Conditioners: prompts -> Conditioning. One file each, found by name; the class is the file's name
in CamelCase.

A conditioner has `__call__(prompts, picture=None) -> Conditioning`, `null(count, picture=None) ->
Conditioning`, `from_labels(labels) -> Conditioning` where the data have labels, and `to_config()`.
It comes back by `from_config(values)`; one with weights has `save(folder)` and
`from_folder(folder)` instead, `to(device)`, `tensors()`, `identity()` (all that decides its
answers, for hashing) and `index()` (its entries of model_index.json). One with several text
encoders takes `prompts_2` beside, what those after the first read.

A file whose conditioner has text encoders has a table READS: the parts that it reads, as {name in
model_index.json: class}, a row for each combination that there is. By it the encoders of a folder
find their conditioner.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import UserError, explained
from sfumato.registry import find, module_of, names

_PACKAGE = "predict.conditioners"


def reader_of(encoders: Mapping[str, str], where: object) -> Any:
    """The conditioner that reads by these encoders, {name in model_index.json: class}; `UserError`
    that lists the known ones if none does.
    """
    known = []
    for file in names(_PACKAGE):
        for row in getattr(module_of(_PACKAGE, file), "READS", ()):
            if row == encoders:
                return find(_PACKAGE, file)
            known.append(" and ".join(f"{part} {kind}" for part, kind in row.items()))
    found = " and ".join(f"{part} {kind}" for part, kind in sorted(encoders.items()))
    raise UserError(f"{where} reads prompts by {found}: expected {'; or '.join(known)}")


def text_encoders(parts: Mapping[str, Any], where: str | Path) -> dict[str, str]:
    """The text encoders of a model_index.json, {name: class}, as `reader_of` takes them. where: the
    file, for what is said about it.
    """
    with explained(where):
        return {
            key: str(value[1])
            for key, value in parts.items()
            if key.startswith(("text_encoder", "bert")) and value != [None, None]
        }
