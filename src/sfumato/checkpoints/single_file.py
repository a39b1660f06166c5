"""A whole model in one safetensors file: every part's weights under its folder's name, every JSON of the folder in the metadata.

    vae.encoder.conv_in.weight ...  unet.conv_in.weight ...      metadata "sfumato": {"model_index.json": {...}, "vae/config.json": {...}, ...}

It is the folder, folded: `fold` and `unfold` are inverses. Single files in original layouts are read by original.py.
"""

import json
from pathlib import Path

from torch import Tensor

from sfumato.checkpoints.folder import WEIGHTS
from sfumato.errors import UserError
from sfumato.files import read_tensors, write_json, write_tensors


def fold(folder: str | Path, file: str | Path) -> None:
    """Writes a model folder as one file, atomically."""
    folder = Path(folder)
    configs = {str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.rglob("*.json"))}
    tensors: dict[str, Tensor] = {}
    for part in sorted(p.parent for p in folder.glob(f"*/{WEIGHTS}")):
        tensors |= {f"{part.name}.{k}": v for k, v in read_tensors(part / WEIGHTS).items()}
    write_tensors(file, tensors, {"sfumato": json.dumps(configs, sort_keys=True)})


KEY_OF_OURS = "sfumato"


def notes_of(file: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; `UserError` for one that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): it may be truncated; copy or download it again") from error


def unfold(file: str | Path, folder: str | Path) -> None:
    """Writes the folder that `fold` read into `folder`; `UserError` for a file that sfumato did not write."""
    file, folder = Path(file), Path(folder)
    text = notes_of(file).get(KEY_OF_OURS)
    if text is None:
        raise UserError(f"{file} was not written by sfumato in its own layout: `sfumato.load` opens the original ones too")
    for name, value in json.loads(text).items():
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"{file} names a path outside its folder ({name!r}): it is refused")
        write_json(target, value)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    for part, tensors in parts.items():
        if not part.isidentifier():
            raise UserError(f"{file} has a part called {part!r}: expected a plain name such as vae or unet")
        write_tensors(folder / part / WEIGHTS, tensors)
