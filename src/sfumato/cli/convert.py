"""`sfumato convert SOURCE TARGET`: a model to another layout on disk, or another dtype."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sfumato.cli._options import parse, recorded, refuse, torch_dtype, unset
from sfumato.cli._output import progress, readable_size
from sfumato.errors import UserError

Dtype = Literal["bf16", "fp16", "fp32", "fp8", "fp8-scaled"]


@dataclass(frozen=True)
class Convert:
    """Convert a model between a diffusers folder and one file in its original layout.

    GGUF is read too. A file with a transformer alone becomes a folder with transformer/ in it, and
    back. Models are converted one tensor at a time and need little memory, whatever their size.
    The dtype fp8 stores the matrices of transformers in eight bits (e4m3) and the rest in bf16,
    fp8-scaled with a scale for each matrix.
    """

    source: tyro.conf.Positional[Path]
    """Folder of a model or a part, or a file (.safetensors .sft .ckpt .pt .pth .bin .gguf)."""
    target: tyro.conf.Positional[Path]
    """File (.safetensors) or folder (any other name) to write. It must not exist."""
    dtype: Annotated[Dtype | None, unset("as in the source; bf16 for GGUF, fp32 for U-Nets")] = None
    """Dtype of the stored weights."""
    config: Annotated[Path | None, unset("from the file's keys and shapes")] = None
    """Folder with the file's config.json, or a model's, which adds scheduler and tokenizers."""
    network: Annotated[str | None, unset("the first by name")] = None
    """Family of a file's network if its keys fit several: dit or sit."""
    variant: Annotated[str | None, unset("none")] = None
    """Variant of a folder's files to prefer, such as fp16."""
    tokenizer: Annotated[Path | None, unset("the file's, or this machine's")] = None
    """Folder with the tokenizer of a file with a U-Net; --config is for other files."""
    vae: Annotated[Path | None, unset("the source's")] = None
    """Folder or file with an autoencoder to store instead of a U-Net's own."""


def convert(arguments: Sequence[str]) -> None:
    """Convert a model: folder, original single file, GGUF; bf16, fp16, fp32, fp8."""
    options = parse(Convert, arguments, "convert")
    source, target = options.source, options.target
    whole = target.suffix == ".safetensors"
    if target.exists():
        raise UserError(
            f"{options.target} exists: it is left as it is; choose another name or remove it first"
        )
    if (file := next((p for p in target.parents if p.is_file()), None)) is not None:
        raise UserError(f"{options.target} lies in {file}, which is a file: choose another name")
    if target.suffix in (".gguf", ".sft", ".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{options.target}: single files are written as .safetensors only; "
            "choose such a name, or a folder's"
        )

    import torch

    from sfumato.checkpoints.convert import StoreOptions, open_source, to_file, to_folder
    from sfumato.checkpoints.families import by_name

    eight_bits = options.dtype in ("fp8", "fp8-scaled")
    dtype = torch.float8_e4m3fn if eight_bits else None
    if options.dtype is not None and not eight_bits:
        dtype = torch_dtype(options.dtype)
    classes = by_name(options.network).alone if options.network else ()
    if options.network and not classes:
        raise UserError(
            f"--network {options.network}: expected the family of a diffusion transformer, "
            "such as dit or sit"
        )
    storing = StoreOptions(dtype, options.dtype == "fp8-scaled")
    network = classes[0] if classes else None
    opened = open_source(source, storing, options.config, options.variant, network)
    if opened is None:
        _convert_unet(options, source, target, dtype)
        return
    reason = f" is for U-Nets, and {options.source} holds a transformer: leave it out"
    refuse(options, f"{reason}; --config DIR brings tokenizers", "tokenizer", "vae")
    with progress("converting") as update:
        counts = (to_file if whole else to_folder)(opened, target, storing, update)
    tensors = ", ".join(f"{name} ({n} tensors)" for name, n in counts.items())
    print(f"{options.target}: {tensors}, {_size(target)}")
    if not whole and "text_encoder" in counts and not (target / "tokenizer").exists():
        print(
            f"{options.target} has no tokenizers, which {options.source} does not hold: "
            "--config DIR brings those of a model's folder"
        )


def _convert_unet(options: Convert, source: Path, target: Path, dtype: Any) -> None:
    """Through a model whose weights stay in the source's files until they are written."""
    import torch

    from sfumato.checkpoints.checkpoint import LoadOptions
    from sfumato.loading import open_model
    from sfumato.saving import save_model

    foreign = [f"--dtype {options.dtype}"] * str(options.dtype).startswith("fp8")
    foreign += [f"--{name}" for name in recorded(options, ("config", "network"))]
    if foreign:
        raise UserError(
            f"{foreign[0]} is for diffusion transformers, and {options.source} holds a U-Net: "
            "leave it out"
        )
    dtype = dtype or torch.float32
    reading = LoadOptions(
        dtype=dtype,
        variant=options.variant,
        tokenizer=options.tokenizer,
        vae=options.vae,
        stored=True,
    )
    model = open_model(source, reading)
    save_model(model, target, dtype, source)
    print(f"{options.target}: {_size(target)}")


def _size(target: Path) -> str:
    files = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
    return readable_size(sum(f.stat().st_size for f in files))
