"""What a model takes and what a machine has, said before any weight is read: `sfumato info MODEL`.

    in memory   weights + the largest of what a step and decoding take beside them
    streamed    twice the largest layer + the same (inference/offload/streaming.py); what memory is
                left keeps layers from step to step

Sizes of weights are those of the files' headers. What a step and decoding take is counted: the
network of the part's config is run once on the meta device, where tensors have shapes and no
numbers, at the model's default size, one picture with guidance (a batch of two); what lives at the
same time is added up. Scratch memory of the kernels is not in it, nor what the C library keeps.
"""

import json
from collections.abc import Iterator, Mapping
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
from sfumato.checkpoints.formats.folder import read_index
from sfumato.errors import WRONG, UserError
from sfumato.io import host_memory
from sfumato.io.atomic import read_table
from sfumato.io.safetensors import find_weights
from sfumato.predict.networks.base import Network
from sfumato.types import Conditioning

STEMS = (("diffusion_pytorch_model", None), ("model", "pytorch_model"))
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that make no picture here."""
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.": "text_encoder",
}
"""How single files in the layouts of their first publication name their parts."""
DENOISERS, AUTOENCODERS = ("unet", "transformer", "prior"), ("vae", "vqvae")
WIDTHS = {torch.float32: 4, torch.bfloat16: 2}
TOKENS = {"unet": 77, "transformer": 512}
"""Text tokens that models are told: CLIP's; T5's, the most that is usual."""


@dataclass(frozen=True)
class Part:
    """stored: bytes of its tensors in the files. numbers: floating-point ones. largest: those of
    its largest layer.
    """

    stored: int
    numbers: int
    largest: int
    dtypes: tuple[str, ...]


# ---- what the files hold -------------------------------------------------------------------------


def header(file: Path) -> dict[str, Any]:
    """The table at the begin of a safetensors file: {key: {dtype, shape, data_offsets}}; no weight
    is read.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            table = json.loads(opened.read(length))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: expected a safetensors file there") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}): it may be truncated; copy or download it again"
        ) from error
    return {key: entry for key, entry in table.items() if key != "__metadata__"}


def parts_of(path: Path, variant: str | None = None) -> dict[str, Part]:
    """The parts of a model folder, or of a single file, by name. Of pickled files only their size
    is known.
    """
    if path.is_file():
        return (
            {name: _part(table) for name, table in _divided(path).items()}
            if path.suffix == ".safetensors"
            else {"all": _pickled([path])}
        )
    found = {}
    for name, entry in read_index(path).items():
        if (
            not name.startswith("_")
            and isinstance(entry, list)
            and entry[-1] is not None
            and name not in UNUSED
        ):
            files = _weights(path / name, variant)
            if files:
                tables = [header(file) for file in files if file.suffix == ".safetensors"]
                found[name] = (
                    _part({k: v for table in tables for k, v in table.items()})
                    if tables
                    else _pickled(files)
                )
    return found


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The files of a part's weights; none for schedulers, tokenizers and the like."""
    for stem, pickled in STEMS:
        if any(folder.glob(f"{stem}*")) or (pickled and any(folder.glob(f"{pickled}*"))):
            return find_weights(folder, stem, variant, pickled)
    return []


def _divided(file: Path) -> dict[str, dict[str, Any]]:
    """A single file's table, part by part: by the prefixes of the old layouts, or by the names of
    folders in our own.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, entry in header(file).items():
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        name = PREFIXES[prefix] if prefix else key.split(".", 1)[0]
        found.setdefault(name, {})[key] = entry
    known = (*DENOISERS, *AUTOENCODERS, "conditioner", "bert")
    if all(name in known or name.startswith("text_encoder") for name in found):
        return found
    return {"all": {key: entry for table in found.values() for key, entry in table.items()}}


def _part(table: Mapping[str, Any]) -> Part:
    layers: dict[str, int] = {}
    stored, numbers = 0, 0
    for key, entry in table.items():
        count = 1
        for side in entry["shape"]:
            count *= side
        stored += entry["data_offsets"][1] - entry["data_offsets"][0]
        if "F" in entry["dtype"]:  # F32, BF16, F8_E4M3 ...
            numbers += count
            layer = key.rpartition(".")[0]
            layers[layer] = layers.get(layer, 0) + count
    return Part(
        stored,
        numbers,
        max(layers.values(), default=0),
        tuple(sorted({entry["dtype"] for entry in table.values()})),
    )


def _pickled(files: list[Path]) -> Part:
    size = sum(file.stat().st_size for file in files)
    return Part(size, size // 4, 0, ("pickled",))


# ---- what running takes --------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
    """Bytes of tensors that live at the same time. `most`: at the worst moment, without what was
    there before.
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
        known = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs or {}))
            if isinstance(t, Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._seen(tensor, known)
        return found

    def _seen(self, tensor: Tensor, known: set[int]) -> None:
        storage, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if storage in known and storage not in self._users:  # a view of what was there before
            return
        if storage not in self._users:
            self.now += size
            self.most = max(self.most, self.now)
        self._users[storage] = self._users.get(storage, 0) + 1
        finalize(tensor, self._gone, storage, size)

    def _gone(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self.now -= size


class _Fused(TorchFunctionMode):
    """Attention keeps no scores, as in the kernels that run it."""

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


def counted(run: Any) -> int:
    """Bytes of tensors that live at the same time while `run` runs on the meta device."""
    with torch.inference_mode(), torch.device("meta"), _Fused(), _Counting() as counting:
        _ = run()
    return counting.most


def step_bytes(network: Network, size: tuple[int, int], rows: int = 2) -> int:
    """What one call of a denoiser on the meta device takes for latents of `size`, beside its
    weights.
    """
    dtype = next(network.parameters()).dtype
    x = torch.empty(rows, network.in_channels, *size, dtype=dtype, device="meta")
    asked = _conditions(network, rows, dtype)
    return x.nbytes + counted(lambda: network(x, torch.empty(rows, device="meta"), asked))


def _conditions(network: Network, rows: int, dtype: torch.dtype) -> Conditioning:
    """What such a network is told, as far as it says: tokens, and a vector."""
    config, wide = network.config, network.token_width
    width, count = max(wide) if isinstance(wide, tuple) else wide, TOKENS[network.part]
    tokens = None if width is None else torch.empty(rows, count, width, dtype=dtype, device="meta")
    joined, each = (
        getattr(config, name, None)
        for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    )
    if joined and each:  # six numbers beside the pooled text, or SDXL's refiner's five
        numbers = 6 if joined - 6 * each > 0 and (joined - 6 * each) % 256 == 0 else 5
        joined += numbers - numbers * each
    vector = (joined or network.vector_width or network.classes or 0) + network.guidance_embeds
    return Conditioning(tokens, vector=torch.empty(rows, vector, device="meta") if vector else None)


def decode_bytes(autoencoder: nn.Module, size: tuple[int, int]) -> int:
    """What decoding one latent of `size` at once takes on the meta device, beside the weights."""
    dtype, channels = next(autoencoder.parameters()).dtype, autoencoder.space.channels  # pyright: ignore
    z = torch.empty(1, channels, *size, dtype=dtype, device="meta")  # pyright: ignore
    return counted(lambda: autoencoder.reconstruct(z))  # pyright: ignore


def running(path: Path, dtype: torch.dtype) -> dict[str, int]:
    """{"step", "decode"}: bytes that each takes beside the weights; empty for what cannot be
    counted.
    """
    if not path.is_dir():
        return {}
    parts = {name: path / name / "config.json" for name in (*DENOISERS, *AUTOENCODERS)}
    built = {name: _built(config, dtype) for name, config in parts.items() if config.exists()}
    network = next((n for name in DENOISERS if (n := built.get(name)) is not None), None)
    decoder = next((n for name in AUTOENCODERS if (n := built.get(name)) is not None), None)
    side = network.sample_size if isinstance(network, Network) else 64
    size = (side, side)
    found: dict[str, int] = {}
    for name, count in (
        ("step", lambda: step_bytes(network, size)),  # pyright: ignore
        ("decode", lambda: decode_bytes(decoder, size)),  # pyright: ignore
    ):
        if (network if name == "step" else decoder) is not None:
            try:
                found[name] = count()
            except WRONG:  # it is told more than its config says
                continue
    return found


def _built(config: Path, dtype: torch.dtype) -> nn.Module | None:
    values = read_table(config)
    known = class_of(values.get("_class_name"))
    if known is None:
        return None
    network, settings = known
    try:
        with torch.device("meta"):
            return network(settings.from_dict(values)).to(dtype).eval()  # pyright: ignore
    except UserError:  # whoever opens it is told what is wrong
        return None


# ---- what fits -----------------------------------------------------------------------------------


def report(path: Path, variant: str | None = None) -> dict[str, Any] | None:
    """Weights, what running takes, what the machine has, and which ways fit, all in bytes; None for
    a path at which no model is.
    """
    if not path.is_file() and not (path / "model_index.json").exists():
        return None
    parts = parts_of(path, variant)
    machine = dict(_machine())
    ways, needs = {}, {}
    for dtype, width in WIDTHS.items():
        name, beside = str(dtype).removeprefix("torch."), running(path, dtype)
        needs[name] = beside
        if beside:
            most = max(beside.values())
            weights = sum(part.numbers for part in parts.values()) * width
            layer = 2 * max(part.largest for part in parts.values()) * width
            for way, taken in (("in memory", weights), ("streamed", layer)):
                ways[f"{way}, {name}"] = _way(taken + most, machine)
    listed = {
        name: {"stored": part.stored, "dtypes": list(part.dtypes), "numbers": part.numbers}
        for name, part in parts.items()
    }
    return {
        "weights": {**listed, "all": sum(part.stored for part in parts.values())},
        "beside": needs,
        "machine": machine,
        "ways": ways,
    }


def _machine() -> Iterator[tuple[str, int | None]]:
    """Bytes that can be had: of memory; of a GPU's, if there is one; and what Python and its
    libraries hold already.
    """
    yield "available", host_memory.available_bytes()
    yield "libraries", host_memory.resident_bytes()
    if torch.cuda.is_available():
        yield "gpu", torch.cuda.mem_get_info()[0]


def _way(needs: int, machine: Mapping[str, int | None]) -> dict[str, Any]:
    """Whether so many bytes are to be had; None where the system does not say."""
    free = machine["available"]
    found: dict[str, Any] = {"needs": needs, "fits": None if free is None else needs <= free}
    gpu = machine.get("gpu")
    return found if gpu is None else {**found, "fits_gpu": needs <= gpu}
