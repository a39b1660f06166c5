"""Memory that a model needs and a machine has: `sfumato info MODEL` reads no weights.

    in memory   weights + the larger of what a step and decoding allocate
    streamed    twice the largest layer + the same (inference/offload/streaming.py); memory that is
                left keeps layers resident from step to step

Sizes of weights are those of the files' headers. What a step and decoding allocate is counted: the
network of the part's config runs once on the meta device, where tensors have shapes and no numbers.
It runs at the model's default size, for one image with guidance (a batch of two), and the tensors
that live at the same time are added up. Scratch memory of kernels and memory that the C library
keeps are not included.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.checkpoint import class_of
from sfumato.checkpoints.formats.folder import STEM, TEXT_PICKLED, TEXT_STEM, read_index
from sfumato.compress.base import Autoencoder
from sfumato.decode.memory import decode_bytes
from sfumato.errors import WRONG, UserError
from sfumato.io import host_memory
from sfumato.io.atomic import DTYPE_CODES, open_tensors, read_table
from sfumato.io.safetensors import find_weights
from sfumato.predict.networks.base import Network
from sfumato.predict.step_memory import step_bytes

STEMS = ((STEM, None), (TEXT_STEM, TEXT_PICKLED))
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that are not used here."""
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.": "text_encoder",
}
"""Prefixes of parts in single files in the original layouts."""
DENOISERS, AUTOENCODERS = ("unet", "transformer", "prior"), ("vae", "vqvae")
WIDTHS = {torch.float32: 4, torch.bfloat16: 2}


@dataclass(frozen=True)
class Part:
    """Sizes of a part.

    Attributes:
        stored: bytes of its tensors in the files.
        numbers: number of floating-point values.
        largest: those of its largest layer.
        dtypes: names of its dtypes in safetensors files.
    """

    stored: int
    numbers: int
    largest: int
    dtypes: tuple[str, ...]


# ---- files ---------------------------------------------------------------------------------------


def parts_of(path: Path, variant: str | None = None) -> dict[str, Part]:
    """Measure the parts of a model, by name. Of pickled files only the size is known.

    Args:
        path: a model's folder, or a single file.
        variant: the files of a folder to prefer, such as "fp16".

    Raises:
        UserError: a file that is missing or damaged.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            return {"all": _measure([path])}
        return {name: _part(tensors) for name, tensors in _divide(path).items()}
    parts: dict[str, Part] = {}
    for name, entry in read_index(path).items():
        listed = not name.startswith("_") and isinstance(entry, list) and entry[-1] is not None
        if listed and name not in UNUSED and (files := _weights(path / name, variant)):
            parts[name] = _measure(files)
    return parts


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a part's weights; none for schedulers, tokenizers and the like."""
    for stem, pickled in STEMS:
        if any(folder.glob(f"{stem}*")) or (pickled and any(folder.glob(f"{pickled}*"))):
            return find_weights(folder, stem, variant, pickled)
    return []


def _divide(file: Path) -> dict[str, dict[str, Tensor]]:
    """Divide a single file into parts, by the prefixes of its layout or the names of folders."""
    tensors = open_tensors(file)[0]
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        name = PREFIXES[prefix] if prefix else key.split(".", 1)[0]
        parts.setdefault(name, {})[key] = tensor
    names = (*DENOISERS, *AUTOENCODERS, "conditioner", "bert")
    divided = all(name in names or name.startswith("text_encoder") for name in parts)
    return parts if divided else {"all": tensors}


def _measure(files: list[Path]) -> Part:
    tables = [open_tensors(file)[0] for file in files if file.suffix == ".safetensors"]
    if tables:
        return _part({key: tensor for table in tables for key, tensor in table.items()})
    size = sum(file.stat().st_size for file in files)
    return Part(size, size // 4, 0, ("pickled",))


def _part(tensors: Mapping[str, Tensor]) -> Part:
    layers = Counter[str]()
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            layers[key.rpartition(".")[0]] += tensor.numel()
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return Part(
        stored=sum(tensor.nbytes for tensor in tensors.values()),
        numbers=layers.total(),
        largest=max(layers.values(), default=0),
        dtypes=tuple(sorted(DTYPE_CODES.get(name, name) for name in names)),
    )


# ---- runs --------------------------------------------------------------------------------------


def running(path: Path, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that a "step" and a "decode" allocate, as far as they can be counted.

    Args:
        path: a model's folder; nothing is counted for files.
        dtype: of weights and latents.
    """
    files = {name: path / name / "config.json" for name in (*DENOISERS, *AUTOENCODERS)}
    built = {name: _built(file, dtype) for name, file in files.items() if file.exists()}
    network = next((n for n in built.values() if isinstance(n, Network)), None)
    decoder = next((n for n in built.values() if isinstance(n, Autoencoder)), None)
    side = 64 if network is None else network.sample_size
    sizes: dict[str, int] = {}
    with suppress(*WRONG):  # conditions that the config does not determine
        if network is not None:
            sizes["step"] = step_bytes(network, (side, side), rows=2)
    with suppress(*WRONG):
        if decoder is not None:
            sizes["decode"] = decode_bytes(decoder, (side, side))
    return sizes


def _built(config: Path, dtype: torch.dtype) -> nn.Module | None:
    """Build a part on the meta device; None for one that `load` refuses."""
    values = read_table(config)
    classes = class_of(values.get("_class_name"))
    if classes is None:
        return None
    module_class, config_class = classes
    try:
        with torch.device("meta"):
            return module_class(config_class.from_dict(values)).to(dtype).eval()
    except UserError:
        return None


# ---- what fits -----------------------------------------------------------------------------------


def report(path: Path, variant: str | None = None) -> dict[str, Any] | None:
    """Compare the memory that a model needs with that of the machine.

    Args:
        path: a model's folder or single file.
        variant: the files of a folder to prefer, such as "fp16".

    Returns:
        "weights" by part, "beside": allocations of a run by dtype, the "machine", and the "ways" to
        run; all in bytes. None for a path without a model.
    """
    if not path.is_file() and not (path / "model_index.json").exists():
        return None
    parts = parts_of(path, variant)
    machine = _machine()
    ways, beside = {}, {}
    for dtype, width in WIDTHS.items():
        name, sizes = str(dtype).removeprefix("torch."), running(path, dtype)
        beside[name] = sizes
        if sizes:
            all_layers = sum(part.numbers for part in parts.values()) * width
            two_layers = 2 * max(part.largest for part in parts.values()) * width
            for way, resident in (("in memory", all_layers), ("streamed", two_layers)):
                ways[f"{way}, {name}"] = _way(resident + max(sizes.values()), machine)
    weights: dict[str, Any] = {
        name: {"stored": part.stored, "dtypes": list(part.dtypes), "numbers": part.numbers}
        for name, part in parts.items()
    }
    weights["all"] = sum(part.stored for part in parts.values())
    return {"weights": weights, "beside": beside, "machine": machine, "ways": ways}


def _machine() -> dict[str, int | None]:
    """Return bytes of available memory, of Python and its libraries, and of a GPU, if any."""
    machine = {
        "available": host_memory.available_bytes(),
        "libraries": host_memory.resident_bytes(),
    }
    return machine | ({"gpu": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {})


def _way(needs: int, machine: Mapping[str, int | None]) -> dict[str, Any]:
    """Compare needed bytes with available ones; None where the system does not report them."""
    free, gpu = machine["available"], machine.get("gpu")
    way: dict[str, Any] = {"needs": needs, "fits": None if free is None else needs <= free}
    return way if gpu is None else {**way, "fits_gpu": needs <= gpu}
