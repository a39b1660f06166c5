"""A whole model in one safetensors file: every part's weights under its folder's name, every JSON
of the folder in the metadata.

    vae.encoder.conv_in.weight ...  unet.conv_in.weight ...      metadata "sfumato":
                                    {"model_index.json": {...}, "vae/config.json": {...}, ...}

Where there is more, as with text encoders, metadata "sfumato_files" has it: {"weights":
{"text_encoder": "model.safetensors"}, "others": {"tokenizer/merges.txt": ...}}, the names of
weights that are not diffusers', and whole files in base64.

It is the folder, folded: `fold` and `unfold` are inverses. Single files in original layouts are
read by original.py.
"""

import json
from base64 import b64decode, b64encode
from pathlib import Path

from torch import Tensor

from sfumato.checkpoints.folder import WEIGHTS
from sfumato.errors import UserError
from sfumato.io.atomic import read_tensors, write_json, write_tensors

KEY_OF_OURS = "sfumato"
_FILES = "sfumato_files"


def fold(folder: str | Path, file: str | Path) -> None:
    """Writes a model folder as one file, atomically. A part has one file of weights: `UserError`
    for more.
    """
    folder = Path(folder)
    there = {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    configs = {
        name: json.loads(path.read_text()) for name, path in there.items() if path.suffix == ".json"
    }
    weights = {name: path for name, path in there.items() if path.suffix == ".safetensors"}
    others = {
        name: b64encode(path.read_bytes()).decode()
        for name, path in there.items()
        if name not in configs | weights
    }
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for path in weights.values():
        part = path.parent.name
        if part in names or path.parent.parent != folder:
            raise UserError(
                f"{path} cannot be folded into one file: expected one file of weights a part, in the part's own folder"
            )
        names[part] = path.name
        tensors |= {f"{part}.{key}": value for key, value in read_tensors(path).items()}
    notes = {KEY_OF_OURS: json.dumps(configs, sort_keys=True)}
    names = {part: name for part, name in names.items() if name != WEIGHTS}
    if names or others:
        notes[_FILES] = json.dumps({"weights": names, "others": others}, sort_keys=True)
    write_tensors(file, tensors, notes)


def notes_of(file: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; `UserError` for one that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}): it may be truncated; copy or download it again"
        ) from error


def unfold(file: str | Path, folder: str | Path) -> None:
    """Writes the folder that `fold` read into `folder`; `UserError` for a file that sfumato did not
    write.
    """
    file, folder = Path(file), Path(folder)
    notes = notes_of(file)
    if KEY_OF_OURS not in notes:
        raise UserError(
            f"{file} was not written by sfumato in its own layout: `sfumato.load` opens the original ones too"
        )
    more = json.loads(notes.get(_FILES, "{}"))
    for name, value in json.loads(notes[KEY_OF_OURS]).items():
        write_json(_inside(folder, name, file), value)
    for name, value in more.get("others", {}).items():
        target = _inside(folder, name, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b64decode(value, validate=True))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    for part, tensors in parts.items():
        if not part.isidentifier():
            raise UserError(
                f"{file} has a part called {part!r}: expected a plain name such as vae or unet"
            )
        write_tensors(
            _inside(folder, f"{part}/{more.get('weights', {}).get(part, WEIGHTS)}", file), tensors
        )


def _inside(folder: Path, name: str, file: Path) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise UserError(f"{file} names a path outside its folder ({name!r}): it is refused")
    return target
