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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.checkpoints.checkpoint import class_of
from sfumato.checkpoints.formats.folder import STEM, TEXT_PICKLED, TEXT_STEM, read_index
from sfumato.compress.base import Autoencoder
from sfumato.errors import WRONG, UserError
from sfumato.io import host_memory
from sfumato.io.atomic import DTYPE_CODES, open_tensors, read_table
from sfumato.io.safetensors import find_weights
from sfumato.predict.networks.base import Network
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

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
TOKENS = {"unet": 77, "transformer": 512}
"""Number of text tokens: CLIP's, and the usual maximum of T5."""


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


# ---- runs ----------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time; `most` is their maximum.

    Tensors that exist before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inputs = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs or {}))
            if isinstance(t, Tensor)
        }
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor, inputs)
        return outputs

    def _add(self, tensor: Tensor, inputs: set[int]) -> None:
        storage, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if storage in inputs and storage not in self._users:  # a view of an earlier tensor
            return
        if storage not in self._users:
            self.now += size
            self.most = max(self.most, self.now)
        self._users[storage] = self._users.get(storage, 0) + 1
        finalize(tensor, self._remove, storage, size)

    def _remove(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self.now -= size


class _Fused(TorchFunctionMode):
    """Attention without a table of scores, as in fused kernels."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that live at once while `run` runs on the meta device."""
    with torch.inference_mode(), torch.device("meta"), _Fused(), _Counting() as counting:
        _ = run()
    return counting.most


def step_bytes(network: Network, side: int, rows: int = 2) -> int:
    """Return the bytes that one call of a network on the meta device allocates.

    Args:
        network: on the meta device.
        side: of the latents, in cells.
        rows: size of the batch.
    """
    dtype = next(network.parameters()).dtype
    x = torch.empty(rows, network.in_channels, side, side, dtype=dtype, device="meta")
    cond = _conditions(network, rows, dtype)
    return x.nbytes + counted(lambda: network(x, torch.empty(rows, device="meta"), cond))


def _conditions(network: Network, rows: int, dtype: torch.dtype) -> Conditioning:
    """Return the tokens and the vector that a network's config determines."""
    wide, count = network.token_width, TOKENS[network.part]
    width = max(wide) if isinstance(wide, tuple) else wide
    tokens = None if width is None else torch.empty(rows, count, width, dtype=dtype, device="meta")
    vector = _sdxl_vector(network.config) if isinstance(network, UNet) else 0
    vector = (vector or network.vector_width or network.classes or 0) + network.guidance_embeds
    return Conditioning(tokens, vector=torch.empty(rows, vector, device="meta") if vector else None)


def _sdxl_vector(config: UNetConfig) -> int:
    """Return the width of a U-Net's vector, in which sizes are not yet sinusoidal features."""
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if not total or not each:
        return total or 0
    # six sizes beside the pooled text, or five of SDXL's refiner
    sizes = 6 if total - 6 * each > 0 and (total - 6 * each) % 256 == 0 else 5
    return total + sizes - sizes * each


def decode_bytes(autoencoder: Autoencoder, side: int) -> int:
    """Return the bytes that decoding one latent on the meta device allocates.

    Args:
        autoencoder: on the meta device.
        side: of the latent, in cells.
    """
    channels, dtype = autoencoder.space.channels, autoencoder.dtype
    z = torch.empty(1, channels, side, side, dtype=dtype, device="meta")
    return counted(lambda: autoencoder.reconstruct(z))


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
            sizes["step"] = step_bytes(network, side)
    with suppress(*WRONG):
        if decoder is not None:
            sizes["decode"] = decode_bytes(decoder, side)
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
