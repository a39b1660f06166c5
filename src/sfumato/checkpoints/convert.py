"""Conversion between layouts on disk (folder, original single file, GGUF) and dtypes.

Transformers are converted from `Checkpoint` to `Checkpoint`, models with a U-Net through modules
whose weights stay in the files. Only the tensor that is being written is in memory.
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
from sfumato.checkpoints.formats.folder import (
    INDEX,
    read_component,
    read_config,
    read_index,
    read_scheduler_config,
    require_variant,
    weight_files,
    write_component,
)
from sfumato.checkpoints.lazy_tensor import (
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
"""Suffixes of files that are copied beside a folder's weights: configs and tokenizers."""


@dataclass(frozen=True)
class StoreOptions:
    """Storage of the written weights.

    Attributes:
        dtype: of the weights; None: as they are.
        scaled: eight bits with a scale for each matrix.
    """

    dtype: torch.dtype | None = None
    scaled: bool = False


@dataclass(frozen=True)
class Source:
    """The model to convert.

    Attributes:
        checkpoint: its parts.
        folder: a folder whose other files are copied or noted; None: there is none.
    """

    checkpoint: Checkpoint
    folder: Path | None = None

    @property
    def components(self) -> dict[str, Component]:
        """The checkpoint's."""
        return self.checkpoint.components

    @property
    def complete_folder(self) -> Path | None:
        """The folder, where the source has every part with weights that it names; else None."""
        index = None if self.folder is None else self.folder / INDEX
        if index is None or not index.exists():
            return None
        parts = {k for k, v in read_table(index).items() if k in PARTS and v != [None, None]}
        return self.folder if parts and parts <= self.components.keys() else None


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
        source: the model's folder or file.
        options: how weights will be stored.
        config: for files: a folder with configs.
        variant: the files of a folder to prefer, such as "fp16".
        network: the class of a file's transformer, where its keys do not determine it.

    Returns:
        None for a model with a U-Net, or in sfumato's own single file, which `loading.load` reads.

    Raises:
        UserError: a source that is missing, damaged, or of no known layout.
    """
    if source.is_dir():
        if (source / INDEX).exists() and "unet" in read_index(source):
            return None
        for flag, value in ((f"--config {config}", config), ("--network", network)):
            if value is not None:
                raise UserError(
                    f"{flag} is for single files: the folder {source} has its own configs"
                )
        return _open_folder(source, variant)
    if not source.is_file():
        raise UserError(
            f"{source} was not found: expected a model's folder, a single file or a GGUF file"
        )
    dtype = torch.float32 if options.dtype in EIGHTS else options.dtype or torch.bfloat16
    raw = open_file(source, dtype).checked()
    unet = any(key.startswith(f"{NETWORK}input_blocks.") for key in raw.tensors)
    if is_folded(raw.metadata) or unet:
        return None
    if variant is not None:
        raise UserError(f"--variant {variant} is for folders: {source} is one file")
    return _open_file(raw, config, network)


def _open_file(raw: RawCheckpoint, config: Path | None, network: str | None) -> Source:
    source, overrides = raw.path, {} if config is None else _read_configs(config)
    configs = read_configs(raw.metadata, source) | overrides
    named = configs.get("transformer", {}).get("_class_name") or network_class(raw.metadata)
    family = families.detect(raw.shapes, source, named or network)
    if not family.tells_latents and "vae" not in configs:
        raise untold_latents(source)
    checkpoint = family.read(raw, None, configs)
    components = checkpoint.components
    transformer = components.get("transformer")
    held = "no transformer" if transformer is None else transformer.config["_class_name"]
    if network not in (None, held):
        raise UserError(
            f"{source} holds {held}, not {network}: leave out --network, or give another file"
        )
    foreign = sorted(overrides.keys() - components.keys())
    if foreign and config is not None and (config / "config.json").exists():
        raise UserError(
            f"{config} is the config of a {foreign[0]}, which {source} does not hold "
            f"(it holds {', '.join(components)})"
        )
    return Source(checkpoint, config)


def _part_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of parts: that of one part, or those in a model's folder."""
    if (folder / "config.json").exists():
        return {_part_of(folder): folder}
    return {part: folder / part for part in PARTS if (folder / part / "config.json").exists()}


def _part_of(folder: Path) -> str:
    """Return the name of the part whose config.json a folder has."""
    config = read_table(folder / "config.json")
    name = config.get("_class_name")
    if families.by_network(name) is not None:
        return "transformer"
    if name in autoencoders() and families.by_components({"vae": Component(config, {})}):
        return "vae"
    raise UserError(
        f"{folder}/config.json is of class {name!r}: "
        "expected a diffusion transformer, an autoencoder, or the folder of a model"
    )


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return configs by part; `UserError` where there are none."""
    folders = _part_folders(folder)
    if not folders:
        raise UserError(
            f"--config {folder}: expected a folder with config.json, "
            "or a model's folder with transformer/config.json"
        )
    index = read_index(folder) if (folder / INDEX).exists() else {}
    return {
        part: read_config(place / "config.json", index.get(place.name))
        for part, place in folders.items()
    }


def _open_folder(folder: Path, variant: str | None) -> Source:
    index = read_index(folder) if (folder / INDEX).exists() else {}
    if index:
        require_variant(folder, weight_files(folder, index), variant)
    components: dict[str, Component] = {}
    for part, place in _part_folders(folder).items():
        component = read_component(place, variant, text=None, index=index)
        tensors = checked_finite(apply_scales(component.tensors), place)
        components[part] = replace(component, tensors=tensors)
    if not components:
        raise UserError(
            f"{folder} holds no model: expected config.json with weights, model_index.json, "
            "or a folder transformer in it"
        )
    whole = not (folder / "config.json").exists() and (folder / INDEX).exists()
    return Source(Checkpoint(components, path=folder), folder if whole else None)


# ---- writing -------------------------------------------------------------------------------------


def to_file(
    source: Source, target: Path, options: StoreOptions, done: Callable[[int, int], None]
) -> dict[str, int]:
    """Write one file in the original layout.

    With eight bits the transformer and T5 are stored in them. The autoencoder and CLIP are small
    and sensitive: they are stored in bfloat16.

    Args:
        source: the model.
        target: the file.
        options: how weights are stored.
        done: called after each tensor with its number and the number of all.

    Returns:
        The number of tensors of each part.

    Raises:
        UserError: a model that the layout cannot hold.
        NumericalError: a weight that is not finite in its new dtype.
    """
    vae = source.components.get("vae")
    autoencoder = None if vae is None else str(vae.config.get("_class_name"))
    if autoencoder is not None and autoencoder.endswith("AutoencoderTiny"):
        raise UserError(
            f"the autoencoder of {source.checkpoint.path} is an {autoencoder}, which has no place "
            "in a single file: expected an AutoencoderKL; convert to a folder instead"
        )
    raw = families.write(source.checkpoint)
    if options.scaled:
        if source.components.keys() != {"transformer"}:
            raise UserError("--dtype fp8-scaled is for a transformer alone: give its folder")
        tensors = quantize_scaled(raw.tensors)
    else:
        lone_autoencoder = any(key.startswith("decoder.conv_in.") for key in raw.tensors)
        family = families.by_components(source.components)
        towers = () if family is None else family.towers
        wide = tuple(tower.prefix for tower in towers if not tower.eight_bits)
        wide = ("",) if lone_autoencoder else (*AUTOENCODERS, *wide)
        tensors = cast_for_storage(raw.tensors, options.dtype, wide)
    metadata = source.checkpoint.metadata
    if (folder := source.complete_folder) is not None:
        configs = {
            name: {k: v for k, v in part.config.items() if k not in ("dtype", "torch_dtype")}
            for name, part in source.components.items()
        }
        metadata = _folder_notes(folder, configs)
        metadata[CONFIGS] = json.dumps(configs, sort_keys=True)
    else:
        metadata = {key: text for key, text in metadata.items() if key in KEPT}
    write_file(target, tensors, {**raw.metadata, **metadata}, _counter(len(tensors), done))
    return {name: len(part.tensors) for name, part in source.components.items()}


def to_folder(
    source: Source, target: Path, options: StoreOptions, done: Callable[[int, int], None]
) -> dict[str, int]:
    """Write a folder in diffusers' layout; arguments, result and errors as of `to_file`."""
    if options.scaled:
        raise UserError(
            "--dtype fp8-scaled is for single files: "
            "readers of folders would take the weights without their scales; use fp8"
        )
    counted = _counter(sum(len(part.tensors) for part in source.components.values()), done)
    with atomic_folder(target) as temporary:
        for name, part in source.components.items():
            large = name == "transformer" or part.config.get("model_type") == "t5"
            tensors = cast_for_storage(part.tensors, options.dtype, () if large else ("",))
            write_component(temporary / name, part.config, tensors, done=counted)
        if (folder := source.complete_folder) is not None:
            _copy_folder_files(folder, temporary)
        elif len(source.components) > 1:
            _write_folder_files(source.checkpoint, temporary)
    return {name: len(part.tensors) for name, part in source.components.items()}


def _folder_notes(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a single file's metadata of a model's folder.

    These are tokenizers, scheduler, the conditioner's settings, name and defaults. Defaults are
    those of the folder's pipeline where sfumato did not write it.
    """
    metadata, index = pack_folders(folder), read_index(folder)
    for key, path in FOLDER_FILES.items():
        if (folder / path).exists():
            metadata[key] = json.dumps(read_table(folder / path))
    if SCHEDULER in metadata:
        metadata[SCHEDULER] = json.dumps(read_scheduler_config(folder / "scheduler", index))
    family = families.by_index(index)
    learned = bool(configs.get("transformer", {}).get("guidance_embeds"))
    scheduler = json.loads(metadata.get(SCHEDULER, "{}"))
    model = {"defaults": {} if family is None else family.defaults(index, learned, scheduler)}
    model = {k: v for k, v in index.get("_sfumato", model).items() if k != "version"}
    return metadata | {MODEL: json.dumps(model)}


def _write_folder_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the other files of a model's folder, by the file's metadata or as published."""
    family = None if checkpoint.family is None else families.by_name(checkpoint.family)
    metadata = checkpoint.metadata
    network = checkpoint.components.get("transformer")
    if not isinstance(family, TransformerFamily) or family.latents is None or network is None:
        return
    with explained("the notes of the file"):
        note = read_model_note(metadata)
        defaults = note.get("defaults", {})
        # "references" is the name of earlier versions
        references = defaults.get("max_reference_images", defaults.get("references", 0))
        index = family.file_index(checkpoint.components, references)
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
    for path, values in {INDEX: index, **files}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_json(folder / path, values)


def _counter(total: int, done: Callable[[int, int], None]) -> Callable[[], None]:
    count = iter(range(1, total + 1))
    return lambda: done(next(count), total)


def _copy_folder_files(folder: Path, target: Path) -> None:
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        index_of_shards = ".index." in file.name
        hidden = any(p.startswith(".") for p in path.parts)
        if (
            file.is_file()
            and file.suffix in _COPIED
            and not index_of_shards
            and not hidden
            and not (target / path).exists()
        ):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)
