"""The network of a model from a file of its own, in place of its folder's: an original file, GGUF,
or weights of eight bits with scales.

FLUX.1 and SD 3.5 are released so, and so are most of their quantised and further trained versions;
everything else is the folder's, the network's config too, which is what their keys are held
against.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.checkpoints.conversion import SAFE, open_table
from sfumato.checkpoints.folder import build_part
from sfumato.checkpoints.lazily import sound
from sfumato.checkpoints.single_file import KEY_OF_OURS
from sfumato.checkpoints.transformer_files import (
    layout_of_class,
    layout_of_keys,
    noted_class,
    read_transformer,
)
from sfumato.errors import UserError
from sfumato.io.atomic import read_table, read_tensors
from sfumato.io.safetensors import aside


def load_network(path: Path, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The network of `path` by the config of a model's folder, in eval mode and in `dtype`; other
    parts in the file are not read.

    dtype None: as stored, to be streamed. `UserError` for a file without a transformer, or with
    another than the folder's, and for one that cannot be streamed.
    """
    if not path.is_file():
        raise UserError(
            f"transformer={path} was not found: expected a file with a diffusion transformer, such as a .safetensors or .gguf file"
        )
    place = folder / "transformer" / "config.json"
    if not place.exists():
        raise UserError(
            f"{place} is missing: the network of {path} is read by the config of its model; give a folder that has it"
        )
    config: dict[str, Any] = read_table(place)
    if layout_of_class(config.get("_class_name")) is None:
        raise UserError(
            f"{place} is of class {config.get('_class_name')!r}, which has no files of its own: leave out transformer={path}"
        )
    if dtype is None:
        require_mapped(path)
    table, notes = open_table(path, dtype or torch.float32)
    if KEY_OF_OURS in notes:
        raise UserError(
            f"transformer={path} is a whole model in sfumato's own layout: open it by itself"
        )
    found = layout_of_keys(table, noted_class(notes) or config["_class_name"])
    if found is None:
        shown = ", ".join(sorted(table)[:4])
        raise UserError(
            f"transformer={path} holds no diffusion transformer under its original names (its first keys: {shown})"
        )
    layout, prefix = found
    values, tensors = read_transformer(
        layout, prefix, table if dtype is None else sound(table, path), path, config, notes
    )
    return build_part(
        values,
        {k: lazy.make() for k, lazy in tensors.items()},
        place,
        path,
        None,
        dtype,
        lambda: True,
    )


def require_mapped(path: Path) -> None:
    """`UserError` for a file whose weights are no numbers that can be mapped to memory: pickled,
    quantised, or with scales beside them.
    """
    if path.suffix not in SAFE or aside({k: v.dtype for k, v in read_tensors(path).items()}):
        raise UserError(
            f"{path} cannot be streamed: its weights are pickled, or have scales; `sfumato convert` it to a folder in bf16, and stream that"
        )
