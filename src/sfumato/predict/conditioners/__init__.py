"""Conditioners: prompts -> Conditioning, one file each.

A file is found by its name; its class is the name in CamelCase.

`base.py` has the class that all inherit. A file whose conditioner has text encoders has a table
ENCODERS: {name in model_index.json: class of the network}, a row for each combination. By it the
text encoders of a folder find their conditioner.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import UserError, explained
from sfumato.predict.conditioners._interpolate import (
    interpolate_conditioning as interpolate_conditioning,
)
from sfumato.predict.conditioners.base import Conditioner
from sfumato.registry import find, module_of, names

_PACKAGE = "predict.conditioners"
_RENAMED = {"nothing": "unconditional", "Nothing": "unconditional"}
"""Names in conditioner/config.json of earlier versions, and today's."""


def conditioner_class(name: str) -> type[Conditioner]:
    """The class of a conditioner's name, `_class_name` in conditioner/config.json.

    Raises:
        UserError: For an unknown name, with the known ones.
    """
    return find(_PACKAGE, _RENAMED.get(name, name))


def text_conditioner_class(
    encoders: Mapping[str, str], source: object, preferred: type[Conditioner] | None = None
) -> type[Conditioner]:
    """The class of the conditioner that has these text encoders.

    Args:
        encoders: {name in model_index.json: class of the network}, as `text_encoder_classes` gives
            it.
        source: Where they are from, for the message.
        preferred: The class to take if it has them; otherwise the first one by name that has them.

    Raises:
        UserError: For a combination that no conditioner has, with the known ones.
    """
    entries = [
        (row, file)
        for file in names(_PACKAGE)
        for row in getattr(module_of(_PACKAGE, file), "ENCODERS", ())
    ]
    classes = [find(_PACKAGE, file) for row, file in entries if row == encoders]
    if preferred is not None and preferred in classes:
        return preferred
    if classes:
        return classes[0]
    rows = dict.fromkeys(
        " and ".join(f"{part} {kind}" for part, kind in row.items()) for row, _ in entries
    )
    listed = " and ".join(f"{part} {kind}" for part, kind in sorted(encoders.items()))
    raise UserError(f"{source} has the text encoders {listed}: expected {'; or '.join(rows)}")


def text_encoder_classes(index: Mapping[str, Any], path: str | Path) -> dict[str, str]:
    """The text encoders of a model_index.json, {name: class}.

    Args:
        index: The content of model_index.json.
        path: The file, for messages.
    """
    with explained(path):
        return {
            key: str(value[1])
            for key, value in index.items()
            if key.startswith(("text_encoder", "bert")) and value != [None, None]
        }
