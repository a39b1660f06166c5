"""A model's folder in diffusers' layout: each part in a folder of its own.

    vae/  unet/ | transformer/  text_encoder/   config.json and diffusion_pytorch_model.safetensors,
          or model.safetensors
    scheduler/scheduler_config.json   tokenizer/   conditioner/config.json   model_index.json

Weights are compared with the network key by key before they are used. Missing, extra and misshapen
keys are an error that lists them.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component, LoadOptions
from sfumato.checkpoints.families import TransformerFamily
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.formats.folded import is_folded
from sfumato.checkpoints.lazy_tensor import LazyTensors, cast, from_tensors, write_file
from sfumato.checkpoints.metadata import network_class
from sfumato.compress.base import Autoencoder
from sfumato.errors import UserError, explained
from sfumato.io.atomic import read_table, write_json
from sfumato.io.key_marks import require_unquantized_config
from sfumato.io.safetensors import (
    find_weights,
    has_variant,
    read_weights,
    unknown_variant,
    variants_of,
)
from sfumato.predict.conditioners import (
    conditioner_class,
    text_conditioner_class,
    text_encoder_classes,
)
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.networks.base import Network

log = logging.getLogger("sfumato")

STEM, TEXT_STEM, TEXT_PICKLED = "diffusion_pytorch_model", "model", "pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = "model_index.json"
NETWORKS = ("unet", "transformer")
"""Names of the network in model_index.json."""
SETTINGS = ("scheduler", "low_res_scheduler", "tokenizer", "conditioner")
"""Beginnings of the names of parts without weights in a variant."""
_TEXTS = ("text_encoder", "bert")
UNUSED_FIELDS = frozenset(
    "decay min_decay optimization_step update_after_step use_ema_warmup inv_gamma power "
    "quantization_config".split()
)
"""Fields of configs that change nothing in a network.

They are settings of a running average, which diffusers' `EMAModel.save_pretrained` adds, and of a
quantisation: `read_component` refuses quantised weights, a file beside the folder may replace them.
"""
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_LAYER = re.compile(rf"(.*\battentions\.\d+)\.({'|'.join(_OLD)})\.(weight|bias)")


# ---- parts ---------------------------------------------------------------------------------------


def read_component(
    folder: Path,
    variant: str | None = None,
    defaults: dict[str, Any] | None = None,
    text: bool | None = False,
    index: Mapping[str, Any] | None = None,
) -> Component:
    """Read a part's config and the table of its weights.

    Args:
        folder: the part's folder; weights may be sharded or pickled (`io/safetensors.py`).
        variant: the files to prefer, such as "fp16".
        defaults: values of fields that the config lacks.
        text: True for the file names of text encoders; None: decided by the config.
        index: model_index.json, whose class for this part counts; None: the config's counts.
    """
    path = folder / "config.json"
    require_unquantized_config(read_table(path), path)
    config = {**(defaults or {}), **read_config(path, (index or {}).get(folder.name))}
    text = "_class_name" not in config if text is None else text
    stem, pickled = (TEXT_STEM, TEXT_PICKLED) if text else (STEM, None)
    files = tuple(find_weights(folder, stem, variant, pickled))
    with explained(files[0] if len(files) == 1 else folder):
        tensors = from_tensors(modern(read_weights(files)))
    return Component(config, tensors, files, folder / "config.json")


def read_config(path: Path, entry: object = None) -> dict[str, Any]:
    """Read config.json of a part, without the fields that change nothing.

    Args:
        path: the file.
        entry: the part's entry in model_index.json, whose class counts, see `of_class`.
    """
    config = {k: v for k, v in read_table(path).items() if k not in UNUSED_FIELDS}
    return of_class(config, entry, path)


def named_class(entry: object) -> str | None:
    """Return the class of a part's entry in model_index.json; None where it decides none."""
    if not isinstance(entry, list | tuple) or len(entry) != 2 or entry[0] != "diffusers":
        return None
    return entry[1] if isinstance(entry[1], str) else None


def of_class(config: dict[str, Any], entry: object, path: Path) -> dict[str, Any]:
    """Return a config with the class that model_index.json names, which decides in diffusers.

    A difference between the two is logged.

    Args:
        config: of a network, an autoencoder or a scheduler.
        entry: [library, class] of model_index.json; anything else leaves the config as it is.
        path: the config's file, for the message.
    """
    named, own = named_class(entry), config.get("_class_name")
    if named in (None, own):
        return config
    if own is not None:
        log.warning(
            "%s is of class %s, and model_index.json names %s, which is taken, as in diffusers",
            *(path, own, named),
        )
    return {**config, "_class_name": named}


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Return the folders of the parts of a model_index.json that sfumato reads."""
    family = families.by_index(index)
    autoencoder = "vae" if family is None else family.autoencoder_folder
    listed = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and entry and entry[-1] is not None
    ]
    read = (autoencoder, *NETWORKS, "scheduler", "low_res_scheduler", "conditioner")
    return [name for name in listed if name in read or name.startswith((*_TEXTS, "tokenizer"))]


def replaced_parts(transformer: object, vae: object) -> set[str]:
    """Return the folders of the parts whose weights are read from elsewhere.

    Args:
        transformer: the file that replaces the network; None: there is none.
        vae: the file or folder that replaces the autoencoder; None: there is none.
    """
    networks = () if transformer is None else NETWORKS
    autoencoders = {family.autoencoder_folder for family in families.registered()}
    return {*networks, *(() if vae is None else autoencoders)}


def stems_of(part: str) -> tuple[str, str | None]:
    """Return the beginnings of the names of a part's weights, and of pickled ones that differ."""
    return (TEXT_STEM, TEXT_PICKLED) if part.startswith(_TEXTS) else (STEM, None)


def require_variant(
    where: object, files: Mapping[str, Collection[str]], variant: str | None
) -> None:
    """Raise `UserError` for a variant that no part of a model has.

    A part without it is read as it is, as by diffusers.

    Args:
        where: the model, for the message.
        files: the names of the files of each part whose weights are read.
        variant: such as "fp16"; None: none is asked for.
    """
    stems = {part: stems_of(part) for part in files}
    if variant is None or any(
        has_variant(names, stems[part][0], variant, stems[part][1]) for part, names in files.items()
    ):
        return
    variants = {
        mark for part, names in files.items() for mark in variants_of(names, stems[part][0])
    }
    raise unknown_variant(where, variant, sorted(variants))


def weight_files(
    folder: Path, index: Mapping[str, Any], replaced: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return the names of the files in the folder of each part whose weights are read.

    Args:
        folder: the model's folder.
        index: its model_index.json.
        replaced: parts whose weights are read from elsewhere.
    """
    parts = [part for part in parts_of(index) if not part.startswith(SETTINGS)]
    return {
        part: [path.name for path in (folder / part).glob("*")]
        for part in parts
        if part not in replaced
    }


def load_part(
    folder: str | Path,
    expected: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> nn.Module:
    """Load a network or autoencoder from a folder, in eval mode.

    Args:
        folder: the part's folder, with config.json and weights.
        expected: the class that it must be.
        dtype: of the weights; None: as stored, neither read nor checked, to be streamed.
        variant: the files to prefer, such as "fp16".
        defaults: values of fields that the config lacks.

    Raises:
        UserError: an unknown class, weights that do not fit the config, NaN or infinity.
    """
    return read_component(Path(folder), variant, defaults).build(None, dtype, expected)


def save_part(
    folder: str | Path, module: Network | Autoencoder, dtype: torch.dtype | None = None
) -> None:
    """Write the config and the weights of a network or autoencoder, as diffusers reads them.

    Args:
        folder: the part's folder.
        module: the network or autoencoder.
        dtype: of the stored weights; None: their own.

    Raises:
        NumericalError: a weight that is NaN or infinite in `dtype` (float16 ends at 65504):
            `load_part` would refuse the file.
    """
    tensors = cast(from_tensors(module.state_dict()), dtype)
    write_component(Path(folder), module.to_config(), tensors)


def write_component(
    folder: Path, config: dict[str, Any], tensors: LazyTensors, **options: Any
) -> None:
    """Write config.json and the weights of a part.

    Args:
        folder: the part's folder.
        config: of a network or autoencoder (with `_class_name`), or of a text encoder.
        tensors: the weights.
        options: of `write_file`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    stem = STEM if "_class_name" in config else TEXT_STEM
    write_file(folder / f"{stem}.safetensors", tensors, **options)


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights under today's names.

    Attention layers of autoencoders, and of U-Nets without tokens, were called query, key, value
    and proj_attn until diffusers 0.17 (2023).

    Raises:
        UserError: a weight under both names.
    """
    renamed = {_modern(key): tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        both = next(key for key in tensors if _modern(key) != key and _modern(key) in tensors)
        raise UserError(
            f"weights hold both {both} and {_modern(both)}, its new name: "
            "expected one of them; use a file of one layout"
        )
    return renamed


def _modern(key: str) -> str:
    match = _OLD_LAYER.fullmatch(key)
    return f"{match[1]}.{_OLD[match[2]]}.{match[3]}" if match else key


# ---- models --------------------------------------------------------------------------------------


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read model_index.json of a model folder; a folder without one is a `UserError`.

    A community pipeline's class is [file, class]: the file is code, which is not run.
    """
    path = Path(folder) / INDEX
    if not path.exists():
        above = Path(folder).absolute().parent
        raise UserError(
            f"{folder} is not a model folder: it has no model_index.json; "
            + (
                f"it is a part of the model {above}: give that folder"
                if (above / INDEX).is_file()
                else "give a folder that `model.save` or diffusers wrote"
            )
        )
    index = read_table(path)
    name = index.get("_class_name")
    if isinstance(name, list) and name:
        index["_class_name"] = name[-1]
    return index


def read(path: Path, name: str, options: LoadOptions) -> Checkpoint:
    """Read the network, autoencoder and schedulers of a model's folder.

    Text encoders are opened with the conditioner.

    Args:
        path: the folder.
        name: of the model, where the folder has none.
        options: how the model is opened.

    Raises:
        UserError: a folder without network or autoencoder, or with damaged files.
    """
    index = read_index(path)
    family = families.by_index(index)
    vae = "vae" if family is None else family.autoencoder_folder
    part = next((name for name in NETWORKS if index.get(name, [None, None]) != [None, None]), None)
    if options.transformer is not None and part != "unet":
        part = "transformer"
    if part is None or vae not in index:
        names = ", ".join(k for k in index if not k.startswith("_")) or "no parts"
        raise UserError(
            f"{path}/model_index.json names {names}: "
            f"expected at least {vae} and {' or '.join(NETWORKS)}"
        )
    if index.get("is_cosxl_edit"):
        raise UserError(
            f"{path}/model_index.json has is_cosxl_edit=true, a model whose image latents are "
            "scaled, which is not supported: use another InstructPix2Pix model"
        )
    replaced = replaced_parts(options.transformer, options.vae)
    require_variant(path, weight_files(path, index, replaced), options.variant)
    defaults = {} if family is None else dict(family.autoencoder_defaults)
    components = {"vae": _read_vae(path / vae, options, defaults, index)}
    if options.transformer is None:
        components[part] = read_component(path / part, options.variant, index=index)
    else:
        components[part] = _override(path, part, options.transformer, options, index)
    schedulers = {"scheduler": read_scheduler_config(path / "scheduler", index)}
    if (path / "low_res_scheduler" / "scheduler_config.json").exists():
        schedulers["low_res_scheduler"] = read_scheduler_config(path / "low_res_scheduler", index)
    with explained(path / "model_index.json"):
        notes = index.get("_sfumato", {})
        model_name, run = str(notes.get("name", name)), dict(notes.get("defaults", {}))
        training_data = dict(notes.get("training_data", {}))
    return Checkpoint(
        components,
        schedulers,
        index=index,
        defaults=run,
        name=model_name,
        family=None if family is None else family.name,
        conditioner=partial(_read_conditioner, path, index),
        path=path,
        training_data=training_data,
    )


def _network_folder(
    folder: Path, part: str, place: Path, options: LoadOptions, index: Mapping[str, Any]
) -> Component:
    """Read the network of another folder, whose class is that of the model's own."""
    inside = place / part if (place / part / "config.json").is_file() else place
    if not (inside / "config.json").is_file():
        raise UserError(
            f"the transformer {place} is a folder without config.json and {part}/config.json: "
            "expected the folder of a network, or of a model"
        )
    component = read_component(inside, options.variant)
    own = named_class(index.get(part)) or component.config.get("_class_name")
    if component.config.get("_class_name") != own:
        raise UserError(
            f"{inside} holds a {component.config.get('_class_name')}: "
            f"expected a {own}, the network of {folder}"
        )
    return component


def read_scheduler_config(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Read scheduler_config.json, of the class that model_index.json names."""
    path = folder / "scheduler_config.json"
    return of_class(read_table(path), index.get(folder.name), path)


def _read_vae(
    folder: Path, options: LoadOptions, defaults: dict[str, Any], index: dict[str, Any]
) -> Component:
    """Read the autoencoder, or its config alone where another one will replace it."""
    if options.vae is None:
        return read_component(folder, options.variant, defaults, index=index)
    path = folder / "config.json"
    config = read_config(path, index.get(folder.name)) if path.exists() else {}
    return Component({**defaults, **config}, {})


def _override(
    folder: Path, part: str, file: Path, options: LoadOptions, index: Mapping[str, Any]
) -> Component:
    """Read the network of a single file, with the config of a model's folder, or of a folder.

    FLUX.1 and SD 3.5 are released as files, and so are most of their quantised and further trained
    versions. Other parts in the file are not read. LCM's U-Nets are folders with their own config.

    Args:
        folder: the model's.
        part: the network's folder in it, "unet" or "transformer".
        file: the file; or a folder in diffusers' layout, or that of a model.
        options: how the model is opened.
        index: model_index.json.

    Raises:
        UserError: a file without such a network, with another than the folder's, or that cannot be
            streamed.
    """
    if file.is_dir():
        return _network_folder(folder, part, file, options, index)
    if not file.is_file():
        raise UserError(
            f"the transformer {file} was not found: expected a file with the network of a model, "
            "such as a .safetensors or .gguf file, or its folder"
        )
    place = folder / part / "config.json"
    if not place.exists():
        raise UserError(
            f"{place} is missing: the network of {file} is read by the config of its model; "
            "give a folder that has it"
        )
    config = read_config(place, index.get(part))
    if part == "transformer" and families.by_network(config.get("_class_name")) is None:
        raise UserError(
            f"{place} is of class {config.get('_class_name')!r}, "
            f"which has no files of its own: leave out the transformer {file}"
        )
    raw = open_file(file, options.opened or torch.float32, mapped=options.opened is None)
    raw = raw if options.opened is None else raw.checked()
    if is_folded(raw.metadata):
        raise UserError(
            f"the transformer {file} is a whole model in sfumato's own layout: open it by itself"
        )
    if part == "unet":
        return replace(families.read_unet(raw, config), config_file=place, path=file)
    candidates = families.candidates(raw.shapes, file)
    candidates = [family for family in candidates if isinstance(family, TransformerFamily)]
    if not candidates:
        kind = families.kind_of(raw.tensors)
        shown = ", ".join(sorted(raw.tensors)[:4])
        raise UserError(
            f"the transformer {file} is {kind}"
            if kind
            else f"the transformer {file} holds no diffusion transformer under its original names "
            f"(its first keys: {shown})"
        )
    named = network_class(raw.metadata) or config["_class_name"]
    family = next((family for family in candidates if named in family.alone), candidates[0])
    return replace(family.read_network(raw, config), config_file=place, path=file)


def _read_conditioner(
    path: Path, index: dict[str, Any], network: Network, options: LoadOptions
) -> Conditioner:
    """Open the conditioner of a model's folder.

    It is that of the folder's text encoders, or of conditioner/config.json. Unconditional networks
    need none.
    """
    encoders = text_encoder_classes(index, path / "model_index.json")
    family = families.by_index(index)
    if encoders:
        preferred = None if family is None else family.conditioner_class
        kind = text_conditioner_class(encoders, path, preferred)
        return kind.from_folder(path, options.opened, options.variant)
    config = path / "conditioner" / "config.json"
    if not config.exists() and not network.is_conditional:
        return Unconditional()
    if not config.exists():
        with explained(path / "model_index.json"):
            conditioner = None if family is None else family.folder_conditioner(index, network)
        if conditioner is not None:
            return conditioner
        raise UserError(
            f"{path} has neither a text encoder nor a conditioner/config.json: "
            "expected one of them, to encode prompts; copy or download the folder again"
        )
    with explained(config):
        kind = conditioner_class(read_table(config).get("_class_name", ""))
        return kind.from_folder(path, options.dtype)
