"""Diffusion transformers from one layout on disk to another: folder, original single file, GGUF; in
another dtype, if asked for.

Nothing is held in memory but the tensor that is being written: files are mapped, and written one
tensor at a time.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.families import VAES
from sfumato.checkpoints.folder import STEM
from sfumato.checkpoints.gguf import is_gguf, read_gguf
from sfumato.checkpoints.lazily import (
    Lazy,
    present,
    sound,
    stored,
    with_scales,
    without_scales,
    write,
)
from sfumato.checkpoints.names.whole import extras
from sfumato.checkpoints.original import PICKLES
from sfumato.checkpoints.single_file import KEY_OF_OURS, notes_of
from sfumato.checkpoints.tokenizer import MODEL
from sfumato.checkpoints.transformer_files import PREFIX, layout_of_class
from sfumato.checkpoints.whole_files import TEXTS, LazyPart, read_whole, write_whole
from sfumato.checkpoints.whole_models import CONFIGS, read_configs
from sfumato.checkpoints.whole_texts import BESIDE, TOKENIZERS, notes_of_folder, unpack_tokenizers
from sfumato.errors import UserError, explained
from sfumato.io.atomic import atomic_folder, read_table, read_tensors, write_json
from sfumato.io.pickles import read_pickle, state_dict
from sfumato.io.safetensors import EIGHTS, find_weights, read_weights

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
SAFE = (".safetensors", ".sft")
KEPT = {TOKENIZERS, CONFIGS, MODEL, *BESIDE}
"""Notes that go from file to file."""
_BESIDE = (".json", ".txt", ".model", ".jinja")
"""What is copied from a model's folder beside its weights: schedulers, tokenizers, the list of
parts."""


@dataclass(frozen=True)
class Storing:
    """How weights are stored: in `dtype` (None: as they are), scaled: in eight bits with a scale
    beside each matrix.
    """

    dtype: torch.dtype | None = None
    scaled: bool = False


@dataclass(frozen=True)
class Source:
    """What was found: parts, a folder whose other files go with them (None: none), and the notes of
    a file.
    """

    parts: dict[str, LazyPart]
    beside: Path | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def has_unet(source: Path) -> bool:
    """Whether a folder or file is of a model with a U-Net, or in sfumato's own single file, which
    `sfumato.load` reads.
    """
    if source.is_dir():
        index = source / "model_index.json"
        return index.exists() and "unet" in read_table(index)
    if not source.is_file() or is_gguf(source):
        return False
    if source.suffix in SAFE:
        return KEY_OF_OURS in notes_of(source) or _unet_keys(read_tensors(source))
    return source.suffix in PICKLES and _unet_keys(_pickled(source))


def _unet_keys(keys: Mapping[str, object]) -> bool:
    return any(k.startswith(f"{PREFIX}input_blocks.") for k in keys)


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    return state_dict(read_pickle(path), path)


def open_source(
    source: Path,
    storing: Storing,
    config: Path | None = None,
    variant: str | None = None,
    network: str | None = None,
) -> Source:
    """Reads the tables of a folder, a single file or a GGUF; weights stay where they are.

    config: a folder with configs, for files. variant: of a folder's files those to prefer, such as
    "fp16". network: the class of a file's transformer, where its keys do not tell it.

    `UserError` for a source that is missing, damaged, or of no known layout.
    """
    if source.is_dir():
        if config is not None:
            raise UserError(
                f"--config {config} is for single files: the folder {source} has its own configs"
            )
        if network is not None:
            raise UserError(
                f"--network is for single files: the folder {source} has its own configs"
            )
        return _open_folder(source, variant)
    if not source.is_file():
        raise UserError(
            f"{source} was not found: expected a model's folder, a single file or a GGUF file"
        )
    if variant is not None:
        raise UserError(f"--variant {variant} is for folders: {source} is one file")
    configs = {} if config is None else _configs(config)
    table, notes = open_table(
        source,
        torch.bfloat16
        if storing.dtype is None
        else torch.float32
        if storing.dtype in EIGHTS
        else storing.dtype,
    )
    parts = read_whole(
        sound(table, source), notes, source, read_configs(notes, source) | configs, network
    )
    held = (
        parts["transformer"].config["_class_name"] if "transformer" in parts else "no transformer"
    )
    if network not in (None, held):
        raise UserError(
            f"{source} holds {held}, not {network}: leave out --network, or give another file"
        )
    odd = (
        sorted(configs.keys() - parts.keys())
        if config is not None and (config / "config.json").exists()
        else []
    )
    if odd:
        raise UserError(
            f"{config} is the config of a {odd[0]}, which {source} does not hold (it holds {', '.join(parts)})"
        )
    return Source(parts, config, notes)


def open_table(source: Path, dtype: torch.dtype) -> tuple[Mapping[str, Lazy], dict[str, str]]:
    """The tensors of a single file and its notes. dtype: what quantised ones become (GGUF)."""
    if is_gguf(source) or source.suffix == ".gguf":
        return read_gguf(source, dtype).tensors, {}
    if source.suffix in SAFE:
        return without_scales(present(read_tensors(source))), notes_of(source)
    if source.suffix in PICKLES:
        return present(_pickled(source)), {}
    raise UserError(
        f"{source}: expected a file that ends in {', '.join((*SAFE, *PICKLES, '.gguf'))}"
    )


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Configs by part, from a part's folder or a model's; `UserError` where there are none."""
    if (folder / "config.json").exists():
        values = read_table(folder / "config.json")
        return {_part_of(values, folder): values}
    found = {
        part: read_table(folder / part / "config.json")
        for part in PARTS
        if (folder / part / "config.json").exists()
    }
    if not found:
        raise UserError(
            f"--config {folder}: expected a folder with config.json, or a model's folder with transformer/config.json"
        )
    return found


def _part_of(config: Mapping[str, Any], folder: Path) -> str:
    name = config.get("_class_name")
    if layout_of_class(name) is not None:
        return "transformer"
    if name in ("AutoencoderKL", "AutoencoderKLFlux2"):
        return "vae"
    raise UserError(
        f"{folder}/config.json is of class {name!r}: expected a diffusion transformer, an autoencoder, or the folder of a model"
    )


def _open_folder(folder: Path, variant: str | None) -> Source:
    if (folder / "config.json").exists():
        values = read_table(folder / "config.json")
        return Source({_part_of(values, folder): _open_part(folder, values, variant)})
    parts = {p: _open_part(folder / p, c, variant) for p, c in _configs_of_model(folder).items()}
    return Source(parts, folder if (folder / "model_index.json").exists() else None)


def _configs_of_model(folder: Path) -> dict[str, dict[str, Any]]:
    found = {
        part: read_table(folder / part / "config.json")
        for part in PARTS
        if (folder / part / "config.json").exists()
    }
    if not found:
        raise UserError(
            f"{folder} holds no model: expected config.json with weights, model_index.json, or a folder transformer in it"
        )
    return found


def _open_part(folder: Path, config: dict[str, Any], variant: str | None) -> LazyPart:
    stem, pickled = (STEM, STEM) if "_class_name" in config else ("model", "pytorch_model")
    files = find_weights(folder, stem, variant, pickled)
    return LazyPart(config, sound(without_scales(present(read_weights(files))), folder))


def to_file(
    source: Source, target: Path, storing: Storing, where: object, done: Callable[[int, int], None]
) -> dict[str, int]:
    """Writes one file in the original layout; gives the number of tensors of each part."""
    table, notes = write_whole(source.parts, where)
    if storing.scaled:
        if len(source.parts) > 1 or "transformer" not in source.parts:
            raise UserError("--dtype fp8-scaled is for a transformer alone: give its folder")
        table = with_scales(table)
    else:
        table = _stored(table, storing.dtype)
    counted = _counter(len(table), done)
    if source.beside is not None and _complete(source.beside, source.parts):
        plain = {
            name: {k: v for k, v in part.config.items() if k not in ("dtype", "torch_dtype")}
            for name, part in source.parts.items()
        }
        noted = notes_of_folder(source.beside, plain.get("transformer", {}))
        notes = notes | noted | {CONFIGS: json.dumps(plain, sort_keys=True)}
    elif KEPT & source.notes.keys():
        notes = notes | {key: text for key, text in source.notes.items() if key in KEPT}
    write(target, table, notes, counted)
    return {name: len(part.tensors) for name, part in source.parts.items()}


def _stored(table: Mapping[str, Lazy], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """In eight bits the transformer and T5 are stored, what is small and counts (the autoencoder,
    CLIP) in bfloat16.
    """
    small = (*VAES, f"{TEXTS}clip_") if dtype in EIGHTS else ()
    alone = dtype in EIGHTS and any(k.startswith("decoder.conv_in.") for k in table)
    inner = {k: v for k, v in table.items() if alone or (small and k.startswith(small))}
    done = stored(inner, torch.bfloat16) | stored(
        {k: v for k, v in table.items() if k not in inner}, dtype
    )
    return {k: done[k] for k in table}


def to_folder(
    source: Source, target: Path, storing: Storing, done: Callable[[int, int], None]
) -> dict[str, int]:
    """Writes a folder in diffusers' layout, each part in its own; gives the number of tensors of
    each.
    """
    if storing.scaled:
        raise UserError(
            "--dtype fp8-scaled is for single files: readers of folders would take the weights without their scales; use fp8"
        )
    total = sum(len(part.tensors) for part in source.parts.values())
    counted = _counter(total, done)
    with atomic_folder(target) as temporary:
        for name, part in source.parts.items():
            (temporary / name).mkdir()
            write_json(temporary / name / "config.json", part.config)
            eight = storing.dtype in EIGHTS and not (
                name == "transformer" or part.config.get("model_type") == "t5"
            )
            table = stored(part.tensors, torch.bfloat16 if eight else storing.dtype)
            stem = STEM if "_class_name" in part.config else "model"
            write(temporary / name / f"{stem}.safetensors", table, None, counted)
        if source.beside is not None and _complete(source.beside, source.parts):
            _copy_beside(source.beside, temporary)
        elif len(source.parts) > 1:
            _write_beside(source, temporary)
    return {name: len(part.tensors) for name, part in source.parts.items()}


def _write_beside(source: Source, folder: Path) -> None:
    """What a model's folder has beside its networks: by the notes of the file, or as published."""
    notes = source.notes
    with explained("the notes of the file"):
        noted = json.loads(notes.get(MODEL, "{}"))
        defaults = noted.get("defaults", {})
        # older files' name
        files = extras(
            source.parts, defaults.get("max_reference_images", defaults.get("references", 0))
        )
        for key, path in BESIDE.items():
            if key in notes:
                files[path] = json.loads(notes[key])
        if files and TOKENIZERS in notes:
            for name in unpack_tokenizers(notes, None, folder):
                t5 = (
                    source.parts.get(
                        name.replace("tokenizer", "text_encoder"), LazyPart({}, {})
                    ).config.get("model_type")
                    == "t5"
                )
                files["model_index.json"][name] = [
                    "transformers",
                    "T5TokenizerFast" if t5 else "CLIPTokenizer",
                ]
        if files and "name" in noted:  # else the defaults are the pipeline's
            files["model_index.json"]["_sfumato"] = noted
    for path, values in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_json(folder / path, values)


def _counter(total: int, done: Callable[[int, int], None]) -> Callable[[], None]:
    count = iter(range(1, total + 1))
    return lambda: done(next(count), total)


def _complete(folder: Path, parts: Mapping[str, object]) -> bool:
    """Whether the parts are all with weights that a model's folder names."""
    index = folder / "model_index.json"
    named = (
        {k for k, v in read_table(index).items() if k in PARTS and v != [None, None]}
        if index.exists()
        else set()
    )
    return bool(named) and named <= parts.keys()


def _copy_beside(folder: Path, target: Path) -> None:
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        weights = file.name.endswith((".index.json", ".safetensors")) or ".index." in file.name
        hidden = any(p.startswith(".") for p in path.parts)
        if (
            file.is_file()
            and file.suffix in _BESIDE
            and not weights
            and not hidden
            and not (target / path).exists()
        ):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)
