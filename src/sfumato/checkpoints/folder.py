"""Folders in diffusers' layout: each part in its own folder with config.json and
diffusion_pytorch_model.safetensors.

    vae/  unet/  scheduler/scheduler_config.json  conditioner/config.json  model_index.json

Weights are checked against the network key by key before anything is used: a missing, extra or
misshapen key is an error that lists them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.checkpoints.names.vae import modern
from sfumato.compress.base import Autoencoder
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.compress.kl_flux2 import AutoencoderKLFlux2, KLFlux2Config
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.compress.vq import VQConfig, VQModel
from sfumato.errors import NumericalError, UserError, explained
from sfumato.io.atomic import read_table, write_json, write_tensors
from sfumato.io.safetensors import (
    EIGHTS,
    cast,
    check_keys,
    find_weights,
    looked_at,
    not_finite,
    read_weights,
    require_finite,
    unscaled,
)
from sfumato.predict.networks.base import Network, registered

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
AUTOENCODERS = {
    "AutoencoderKL": (AutoencoderKL, KLConfig),
    "AutoencoderKLFlux2": (AutoencoderKLFlux2, KLFlux2Config),
    "AutoencoderTiny": (AutoencoderTiny, TinyConfig),
    "SfumatoAutoencoderTiny": (AutoencoderTiny, TinyConfig),
    "VQModel": (VQModel, VQConfig),
}
"""Autoencoders; networks are found by their folder."""


class _Unfilled(TorchFunctionMode):
    """Layers are built without random weights, which the file's replace. On the meta device torch
    would draw them in Python, and import its compiler to do so: more than a second.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_part(
    folder: str | Path,
    expected: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
    unsaid: dict[str, Any] | None = None,
) -> nn.Module:
    """A network from a folder with config.json and weights, in eval mode, in `dtype`; weights with
    NaN or infinity are refused.

    dtype None: as stored, and nothing is read yet nor looked for NaN; who streams the weights does
    both. variant: the files to prefer, such as "fp16". Shards and pickled files are read too: see
    weights.py. unsaid: fields of the config, where it does not have them.
    """
    folder = Path(folder)
    config = folder / "config.json"
    values = {**(unsaid or {}), **read_table(config)}
    files = find_weights(folder, STEM, variant)
    found = read_weights(files)
    return build_part(
        values,
        found,
        config,
        files[0] if len(files) == 1 else folder,
        expected,
        dtype,
        lambda: looked_at(files, found, dtype),
    )


def build_part(
    values: dict[str, Any],
    found: dict[str, Tensor],
    config: Path,
    where: Path,
    expected: str | None,
    dtype: torch.dtype | None,
    looked: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """`load_part` for a config and tensors in memory; config and where: what they were read from,
    for what is said about them.

    looked: looks for NaN and infinity where they were read from, and says whether it did.
    """
    name = values.get("_class_name")
    known = known_class(name)
    if known is None or (expected is not None and name != expected):
        raise UserError(
            f"{config} is of class {name!r}: expected {expected or ' or '.join([*AUTOENCODERS, *registered()])}"
        )
    network_class, config_class = known
    with explained(config), torch.device("meta"), _Unfilled():
        network = network_class(config_class.from_dict(values))
        # the statistics of the latent are checked when they are read
        _ = getattr(network, "space", None)
    with explained(where):
        found = unscaled(modern(found), dtype or torch.float32)
    check_keys(network.state_dict(), found, where)
    tensors = {k: _in(v, dtype).contiguous() for k, v in found.items()}
    if not looked():
        require_finite(tensors, where)
    network.load_state_dict(tensors, assign=True)
    with explained(where):
        # some keep the statistics of the latent among the weights
        _ = getattr(network, "space", None)
    return network.eval().requires_grad_(False)


def known_class(name: Any) -> tuple[Any, Any] | None:
    """The network or autoencoder, and its config, that a config.json's "_class_name" means; None
    for one that there is not.
    """
    if not isinstance(name, str):
        return None
    return AUTOENCODERS[name] if name in AUTOENCODERS else registered().get(name)


def _in(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in `dtype`; what counts (a batch norm's batches) stays a whole number."""
    return cast(tensor, dtype) if dtype is not None and tensor.is_floating_point() else tensor


def save_part(
    folder: str | Path, network: Network | Autoencoder, dtype: torch.dtype | None = None
) -> None:
    """Writes config.json and the weights (in `dtype`, by default their own), which diffusers opens.

    `NumericalError` for a weight that is NaN or infinite in `dtype` (float16 ends at 65504):
    `load_part` would refuse the file.
    """
    folder, tensors = Path(folder), storable(network.state_dict(), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", network.to_config())
    write_tensors(folder / WEIGHTS, tensors)


def storable(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights in the dtype that is to be stored (None: their own); `NumericalError` for one that is
    NaN or infinite in it.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(
            f"dtype {dtype}: weights are stored as floating-point numbers such as torch.float32 or torch.float16"
        )
    tensors = {k: _in(v, dtype) for k, v in tensors.items()}
    for key in not_finite(tensors):
        kind = str(tensors[key].dtype).removeprefix("torch.")
        if dtype in EIGHTS:
            raise NumericalError(
                f"weight {key} is NaN or beyond {torch.finfo(dtype).max:g}, the largest number of {kind}: nothing was written; store it in "
                "bfloat16, or scaled"
            )
        raise NumericalError(
            f"weight {key} is NaN or infinite in {kind}: nothing was written; store it in float32, or repair the training"
        )
    return tensors


def index(folder: str | Path) -> dict[str, Any]:
    """model_index.json of a model folder; a folder without one is a `UserError`."""
    path = Path(folder) / "model_index.json"
    if not path.exists():
        raise UserError(
            f"{folder} is not a model folder: it has no model_index.json; give a folder that `model.save` or diffusers wrote"
        )
    return read_table(path)
