"""Results of cases: named arrays with their SHA-256, and texts."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A named function without arguments, whose results are compared.

    run: returns tensors, pictures, texts and numbers, in any nesting of lists and mappings.
    raises: the case is an error, and the class of the exception is its result.
    """

    name: str
    run: Callable[[], Any]
    raises: bool = False


class Notes(dict[str, Any]):
    """Texts whose differences are shown and don't count, such as a PNG's metadata."""


class Hashed(dict[str, Any]):
    """Tensors of files: their hashes are compared, and their numbers kept with --arrays."""


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, tensor or array or text or notes) of a nested value."""
    if isinstance(value, Tensor | np.ndarray | Notes | Hashed):
        yield path, value
    elif isinstance(value, Image.Image):
        yield f"{path}:{value.mode}", np.asarray(value)
    elif isinstance(value, bytes):
        yield path, np.frombuffer(value, np.uint8)
    elif isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield f"{path}/length", json.dumps(len(value))
        for k, part in enumerate(value):
            yield from leaves(part, f"{path}/{k}")
    else:
        yield path, json.dumps(value)


def described(value: Tensor | np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Dtype, shape and SHA-256 of the bytes, and the numbers as numpy has them."""
    tensor = (
        value.detach().cpu()
        if isinstance(value, Tensor)
        else torch.from_numpy(np.ascontiguousarray(value).copy())
    )
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    about = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    plain = (
        tensor.numpy()
        if tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
        else tensor.float().numpy()
    )
    return about, plain


def write(folder: Path, index: int, value: Any, every: bool) -> dict[str, Any]:
    """Write the arrays of a result, with `every` also those of `Hashed`, and return its entry."""
    entry: dict[str, Any] = {"leaves": {}, "texts": {}, "notes": {}}
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in leaves(value):
        if isinstance(leaf, Notes):
            entry["notes"][path] = leaf
        elif isinstance(leaf, Hashed):
            for name, tensor in leaf.items():
                about, plain = described(tensor)
                if every:
                    arrays[str(len(entry["leaves"]))] = plain
                entry["leaves"][f"{path}/{name}"] = about
        elif isinstance(leaf, str):
            entry["texts"][path] = leaf
        else:
            about, arrays[str(len(entry["leaves"]))] = described(leaf)
            entry["leaves"][path] = about
    if arrays:
        np.savez(folder / f"{index}.npz", **arrays)
    return entry
