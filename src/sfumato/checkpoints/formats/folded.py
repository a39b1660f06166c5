"""A model's folder in one safetensors file, for models that have no original layout.

    vae.encoder.conv_in.weight ...  unet.conv_in.weight ...
    metadata "sfumato"         {"model_index.json": {...}, "vae/config.json": {...}, ...}
    metadata "sfumato_files"   where there is more, as with text encoders:
                               {"weights": {"text_encoder": "model.safetensors"},
                                "others": {"tokenizer/merges.txt": base64, ...}}

`fold` and `unfold` are inverses.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints.checkpoint import RawCheckpoint
from sfumato.errors import UserError
from sfumato.io.atomic import read_tensors, write_json, write_tensors

KEY = "sfumato"
_FILES = "sfumato_files"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_folded(metadata: Mapping[str, str]) -> bool:
    """Return True for the metadata of a folder in one file."""
    return KEY in metadata


def fold(folder: str | Path, file: str | Path) -> None:
    """Write a model's folder as one file, atomically.

    Args:
        folder: the folder, with one file of weights a part.
        file: the file.

    Raises:
        UserError: a part with several files of weights.
    """
    folder = Path(folder)
    configs: dict[str, Any] = {}
    others: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, part = str(path.relative_to(folder)), path.parent.name
        if path.suffix == ".json":
            configs[name] = json.loads(path.read_text())
        elif path.suffix != ".safetensors":
            others[name] = b64encode(path.read_bytes()).decode()
        elif part in names or path.parent.parent != folder:
            raise UserError(
                f"{path} cannot be folded into one file: "
                "expected one file of weights a part, in the part's own folder"
            )
        else:
            names[part] = path.name
            tensors |= {f"{part}.{key}": value for key, value in read_tensors(path).items()}
    metadata = {KEY: json.dumps(configs, sort_keys=True)}
    names = {part: name for part, name in names.items() if name != _WEIGHTS}
    if names or others:
        metadata[_FILES] = json.dumps({"weights": names, "others": others}, sort_keys=True)
    write_tensors(file, tensors, metadata)


def unfold(raw: RawCheckpoint, folder: str | Path) -> None:
    """Write the folder of a file that `fold` wrote.

    Args:
        raw: the file.
        folder: where to write.

    Raises:
        UserError: a file that sfumato did not write, or with paths outside its folder.
    """
    file, folder = raw.path, Path(folder)
    if not is_folded(raw.metadata):
        raise UserError(
            f"{file} was not written by sfumato in its own layout: "
            "`sfumato.load` opens the original ones too"
        )
    more = json.loads(raw.metadata.get(_FILES, "{}"))
    for name, value in json.loads(raw.metadata[KEY]).items():
        write_json(_inside(folder, name, file), value)
    for name, value in more.get("others", {}).items():
        target = _inside(folder, name, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b64decode(value, validate=True))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, lazy in raw.tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = lazy.load()
    for part, tensors in parts.items():
        if not part.isidentifier():
            raise UserError(
                f"{file} has a part called {part!r}: expected a plain name such as vae or unet"
            )
        name = more.get("weights", {}).get(part, _WEIGHTS)
        write_tensors(_inside(folder, f"{part}/{name}", file), tensors)


def _inside(folder: Path, name: str, file: Path) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise UserError(f"{file} names a path outside its folder ({name!r}): it is refused")
    return target
