"""File formats: bytes -> tensors and metadata by the file's own names, without a model.

safetensors   .safetensors, .sft          gguf     .gguf, or a file that begins with GGUF
pickle        .ckpt, .bin, .pt, .pth      folded   a model's folder in one safetensors file
folder        a model's folder in diffusers' layout
lone_vae      an autoencoder that replaces a model's own
"""

from pathlib import Path

import torch

from sfumato.checkpoints.checkpoint import RawCheckpoint
from sfumato.checkpoints.formats.folded import is_folded
from sfumato.checkpoints.formats.gguf import is_gguf, read_gguf
from sfumato.checkpoints.lazy_tensor import apply_scales, from_tensors
from sfumato.errors import UserError
from sfumato.io.atomic import open_tensors
from sfumato.io.key_marks import require_unquantized, unwrapped
from sfumato.io.pickles import read_pickle, state_dict
from sfumato.io.safetensors import scale_keys
from sfumato.io.signatures import another_kind, is_safetensors

SAFE = (".safetensors", ".sft")
PICKLES = (".ckpt", ".bin", ".pt", ".pth")


class NotMapped(UserError):
    """A file whose weights are no views of it: they are computed, or pickled."""


def open_file(
    path: Path, dtype: torch.dtype = torch.float32, mapped: bool = False
) -> RawCheckpoint:
    """Open a single file, once; weights stay where they are.

    Weights of eight bits that have a scale are multiplied by it when they are loaded.

    Args:
        path: the file.
        dtype: of GGUF's weights.
        mapped: True where every tensor must be a view of the file, to be streamed.

    Raises:
        UserError: a file that is missing, damaged, quantised or of another kind, a pickle that
            would run code, or a file that cannot be streamed where it must be.
    """
    if mapped and path.suffix in PICKLES and not is_safetensors(path):
        raise NotMapped(
            f"{path} is pickled and cannot be streamed: "
            "`sfumato convert` it to safetensors, and stream that"
        )
    raw = _open(path, dtype)
    if mapped and not raw.mapped:
        raise NotMapped(
            f"{path} cannot be streamed: its weights are quantised, or have scales; "
            "`sfumato convert` it to a folder in bf16, and stream that"
        )
    return raw


def _open(path: Path, dtype: torch.dtype) -> RawCheckpoint:
    # A name can be wrong. A pickle is read under the name of one only: it may be refused there.
    safe = is_safetensors(path)
    if is_gguf(path) or (path.suffix == ".gguf" and not safe):
        return RawCheckpoint(read_gguf(path, dtype).tensors, {}, path, mapped=False)
    if path.suffix in SAFE or safe:
        tensors, metadata = open_tensors(path)
        require_unquantized(tensors, path)
        mapped = not scale_keys({key: tensor.dtype for key, tensor in tensors.items()})
        table = from_tensors(unwrapped(tensors, path))
        table = table if is_folded(metadata) else apply_scales(table)
        return RawCheckpoint(table, metadata, path, mapped)
    if path.suffix in PICKLES:
        values = read_pickle(path)
        step = values.get("global_step")
        metadata = {"global_step": str(step)} if isinstance(step, int) else {}
        weights = state_dict(values, path)
        require_unquantized(weights, path)
        table = from_tensors(unwrapped(weights, path))
        return RawCheckpoint(table, metadata, path, mapped=False)
    if path.suffix == ".json" and (path.parent / "model_index.json").is_file():
        raise UserError(f"{path} describes the model {path.absolute().parent}: give that folder")
    endings = f"expected a file that ends in {', '.join((*SAFE, *PICKLES, '.gguf'))}"
    kind = another_kind(path)
    raise UserError(f"{path}: {endings}; {kind}" if kind else f"{path}: {endings}")
