"""Opens models: bundled names, folders in diffusers' layout, single files, hub ids."""

import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.folder import explained, index, load_part, read_table
from sfumato.checkpoints.names.pipeline import pipeline_defaults
from sfumato.checkpoints.names.scheduler import from_scheduler_config
from sfumato.checkpoints.single_file import unfold
from sfumato.compress.base import Autoencoder
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.denoiser import Denoiser
from sfumato.registry import find
from sfumato.sampling import Defaults


def bundled() -> dict[str, Path]:
    """The models that travel in the package, by name."""
    root = Path(str(resources.files("sfumato"))) / "bundled"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "model_index.json").exists()} if root.is_dir() else {}


def load(source: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, variant: str | None = None) -> LatentDiffusion:
    """Opens a model: a bundled name ("fashion"), a folder in diffusers' layout, a single file, or a hub id

    ("owner/name"; its files are cached by `huggingface_hub`). dtype: of all weights (default: float32). variant: the files to prefer, such
    as "fp16".
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"dtype={dtype}: expected a floating-point one such as torch.bfloat16")
    how = _How(device, dtype or torch.float32, variant)
    found = bundled()
    path = found.get(str(source), Path(source).expanduser())
    if path.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(path):
                    unfold(path, temporary)
                return _open(Path(temporary), path.stem, how)
            except UserError as error:  # what is wrong is wrong in the file that the user named
                raise UserError(str(error).replace(temporary, str(path))) from error
    if not path.is_dir():
        if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
            path = _from_hub(str(source))
        else:
            known = ", ".join(found) or "none"
            raise UserError(
                f"model {str(source)!r} was not found: expected a bundled name ({known}), a folder, or a hub id such as owner/name"
            )
    return _open(path, path.name, how)


@dataclass(frozen=True)
class _How:
    device: str
    dtype: torch.dtype
    variant: str | None


def _open(path: Path, name: str, how: _How) -> LatentDiffusion:
    """Builds a model from a folder in diffusers' layout."""
    parts = index(path)
    if "unet" not in parts or "vae" not in parts:
        raise UserError(
            f"{path}/model_index.json names {', '.join(k for k in parts if not k.startswith('_'))}: expected at least vae and unet"
        )
    autoencoder = load_part(path / "vae", None, how.dtype, how.variant)
    network = load_part(path / "unet", "UNet2DConditionModel", how.dtype, how.variant)
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(f"{path}/vae is a {type(autoencoder).__name__}: expected an autoencoder")
    scheduler = path / "scheduler" / "scheduler_config.json"
    with explained(scheduler):
        process = from_scheduler_config(read_table(scheduler))
    conditioner = _conditioner(path, parts, how)
    with explained(path / "model_index.json"):
        notes = parts.get("_sfumato", {})
        given = notes.get("defaults", {} if "_sfumato" in parts else pipeline_defaults(parts))
        defaults = Defaults(**{k: v for k, v in given.items() if k in Defaults.__dataclass_fields__})
    _check_parts(path, autoencoder, network, conditioner)
    model = LatentDiffusion(autoencoder, Denoiser(network, process), conditioner, defaults, str(notes.get("name", name)))
    return model if how.device == "cpu" else model.to(how.device)


def _conditioner(path: Path, parts: dict[str, Any], how: _How) -> Any:
    """What turns prompts into conditioning: the text encoders of the folder, or the conditioner that sfumato wrote."""
    if any(key.startswith("text_encoder") and value != [None, None] for key, value in parts.items()):
        return find("predict.conditioners", "clip_text").from_folder(path, how.dtype)
    config = path / "conditioner" / "config.json"
    if not config.exists():
        raise UserError(f"{path} has neither a text encoder nor a conditioner/config.json: nothing there reads prompts")
    with explained(config):
        values = read_table(config)
        return find("predict.conditioners", values.get("_class_name", "")).from_config(values)


def _check_parts(path: Path, autoencoder: Autoencoder, network: Any, conditioner: Any) -> None:
    """`UserError` where the parts of a folder belong to different models."""
    channels, config, classes = autoencoder.space.channels, network.config, len(getattr(conditioner, "names", ()))
    text, wide = getattr(conditioner, "width", None), config.cross_attention_dim if config.attends_to_tokens else None
    if config.out_channels != channels or config.in_channels < channels:
        found = f"unet takes {config.in_channels} channels and gives {config.out_channels}, latents of vae have {channels}"
    elif text != wide and wide != (text,) * len(wide if isinstance(wide, tuple) else ()):
        found = f"unet attends to tokens of width {wide}, the text encoders give {text}"
    elif text is None and config.class_embed_type is None and (config.num_class_embeds or 0) != (classes + 1 if classes else 0):
        found = f"unet has {config.num_class_embeds or 0} class embeddings, conditioner has {classes} classes (and one for none)"
    else:
        return
    raise UserError(f"the parts of {path} do not fit: {found}; use parts of one model")


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub repository (`huggingface_hub`), fetched when it is not there and the network is."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the library raises a dozen kinds: all of them mean that the model is not to be had
        raise UserError(
            f"model {name!r} could not be had from the hub ({type(error).__name__}): check the name and the network, or give a folder"
        ) from error
