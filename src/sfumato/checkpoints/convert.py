"""Models from one layout on disk to another: folder, original single file, GGUF; in another dtype,
if asked for.

Transformers go from `Checkpoint` to `Checkpoint`, models with a U-Net through modules whose weights
stay in the files. Unconditional is held in memory but the tensor that is being written.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint
from sfumato.checkpoints.families import (
    AUTOENCODERS,
    NETWORK,
    TransformerFamily,
    untold_latents,
)
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.formats.folded import is_folded
from sfumato.checkpoints.formats.folder import read_component, write_component
from sfumato.checkpoints.lazy_tensor import (
    LazyTensors,
    apply_scales,
    cast_for_storage,
    checked_finite,
    quantize_scaled,
    write_file,
)
from sfumato.checkpoints.metadata import (
    CONFIGS,
    FOLDER_FILES,
    KEPT,
    MODEL,
    SCHEDULER,
    TOKENIZERS,
    network_class,
    read_configs,
    read_model_note,
)
from sfumato.checkpoints.tokenizers import pack_folders, unpack_folders
from sfumato.compress.base import registered as autoencoders
from sfumato.errors import UserError, explained
from sfumato.io.atomic import atomic_folder, read_table, write_json
from sfumato.io.safetensors import EIGHTS

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_COPIED = (".json", ".txt", ".model", ".jinja")
"""What is copied from a model's folder beside its weights: schedulers, tokenizers, the list of
parts."""


@dataclass(frozen=True)
class StoreOptions:
    """How weights are stored: in `dtype` (None: as they are); `scaled`: in eight bits with a scale
    beside each matrix.
    """

    dtype: torch.dtype | None = None
    scaled: bool = False


@dataclass(frozen=True)
class Source:
    """What is converted: a checkpoint, and a folder whose other files go with it (None: none)."""

    checkpoint: Checkpoint
    folder: Path | None = None

    @property
    def components(self) -> dict[str, Component]:
        """The checkpoint's."""
        return self.checkpoint.components


# ---- reading -------------------------------------------------------------------------------------


def open_source(
    source: Path,
    options: StoreOptions,
    config: Path | None = None,
    variant: str | None = None,
    network: str | None = None,
) -> Source | None:
    """Read the tables of a folder, a single file or a GGUF; weights stay where they are.

    Args:
        source: what to convert
        options: how weights will be stored
        config: for files: a folder with configs
        variant: of a folder's files those to prefer, such as "fp16"
        network: the class of a file's transformer, where its keys do not tell it

    Returns:
        None for a model with a U-Net, or in sfumato's own single file, which `loading.load` reads.

    Raises:
        UserError: a source that is missing, damaged, or of no known layout.
    """
    if source.is_dir():
        index = source / "model_index.json"
        if index.exists() and "unet" in read_table(index):
            return None
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
    dtype = (
        torch.bfloat16
        if options.dtype is None
        else torch.float32
        if options.dtype in EIGHTS
        else options.dtype
    )
    raw = open_file(source, dtype).checked()
    if is_folded(raw.metadata) or any(
        key.startswith(f"{NETWORK}input_blocks.") for key in raw.tensors
    ):
        return None
    if variant is not None:
        raise UserError(f"--variant {variant} is for folders: {source} is one file")
    return _open_file(raw, config, network)


def _open_file(raw: RawCheckpoint, config: Path | None, network: str | None) -> Source:
    source, given = raw.path, {} if config is None else _read_configs(config)
    configs = read_configs(raw.metadata, source) | given
    named = (
        configs.get("transformer", {}).get("_class_name") or network_class(raw.metadata) or network
    )
    family = families.detect(raw.shapes, source, named)
    if not family.tells_latents and "vae" not in configs:
        raise untold_latents(source)
    checkpoint = family.read(raw, None, configs)
    components = checkpoint.components
    held = (
        components["transformer"].config["_class_name"]
        if "transformer" in components
        else "no transformer"
    )
    if network not in (None, held):
        raise UserError(
            f"{source} holds {held}, not {network}: leave out --network, or give another file"
        )
    foreign = (
        sorted(given.keys() - components.keys())
        if config is not None and (config / "config.json").exists()
        else []
    )
    if foreign:
        raise UserError(
            f"{config} is the config of a {foreign[0]}, which {source} does not hold (it holds {', '.join(components)})"
        )
    return Source(checkpoint, config)


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Configs by part, from a part's folder or a model's; `UserError` where there are none."""
    if (folder / "config.json").exists():
        values = read_table(folder / "config.json")
        return {_part_of(values, folder): values}
    configs = {
        part: read_table(folder / part / "config.json")
        for part in PARTS
        if (folder / part / "config.json").exists()
    }
    if not configs:
        raise UserError(
            f"--config {folder}: expected a folder with config.json, or a model's folder with transformer/config.json"
        )
    return configs


def _part_of(config: Mapping[str, Any], folder: Path) -> str:
    name = config.get("_class_name")
    if families.by_network(name) is not None:
        return "transformer"
    if (
        name in autoencoders()
        and families.by_components({"vae": Component(dict(config), {})}) is not None
    ):
        return "vae"
    raise UserError(
        f"{folder}/config.json is of class {name!r}: expected a diffusion transformer, an autoencoder, or the folder of a model"
    )


def _open_folder(folder: Path, variant: str | None) -> Source:
    if (folder / "config.json").exists():
        values = read_table(folder / "config.json")
        return Source(
            Checkpoint({_part_of(values, folder): _read_part(folder, variant)}, path=folder)
        )
    parts = {
        part: _read_part(folder / part, variant)
        for part in PARTS
        if (folder / part / "config.json").exists()
    }
    if not parts:
        raise UserError(
            f"{folder} holds no model: expected config.json with weights, model_index.json, or a folder transformer in it"
        )
    return Source(
        Checkpoint(parts, path=folder), folder if (folder / "model_index.json").exists() else None
    )


def _read_part(folder: Path, variant: str | None) -> Component:
    component = read_component(folder, variant, text=None)
    return replace(component, tensors=checked_finite(apply_scales(component.tensors), folder))


# ---- writing -------------------------------------------------------------------------------------


def to_file(
    source: Source, target: Path, options: StoreOptions, done: Callable[[int, int], None]
) -> dict[str, int]:
    """Write one file in the original layout; returns the number of tensors of each part."""
    raw = families.write(source.checkpoint)
    if options.scaled:
        if source.components.keys() != {"transformer"}:
            raise UserError("--dtype fp8-scaled is for a transformer alone: give its folder")
        tensors = quantize_scaled(raw.tensors)
    else:
        tensors = _cast_file(raw.tensors, options.dtype, source.components)
    noted = source.checkpoint.metadata
    metadata = {**raw.metadata, **{key: text for key, text in noted.items() if key in KEPT}}
    if source.folder is not None and _is_complete(source.folder, source.components):
        configs = {
            name: {k: v for k, v in part.config.items() if k not in ("dtype", "torch_dtype")}
            for name, part in source.components.items()
        }
        metadata = {
            **raw.metadata,
            **_folder_notes(source.folder, configs),
            CONFIGS: json.dumps(configs, sort_keys=True),
        }
    write_file(target, tensors, metadata, _counter(len(tensors), done))
    return {name: len(part.tensors) for name, part in source.components.items()}


def _cast_file(
    table: LazyTensors, dtype: torch.dtype | None, components: Mapping[str, Component]
) -> dict[str, Any]:
    """In eight bits the transformer and T5 are stored, what is small and counts (the autoencoder,
    CLIP) in bfloat16.
    """
    if dtype not in EIGHTS:
        return cast_for_storage(table, dtype)
    lone = any(key.startswith("decoder.conv_in.") for key in table)
    family = families.by_components(components)
    towers = () if family is None else family.towers
    small = "" if lone else (*AUTOENCODERS, *(t.prefix for t in towers if not t.eight_bits))
    return {
        key: cast_for_storage({key: lazy}, torch.bfloat16 if key.startswith(small) else dtype)[key]
        for key, lazy in table.items()
    }


def to_folder(
    source: Source, target: Path, options: StoreOptions, done: Callable[[int, int], None]
) -> dict[str, int]:
    """Write a folder in diffusers' layout, each part in its own; returns the number of tensors of
    each.
    """
    if options.scaled:
        raise UserError(
            "--dtype fp8-scaled is for single files: readers of folders would take the weights without their scales; use fp8"
        )
    counted = _counter(sum(len(part.tensors) for part in source.components.values()), done)
    with atomic_folder(target) as temporary:
        for name, part in source.components.items():
            small = options.dtype in EIGHTS and not (
                name == "transformer" or part.config.get("model_type") == "t5"
            )
            tensors = cast_for_storage(part.tensors, torch.bfloat16 if small else options.dtype)
            write_component(temporary / name, part.config, tensors, done=counted)
        if source.folder is not None and _is_complete(source.folder, source.components):
            _copy_folder_files(source.folder, temporary)
        elif len(source.components) > 1:
            _write_folder_files(source.checkpoint, temporary)
    return {name: len(part.tensors) for name, part in source.components.items()}


def _folder_notes(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a single file notes of a model's folder: tokenizers, scheduler, settings of the
    conditioner, name and defaults.

    Defaults are those of the folder's pipeline where sfumato did not write it.
    """
    metadata = pack_folders(folder)
    for key, path in FOLDER_FILES.items():
        if (folder / path).exists():
            metadata[key] = json.dumps(read_table(folder / path))
    index = read_table(folder / "model_index.json")
    family = families.by_pipeline(str(index.get("_class_name")))
    learned = bool(configs.get("transformer", {}).get("guidance_embeds"))
    scheduler = json.loads(metadata.get(SCHEDULER, "{}"))
    model = {"defaults": {} if family is None else family.defaults(index, learned, scheduler)}
    return metadata | {
        MODEL: json.dumps({k: v for k, v in index.get("_sfumato", model).items() if k != "version"})
    }


def _write_folder_files(checkpoint: Checkpoint, folder: Path) -> None:
    """What a model's folder has beside its networks: by the metadata of the file, or as
    published.
    """
    family, metadata = checkpoint.family, checkpoint.metadata
    network = checkpoint.components.get("transformer")
    if not isinstance(family, TransformerFamily) or family.latents is None or network is None:
        return
    with explained("the notes of the file"):
        note = read_model_note(metadata)
        index = family.file_index(
            checkpoint.components, _max_reference_images(note.get("defaults", {}))
        )
        files: dict[str, Any] = {
            "scheduler/scheduler_config.json": family.scheduler(network.config)
        }
        files |= {
            path: json.loads(metadata[key]) for key, path in FOLDER_FILES.items() if key in metadata
        }
        for name in unpack_folders(metadata, None, folder) if TOKENIZERS in metadata else ():
            tower = next(t for t in family.towers if f"tokenizer{t.end}" == name)
            index[name] = ["transformers", tower.tokenizer_class]
        if "name" in note:  # else the defaults are the pipeline's
            index["_sfumato"] = note
    for path, values in {"model_index.json": index, **files}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_json(folder / path, values)


def _counter(total: int, done: Callable[[int, int], None]) -> Callable[[], None]:
    count = iter(range(1, total + 1))
    return lambda: done(next(count), total)


def _is_complete(folder: Path, parts: Mapping[str, object]) -> bool:
    """Whether the parts are all with weights that a model's folder names."""
    index = folder / "model_index.json"
    named = (
        {k for k, v in read_table(index).items() if k in PARTS and v != [None, None]}
        if index.exists()
        else set()
    )
    return bool(named) and named <= parts.keys()


def _copy_folder_files(folder: Path, target: Path) -> None:
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        weights = file.name.endswith((".index.json", ".safetensors")) or ".index." in file.name
        hidden = any(p.startswith(".") for p in path.parts)
        if (
            file.is_file()
            and file.suffix in _COPIED
            and not weights
            and not hidden
            and not (target / path).exists()
        ):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)


def _max_reference_images(defaults: Mapping[str, Any]) -> int:
    """Read a model's number of reference images, also by its earlier name."""
    return defaults.get("max_reference_images", defaults.get("references", 0))
