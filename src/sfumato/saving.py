"""Writes models: a folder in diffusers' layout, or one file.

`model` in this file is a `LatentDiffusion`, or anything with its autoencoder, denoiser,
conditioner, defaults, name and low_res.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component
from sfumato.checkpoints.families import Family
from sfumato.checkpoints.formats.folded import fold
from sfumato.checkpoints.formats.folder import write_component
from sfumato.checkpoints.lazy_tensor import (
    LazyTensors,
    cast,
    checked_finite,
    from_tensors,
    write_file,
)
from sfumato.checkpoints.pipelines import OWN, autoencoder_folder, pipeline_class, pipeline_index
from sfumato.checkpoints.schedulers.config import to_scheduler_config, write_scheduler
from sfumato.checkpoints.schedulers.spacing import DynamicShift
from sfumato.errors import UserError
from sfumato.io.atomic import atomic_folder, write_json


def save_model(
    model: Any, place: str | Path, dtype: torch.dtype | None, source: Path | None = None
) -> None:
    """`LatentDiffusion.save`: a folder, or a file where the name ends in .safetensors.

    Args:
        model: see above
        place: what to write
        dtype: of the weights; None: their own
        source: the file whose weights a model has as they are stored, unchecked; None: they were
        checked
    """
    if Path(place).suffix != ".safetensors":
        _save_folder(model, place, dtype, source)
        return
    network, conditioner = model.denoiser.network, model.conditioner
    family = families.by_parts(network, conditioner, model.denoiser.process)
    raw = None
    if family is not None and not (family.is_transformer and model.low_res is not None):
        checkpoint = disassemble(model, family, dtype, source)
        family = families.by_components(checkpoint.components) or family
        raw = family.single_file(checkpoint)
    if raw is None or family is None:
        with tempfile.TemporaryDirectory() as temporary:
            _save_folder(model, Path(temporary) / "model", dtype, source)
            fold(Path(temporary) / "model", place)
    else:
        write_file(place, raw.tensors, {**raw.metadata, **family.notes(checkpoint, conditioner)})


def disassemble(
    model: Any, family: Family, dtype: torch.dtype | None, source: Path | None = None
) -> Checkpoint:
    """The parts of a model that its single file holds. See `save_model`."""
    parts = {"vae": (model.autoencoder.to_config(), model.autoencoder.state_dict())}
    parts |= {
        model.denoiser.network.part: (
            model.denoiser.network.to_config(),
            model.denoiser.network.state_dict(),
        )
    }
    parts |= family.text_components(model.conditioner)
    schedulers = {"scheduler": scheduler_config(model)}
    if model.low_res is not None:
        schedulers["low_res_scheduler"] = to_scheduler_config(model.low_res)
    return Checkpoint(
        {
            name: Component(_plain(config), _stored(tensors, dtype, source))
            for name, (config, tensors) in parts.items()
        },
        schedulers,
        defaults=model.defaults.to_json(),
        name=model.name,
        family=family,
        conditioner=lambda network, options: model.conditioner,
        path=Path("the model"),
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what depends on how transformers opened it."""
    return {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}


def _stored(tensors: Any, dtype: torch.dtype | None, source: Path | None) -> LazyTensors:
    """Weights as they will lie in the file."""
    table = from_tensors(dict(tensors))
    return cast(table if source is None else checked_finite(table, source), dtype)


def _save_folder(
    model: Any, folder: str | Path, dtype: torch.dtype | None, source: Path | None = None
) -> None:
    """Each part in a folder of its own, and model_index.json, which names them."""
    network, conditioner = model.denoiser.network, model.conditioner
    entries = pipeline_index(network, conditioner, model.defaults)
    scheduler = scheduler_config(model)
    modules = {autoencoder_folder(entries["_class_name"]): model.autoencoder, network.part: network}
    parts = {
        **entries,
        "_sfumato": {
            "version": __version__,
            "name": model.name,
            "defaults": model.defaults.to_json(),
        },
        **{
            name: ["diffusers", module.to_config()["_class_name"]]
            for name, module in modules.items()
        },
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    with atomic_folder(check_target(folder)) as temporary:
        for name, module in modules.items():
            write_component(
                temporary / name, module.to_config(), _stored(module.state_dict(), dtype, source)
            )
        _write(temporary / "scheduler" / "scheduler_config.json", scheduler)
        conditioner.save(temporary, dtype)
        if model.low_res is not None:
            # the class that diffusers' upscaler wants
            small = {**to_scheduler_config(model.low_res), "_class_name": "DDPMScheduler"}
            small.pop("set_alpha_to_one", None)
            _write(temporary / "low_res_scheduler" / "scheduler_config.json", small)
            parts["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
        write_json(temporary / "model_index.json", parts)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir()
    write_json(path, values)


def scheduler_config(model: Any) -> dict[str, Any]:
    """scheduler_config.json of a model: for published kinds and a learned variance the run too, for
    others the process.
    """
    process, sampler, spacing = (
        model.denoiser.process,
        model.defaults.sampler,
        model.defaults.spacing,
    )
    dynamic = DynamicShift.from_spec(spacing)
    if dynamic is not None:
        return write_scheduler(process, sampler, dynamic.spacing_for(dynamic.top[0]), dynamic)
    network, conditioner = model.denoiser.network, model.conditioner
    family = families.by_parts(network, conditioner, process)
    published = (family is not None and not family.is_transformer) or pipeline_class(
        network, conditioner
    ) != OWN
    if not published and not getattr(network, "learned_variance", False):
        return to_scheduler_config(process)
    return write_scheduler(process, sampler, spacing)


def check_target(folder: str | Path) -> Path:
    """The folder to which a model would be saved; `UserError` for a place that holds something
    else, or that may not be written.
    """
    # through a link: the folder behind it is replaced, not the link
    target = Path(folder).expanduser().resolve()
    if target.is_file() or (
        target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").exists()
    ):
        raise UserError(
            f"{folder} exists and is not a model folder: it is left as it is; choose another name or remove it first"
        )
    parent = next((p for p in target.parents if p.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"{folder} cannot be written: {parent} is not a folder that you may write to; choose another place"
        )
    return target
