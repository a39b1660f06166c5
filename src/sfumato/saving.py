"""Writes models: a folder in diffusers' layout, or one file.

`model` in this file is a `LatentDiffusion`, or anything with its autoencoder, denoiser,
conditioner, defaults, name and low_res.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.checkpoints.conditioners import has_original, to_notes, to_parts
from sfumato.checkpoints.folder import save_part, storable
from sfumato.checkpoints.names.pipeline import autoencoder_name, pipeline_class, pipeline_index
from sfumato.checkpoints.original import Part, gather, join, notes
from sfumato.checkpoints.schedulers.config import to_scheduler_config, write_scheduler
from sfumato.checkpoints.schedulers.spacing import DynamicShift
from sfumato.checkpoints.single_file import fold
from sfumato.checkpoints.tokenizer import LOW_RES, MODEL, SCHEDULER
from sfumato.checkpoints.whole_models import has_whole, write_model
from sfumato.errors import UserError
from sfumato.io.atomic import atomic_folder, write_json, write_tensors


def save_model(model: Any, place: str | Path, dtype: torch.dtype | None) -> None:
    """`LatentDiffusion.save`: a folder, or a file where the name ends in .safetensors."""
    if Path(place).suffix != ".safetensors":
        _save_folder(model, place, dtype)
    elif has_original(model.denoiser.network, model.conditioner):
        _save_original(model, place, dtype)
    elif not _save_whole(model, place, dtype):
        with tempfile.TemporaryDirectory() as temporary:
            _save_folder(model, Path(temporary) / "model", dtype)
            fold(Path(temporary) / "model", place)


def _save_folder(model: Any, folder: str | Path, dtype: torch.dtype | None) -> None:
    """Each part in a folder of its own, and model_index.json, which names them."""
    entries = pipeline_index(model.denoiser.network, model.conditioner, model.defaults)
    vae = autoencoder_name(entries["_class_name"])
    with atomic_folder(check_target(folder)) as temporary:
        save_part(temporary / vae, model.autoencoder, dtype)
        network = model.denoiser.network
        save_part(temporary / network.part, network, dtype)
        scheduler = _scheduler(model)
        _write(temporary / "scheduler" / "scheduler_config.json", scheduler)
        model.conditioner.save(temporary, dtype)
        parts = {
            **entries,
            "_sfumato": {
                "version": __version__,
                "name": model.name,
                "defaults": model.defaults.to_json(),
            },
            vae: ["diffusers", model.autoencoder.to_config()["_class_name"]],
            network.part: ["diffusers", network.to_config()["_class_name"]],
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
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


def _scheduler(model: Any) -> dict[str, Any]:
    """The scheduler config of a model's folder: for published kinds of models and a learned
    variance the run too, for others the process.
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
    ours = (
        not has_original(network, conditioner)
        and pipeline_class(network, conditioner) == "LatentDiffusion"
    )
    if ours and not getattr(network, "learned_variance", False):
        return to_scheduler_config(process)
    return write_scheduler(process, sampler, spacing)


def _save_original(model: Any, file: str | Path, dtype: torch.dtype | None) -> None:
    """One file under the original names; what is beside the weights there (the tokenizer) goes into
    its metadata.
    """
    networks = {"unet": model.denoiser.network, "vae": model.autoencoder}
    configs = {name: network.to_config() for name, network in networks.items()}
    tensors = {name: network.state_dict() for name, network in networks.items()}
    for name, (config, table) in to_parts(model.conditioner).items():
        configs[name], tensors[name] = config, table
    cast = {name: storable(table, dtype) for name, table in tensors.items()}
    scheduler = _scheduler(model)
    parts = gather(
        {name: Part(configs[name], table) for name, table in cast.items()}, {"scheduler": scheduler}
    )
    ours = {SCHEDULER: json.dumps(scheduler), **to_notes(model.conditioner)}
    if model.low_res is not None:
        ours[LOW_RES] = json.dumps(to_scheduler_config(model.low_res))
    write_tensors(file, join(parts), {**notes(parts), **ours})


def _save_whole(model: Any, file: str | Path, dtype: torch.dtype | None) -> bool:
    """One file with a diffusion transformer under the original names; False, and nothing is
    written, where others would read another model.
    """
    network, conditioner = model.denoiser.network, model.conditioner
    if not has_whole(network, conditioner, model.denoiser.process) or model.low_res is not None:
        return False
    found = write_model(network, model.autoencoder, conditioner, dtype)
    if found is None:
        return False
    tensors, notes = found
    ours = {
        SCHEDULER: json.dumps(_scheduler(model)),
        MODEL: json.dumps({"name": model.name, "defaults": model.defaults.to_json()}),
    }
    write_tensors(file, tensors, {**notes, **ours})
    return True


def check_target(folder: str | Path) -> Path:
    """Where a model would be saved; `UserError` for a place that holds something else, or that may
    not be written.
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
