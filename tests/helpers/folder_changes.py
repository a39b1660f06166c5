"""Changes to a model's folder, with which tests make it wrong.

Each function returns a `Change`, to be applied to a copy of the folder. `part` is the folder of the
text encoder; "" stands for the model's folder itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


def table(file: str, **values: Any) -> Change:
    """Set fields of a JSON file, which is made if there is none; `...` removes a field."""

    def change(folder: Path) -> None:
        path = folder / file
        fields = (json.loads(path.read_text()) if path.exists() else {}) | values
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({key: value for key, value in fields.items() if value is not ...})
        )

    return change


def text(file: str, content: str) -> Change:
    """Replace the text of a file."""
    return lambda folder: (folder / file).write_text(content)


def gone(name: str) -> Change:
    """Remove a file or a folder."""
    return lambda folder: (
        (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)
    )


def weights(edit: Callable[[dict[str, Tensor]], Any], part: str = "text_encoder") -> Change:
    """Edit the dict of a part's tensors in place."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / part / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / part / WEIGHTS, {"format": "pt"})

    return change


def pickled(value: Any, part: str = "text_encoder") -> Change:
    """Replace a part's weights by a pickle of the value."""

    def change(folder: Path) -> None:
        (folder / part / WEIGHTS).unlink()
        torch.save(value, folder / part / "pytorch_model.bin")

    return change


def renamed(name: str, part: str = "text_encoder") -> Change:
    """Give the file of a part's weights another name."""
    return lambda folder: (folder / part / WEIGHTS).rename(folder / part / name)
