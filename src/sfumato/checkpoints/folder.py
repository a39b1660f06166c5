"""Folders in diffusers' layout: each part in its own folder with config.json and diffusion_pytorch_model.safetensors.

    vae/  unet/  scheduler/scheduler_config.json  conditioner/config.json  model_index.json

Weights are checked against the network key by key before anything is used: a missing, extra or misshapen key is an error that lists them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.compress.base import Autoencoder
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.errors import UserError
from sfumato.files import read_json, read_tensors, write_json, write_tensors
from sfumato.predict.networks.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = {"AutoencoderKL": (AutoencoderKL, KLConfig), "UNet2DConditionModel": (UNet, UNetConfig)}


def check_keys(expected: dict[str, Tensor], found: dict[str, Tensor], where: object) -> None:
    """`UserError` that lists every missing, extra and misshapen key (the first eight of each)."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in sorted(expected.keys() & found.keys())
        if found[k].shape != expected[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for what, names in (("missing", missing), ("not expected", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit its config: keys {'; '.join(problems)}; use the weights that belong to the config")


def load_part(folder: str | Path, expected: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network from a folder with config.json and weights, in eval mode, in `dtype`; weights with NaN or infinity are refused."""
    folder = Path(folder)
    values = read_json(folder / "config.json")
    name = values.get("_class_name")
    if name not in NETWORKS or (expected is not None and name != expected):
        raise UserError(f"{folder / 'config.json'} is of class {name!r}: expected {expected or ' or '.join(NETWORKS)}")
    network_class, config_class = NETWORKS[name]
    with torch.device("meta"):
        network = network_class(config_class.from_dict(values))
    tensors = read_tensors(folder / WEIGHTS)
    check_keys(network.state_dict(), tensors, folder / WEIGHTS)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder / WEIGHTS}: {key} has NaN or infinite numbers; the file is damaged or its training diverged")
    network.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def save_part(folder: str | Path, network: UNet | Autoencoder, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and the weights (in `dtype`, by default their own), which diffusers opens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v if dtype is None else v.to(dtype) for k, v in network.state_dict().items()}
    write_json(folder / "config.json", network.to_config())
    write_tensors(folder / WEIGHTS, tensors)


def index(folder: str | Path) -> dict[str, Any]:
    """model_index.json of a model folder; a folder without one is a `UserError`."""
    path = Path(folder) / "model_index.json"
    if not path.exists():
        raise UserError(f"{folder} is not a model folder: it has no model_index.json; give a folder that `model.save` or diffusers wrote")
    return read_json(path)
