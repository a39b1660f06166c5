"""An autoencoder that replaces a model's own: another folder's, or a file's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Component, LoadOptions
from sfumato.checkpoints.families.taesd import is_half, load_taesd, pair_of
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.formats.folder import modern, read_component
from sfumato.checkpoints.lazy_tensor import from_tensors, load_tensors
from sfumato.checkpoints.metadata import read_configs
from sfumato.errors import UserError, explained
from sfumato.io.atomic import read_table

_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Fields of an autoencoder that its original file does not hold: the model's own decide."""


def read_autoencoder(
    place: Path, own: dict[str, Any], options: LoadOptions, published: Mapping[str, Any]
) -> Component:
    """Read an autoencoder from another place than the model's.

    Args:
        place: A folder with config.json, a model's folder with vae/ in it, a folder with a pair of
            TAESD's files, one of the pair, or a file under the original names or diffusers'.
        own: The config of the model's own autoencoder, which has the scale of latents.
        options: How the model is opened.
        published: The scale of latents of the model's family, which counts where the model's own
            autoencoder is of another class, such as a tiny one.

    Raises:
        UserError: For a place that is missing, or holds no autoencoder.
    """
    if place.is_dir():
        inside = place / "vae" if (place / "vae" / "config.json").is_file() else place
        if (inside / "config.json").is_file():
            return read_component(inside, options.variant)
        tiny = load_taesd(inside)
        return Component(tiny.to_config(), from_tensors(tiny.state_dict()), path=place)
    if not place.is_file():
        raise UserError(
            f"the autoencoder {place} was not found: expected a folder with its config.json, "
            "or a file of its weights"
        )
    raw = open_file(place, options.opened or torch.float32, mapped=options.mapped)
    raw = raw if options.opened is None else raw.checked()
    if is_half(raw.tensors):
        tiny = load_taesd(*pair_of(place))
        return Component(tiny.to_config(), from_tensors(tiny.state_dict()), path=place)
    if any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in raw.tensors):
        beside = place.with_name("config.json")
        config = read_table(beside) if beside.is_file() else own
        return Component(config, from_tensors(modern(load_tensors(raw.tensors))), path=place)
    family = families.detect(raw.shapes, place)
    with explained(place):
        components = family.read(raw, None, read_configs(raw.metadata, place)).components
    if "vae" not in components:
        raise UserError(
            f"{place} holds {' and '.join(components)} and no autoencoder: expected one, "
            "such as vae-ft-mse-840000-ema-pruned.safetensors"
        )
    vae = components["vae"]
    same = own.get("_class_name", vae.config["_class_name"]) == vae.config["_class_name"]
    scales = {field: own[field] for field in _SCALES if field in own} if same else published
    return Component({**vae.config, **scales}, vae.tensors, path=place)
