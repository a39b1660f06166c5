"""Saving of models: a folder in diffusers' layout, or one file."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import __version__
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component
from sfumato.checkpoints.families import Family
from sfumato.checkpoints.formats.folded import fold
from sfumato.checkpoints.formats.folder import write_component
from sfumato.checkpoints.lazy_tensor import cast, checked_finite, from_tensors, write_file
from sfumato.checkpoints.pipelines import OWN, autoencoder_folder, pipeline_class, pipeline_index
from sfumato.checkpoints.schedulers.config import to_scheduler_config, write_scheduler
from sfumato.checkpoints.schedulers.spacing import DynamicShift
from sfumato.compress.tiny import AutoencoderTiny
from sfumato.errors import UserError
from sfumato.io.atomic import atomic_folder, write_json
from sfumato.io.paths import expand_user
from sfumato.predict.networks.base import Network
from sfumato.sampling.request import Model


def save_model(
    model: Model,
    place: str | Path,
    dtype: torch.dtype | None,
    source: Path | None = None,
) -> None:
    """`LatentDiffusion.save`: a folder, or a file where the name ends in .safetensors.

    A file has its family's original layout. Models without one are written as a folder in one file.

    Args:
        model: the model.
        place: the folder or file.
        dtype: of the weights; None: their own.
        source: the file of a model whose weights were not checked for NaN and infinity; None: they
            were.
    """
    if Path(place).suffix != ".safetensors":
        _save_folder(model, place, dtype, source)
        return
    network, conditioner = _network(model), model.conditioner
    family = families.by_parts(network, conditioner, model.denoiser.process)
    raw = None
    tiny = isinstance(model.autoencoder, AutoencoderTiny)  # has no original layout
    upscaler = model.low_res is not None
    if family is not None and not tiny and not (family.is_transformer and upscaler):
        checkpoint = disassemble(model, family, dtype, source)
        family = families.by_components(checkpoint.components) or family
        raw = family.single_file(checkpoint)
        notes = family.notes(checkpoint, conditioner)
    if raw is None or family is None:
        with tempfile.TemporaryDirectory() as temporary:
            _save_folder(model, Path(temporary) / "model", dtype, source)
            fold(Path(temporary) / "model", place)
    else:
        write_file(place, raw.tensors, {**raw.metadata, **notes})


def _network(model: Model) -> Network:
    """Return the network of a model; one of another class has no config to save."""
    network = model.denoiser.network
    if not isinstance(network, Network):
        raise UserError(
            f"the network is a {type(network).__name__}, which cannot be saved: "
            "expected one of predict/networks"
        )
    return network


def disassemble(
    model: Model,
    family: Family,
    dtype: torch.dtype | None,
    source: Path | None = None,
) -> Checkpoint:
    """Return the parts of a model that its single file holds; arguments as of `save_model`."""
    network = _network(model)
    modules = {"vae": model.autoencoder, network.part: network}
    parts = {name: (module.to_config(), module.state_dict()) for name, module in modules.items()}
    parts |= family.text_components(model.conditioner)
    schedulers = {"scheduler": scheduler_config(model)}
    if model.low_res is not None:
        schedulers["low_res_scheduler"] = to_scheduler_config(model.low_res)
    components = {
        name: _component(config, tensors, dtype, source)
        for name, (config, tensors) in parts.items()
    }
    return Checkpoint(
        components,
        schedulers,
        defaults=model.defaults.to_json(),
        name=model.name,
        family=None if family is None else family.name,
        conditioner=lambda network, options: model.conditioner,
        path=Path("the model"),
        training_data=dict(model.training_data),
    )


def _component(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    source: Path | None,
) -> Component:
    """Return a part as it is stored, without the config's fields that transformers adds."""
    table = from_tensors(tensors)
    table = cast(table if source is None else checked_finite(table, source), dtype)
    return Component({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}, table)


def _save_folder(
    model: Model,
    folder: str | Path,
    dtype: torch.dtype | None,
    source: Path | None = None,
) -> None:
    """Write each part into a folder of its own, and model_index.json, which names them."""
    network, conditioner = _network(model), model.conditioner
    index = pipeline_index(network, conditioner, model.defaults)
    notes = {"version": __version__, "name": model.name, "defaults": model.defaults.to_json()}
    if model.training_data:
        notes["training_data"] = dict(model.training_data)
    modules = {autoencoder_folder(index["_class_name"]): model.autoencoder, network.part: network}
    schedulers = {"scheduler": scheduler_config(model)}
    if model.low_res is not None:
        # the class in diffusers' upscaler
        low_res = {**to_scheduler_config(model.low_res), "_class_name": "DDPMScheduler"}
        low_res.pop("set_alpha_to_one", None)
        schedulers["low_res_scheduler"] = low_res
    index["_sfumato"] = notes
    with atomic_folder(check_target(folder)) as temporary:
        for name, module in modules.items():
            part = _component(module.to_config(), module.state_dict(), dtype, source)
            write_component(temporary / name, part.config, part.tensors)
            index[name] = ["diffusers", part.config["_class_name"]]
        conditioner.save(temporary, dtype)
        for name, config in schedulers.items():
            (temporary / name).mkdir()
            write_json(temporary / name / "scheduler_config.json", config)
            index[name] = ["diffusers", config["_class_name"]]
        write_json(temporary / "model_index.json", index)


def scheduler_config(model: Model) -> dict[str, Any]:
    """Return scheduler_config.json of a model.

    Published kinds of models and those with a learned variance have their run in it, others the
    process alone.
    """
    process, defaults = model.denoiser.process, model.defaults
    dynamic = DynamicShift.from_spec(defaults.spacing)
    if dynamic is not None:
        spacing = dynamic.spacing_for(dynamic.top[0])
        return write_scheduler(process, defaults.sampler, spacing, dynamic)
    network, conditioner = _network(model), model.conditioner
    family = families.by_parts(network, conditioner, process)
    published = family is not None and not family.is_transformer
    published = published or pipeline_class(network, conditioner) != OWN
    if not published and not network.learned_variance:
        return to_scheduler_config(process)
    return write_scheduler(process, defaults.sampler, defaults.spacing)


def check_target(folder: str | Path) -> Path:
    """Return the folder to which a model would be saved.

    Raises:
        UserError: a place that holds anything but a model's folder, or that may not be written.
    """
    # behind a link the folder is replaced, not the link
    target = expand_user(folder).resolve()
    if target.is_file() or (
        target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").exists()
    ):
        raise UserError(
            f"{folder} exists and is not a model folder: it is left as it is; "
            "choose another name or remove it first"
        )
    parent = next((p for p in target.parents if p.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"{folder} cannot be written: {parent} is not a folder that you may write to; "
            "choose another place"
        )
    return target
