"""The weights of one part of a model folder: whole or in shards, safetensors or pickled.

    diffusion_pytorch_model.safetensors              diffusion_pytorch_model.fp16.safetensors
    diffusion_pytorch_model.safetensors.index.json   {"weight_map": {key: file of a shard}}
                                                     .bin instead of .safetensors: pickled

Safetensors files are preferred, and memory-mapped. Pickled files are read with `weights_only`,
which runs no code and refuses files that need it.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sfumato.errors import NumericalError, UserError
from sfumato.io import host_memory
from sfumato.io.atomic import read_json, read_tensors
from sfumato.io.key_marks import require_unquantized, unwrapped
from sfumato.io.pickles import read_pickle
from sfumato.io.signatures import is_safetensors

ENDINGS = (".safetensors", ".bin")
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Formats of eight bits, with largest numbers 448 and 57344.

Micikevicius et al. 2022, arXiv:2209.05433.
"""
Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors" or is_safetensors(path):
        return read_tensors(path)
    values = read_pickle(path)
    strange = [k for k, v in values.items() if not isinstance(v, Tensor)]
    if strange:
        raise UserError(
            f"{path} holds values that are not tensors ({', '.join(map(repr, strange[:8]))}): "
            "expected a table of tensors"
        )
    return values


def find_weights(
    folder: str | Path, stem: str, variant: str | None = None, pickled: str | None = None
) -> list[Path]:
    """Find the file of a part's weights, or its shards.

    Args:
        folder: the part's folder.
        stem: the beginning of the files' names.
        variant: the files to prefer, such as "fp16".
        pickled: the stem of pickled files, where it is another one.

    Raises:
        UserError: no such file; the message lists the folder's files.
    """
    folder = Path(folder)
    files = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    chosen = choose_weights(files, stem, variant, pickled)
    if chosen is None:
        raise no_weights(folder, files if folder.is_dir() else None, stem, variant)
    if not chosen.endswith(".json"):
        return [folder / chosen]
    return [folder / name for name in shard_names(folder / chosen, files)]


def choose_weights(
    names: Collection[str], stem: str, variant: str | None = None, pickled: str | None = None
) -> str | None:
    """Choose the file of a part's weights, or the index of its shards; None: there is neither.

    The index of a variant has three names: `STEM.safetensors.index.fp16.json` of transformers and
    of diffusers since version 0.32, `STEM.safetensors.fp16.index.json` of earlier ones, and
    `STEM.fp16.safetensors.index.json`.

    Args:
        names: the files of the part's folder.
        stem: the beginning of the files' names.
        variant: the files to prefer, such as "fp16".
        pickled: the stem of pickled files, where it is another one.
    """
    stems = {ENDINGS[0]: stem, ENDINGS[1]: pickled or stem}
    for mark in [f".{variant}", ""] if variant else [""]:
        for ending in ENDINGS:
            start = stems[ending]
            candidates = (
                f"{start}{mark}{ending}",
                f"{start}{ending}.index{mark}.json",
                f"{start}{ending}{mark}.index.json",
                f"{start}{mark}{ending}.index.json",
            )
            for name in candidates:
                if name in names:
                    return name
    return None


def has_variant(
    names: Collection[str], stem: str, variant: str, pickled: str | None = None
) -> bool:
    """Return True where a part has weights of a variant; arguments as of `choose_weights`."""
    chosen = choose_weights(names, stem, variant, pickled)
    return chosen != choose_weights(names, stem, None, pickled)


def no_weights(
    folder: object, files: Sequence[str] | None, stem: str, variant: str | None = None
) -> UserError:
    """Return the error for a part without weights.

    Args:
        folder: the part's folder.
        files: its files; None: there is no such folder.
        stem: the beginning of the files' names.
        variant: the files that were asked for.
    """
    present = "nothing" if files is None else ", ".join(files)
    variants = variants_of(files or (), stem)
    flags = " or ".join(f"--variant {name}" for name in variants)
    hint = f"ask for variant {' or '.join(map(repr, variants))} ({flags})"
    mark = f".{variant}" if variant else ""
    return UserError(
        f"{folder} has no weights {stem}{mark}.safetensors (it has {present}): "
        f"{hint if variants else 'copy or download it again'}"
    )


def variants_of(files: Collection[str], stem: str) -> list[str]:
    """Return the variants of a part's safetensors files, sorted."""
    whole = re.compile(rf"{stem}\.([^.]+?)(-\d+-of-\d+)?\.safetensors")
    shard = re.compile(rf"{stem}-\d+-of-\d+\.([^.]+)\.safetensors")
    matches = (whole.fullmatch(name) or shard.fullmatch(name) for name in files)
    return sorted({match[1] for match in matches if match})


def unknown_variant(where: object, variant: str, variants: Sequence[str]) -> UserError:
    """Return the error for a variant that no part of a model has.

    Args:
        where: the model.
        variant: the one that was asked for.
        variants: those that its parts have.
    """
    present = f"it has {', '.join(variants)}" if variants else "it has none: leave the variant out"
    return UserError(f"no part of {where} has weights of variant {variant!r}: {present}")


def shard_names(index: Path, present: Collection[str]) -> list[str]:
    """Return the names of the shards that an index lists, by which the folder has them.

    `model.fp16-00001-of-00002.safetensors` and `model-00001-of-00002.fp16.safetensors` are the new
    and the old name of one file: an index may list either.

    Args:
        index: the file.
        present: the files beside it.

    Raises:
        UserError: an index without files, or with paths.
    """
    values = read_json(index)
    table = values.get("weight_map") if isinstance(values, dict) else None
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} has no weight_map of keys and files: copy or download it again")
    names = sorted(set(names))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names a path outside its folder ({name!r}): it is refused")
    other = {name: _other_name(name) for name in names}
    return [
        other[name] if name not in present and other[name] in present else name for name in names
    ]


def _other_name(shard: str) -> str:
    """Return a shard's name with its variant at the other place; itself where it has none."""
    new = re.sub(r"\.([^.]+)(-\d+-of-\d+)(\.[a-z]+)$", r"\2.\1\3", shard)
    return new if new != shard else re.sub(r"(-\d+-of-\d+)\.([^.]+)(\.[a-z]+)$", r".\2\1\3", shard)


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read every tensor of a part's files, without the names of wrappers in their keys.

    Raises:
        UserError: a damaged file, a key that two shards hold, or quantised weights.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        shard = _read(path)
        if twice := tensors.keys() & shard.keys():
            raise UserError(
                f"{path} holds {min(twice)!r}, which another shard holds too: "
                "copy or download the folder again"
            )
        tensors |= shard
    where = files[0] if len(files) == 1 else files[0].parent
    require_unquantized(tensors, where)
    return unwrapped(tensors, where)


# ---- keys ----------------------------------------------------------------------------------------


class _Described(Protocol):
    """A tensor, or a lazy one."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def kinds_of(tensors: Mapping[str, _Described]) -> dict[str, Kind]:
    """Return the kinds of tensors, in memory or lazy."""
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def check_keys(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: object
) -> None:
    """Compare the tensors of a file with those of a network.

    Integers instead of floating-point numbers are quantised weights, whose scales lie elsewhere.

    Raises:
        UserError: lists every missing, extra and misshapen key, and weights of integers or complex
            numbers.
    """
    check_kinds(kinds_of(expected), kinds_of(tensors), where)


def check_kinds(
    expected: Mapping[str, Kind],
    kinds: Mapping[str, Kind],
    where: object,
    optional: Collection[str] = (),
) -> None:
    """`check_keys` by shapes and dtypes; `optional` keys may be missing."""
    if problems := key_faults(expected, kinds, optional):
        raise UserError(
            f"{where} does not fit its config: keys {problems}; "
            "use the weights that belong to the config"
        )


def key_faults(
    expected: Mapping[str, Kind],
    kinds: Mapping[str, Kind],
    optional: Collection[str] = (),
    fits: Callable[[str, tuple[int, ...]], bool] | None = None,
) -> str:
    """Return one clause of all faults of a file's keys, empty where there are none.

    The clause names the first eight keys of each kind of fault.

    Args:
        expected: shape and dtype by key.
        kinds: those of the file.
        optional: keys that may be missing.
        fits: (key, shape) -> True for a shape that can be read; None: only the expected one.
    """
    fits = fits or (lambda key, shape: shape == expected[key][0])
    both = sorted(expected.keys() & kinds.keys())
    faults = {
        "missing": sorted(expected.keys() - kinds.keys() - set(optional)),
        "not expected": sorted(kinds.keys() - expected.keys()),
        "of another shape": [
            f"{key} {kinds[key][0]} instead of {expected[key][0]}"
            for key in both
            if not fits(key, kinds[key][0])
        ],
        "not of floating-point numbers": [
            f"{key} {str(kinds[key][1]).removeprefix('torch.')}"
            for key in both
            if expected[key][1].is_floating_point and not kinds[key][1].is_floating_point
        ],
    }
    return "; ".join(
        f"{len(keys)} {fault} ({', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"
        for fault, keys in faults.items()
        if keys
    )


# ---- numbers -------------------------------------------------------------------------------------


def require_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise `UserError` that names the first weight with NaN or infinity."""
    for key in not_finite(tensors):
        raise _damage(where, key)


def looked_at(
    files: Sequence[Path], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> bool:
    """Look for NaN and infinity in memory-mapped tensors that are used as stored.

    Numbers are read in pieces, whose pages are dropped: the mapping does not become resident, and
    the files are not opened again.

    Args:
        files: the files of the tensors.
        tensors: all tensors of these files.
        dtype: compute dtype; None: the tensors are streamed, and checked when first used.

    Returns:
        False where nothing was checked: the files are pickled or the tensors will be converted.

    Raises:
        UserError: names the first tensor with NaN or infinity.
    """
    if dtype is None:
        return True
    if any(path.suffix != ENDINGS[0] for path in files) or any(
        t.is_floating_point() and t.dtype != dtype for t in tensors.values()
    ):
        return False
    mapped = host_memory.MappedRanges()
    for key, tensor in tensors.items():
        pieces = (
            tensor.reshape(-1).split(_PIECE // tensor.itemsize) if tensor in mapped else [tensor]
        )
        for piece in pieces:
            finite = _finite(piece)
            if tensor in mapped:
                host_memory.drop_pages(piece)
            if not finite:
                raise _damage(files[0] if len(files) == 1 else files[0].parent, key)
    return True


_PIECE = 2**22  # bytes, which stay in the processor's cache


def _finite(numbers: Tensor) -> bool:
    """Return True where all numbers are finite, as a finite sum shows at the least cost."""
    if numbers.dtype in EIGHTS:  # torch has no arithmetic for them
        bits = numbers.contiguous().view(torch.uint8) & 0x7F
        return not bool((bits >= (0x7F if numbers.dtype is torch.float8_e4m3fn else 0x7C)).any())
    return bool(numbers.sum(dtype=torch.float32).isfinite() or numbers.isfinite().all())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to `dtype`; numbers beyond the largest of a format of eight bits become NaN.

    Wider formats have infinity for them. torch's own cast gives the largest number, so that the
    overflow could not be detected.
    """
    if dtype not in EIGHTS or tensor.dtype == dtype:
        return tensor.to(dtype)
    wide, largest = tensor.float(), torch.finfo(dtype).max
    beyond = (wide > largest) | (wide < -largest)
    return (wide.masked_fill(beyond, torch.nan) if beyond.any() else wide).to(dtype)


def storable(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Cast weights to the dtype in which they are stored (None: their own), and check them.

    Counters stay integers.

    Raises:
        UserError: a dtype of integers.
        NumericalError: a weight that is NaN or infinite in `dtype` (float16 ends at 65504): readers
            would refuse the file.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(
            f"dtype {dtype}: weights are stored as floating-point numbers "
            "such as torch.float32 or torch.float16"
        )
    tensors = {
        k: cast(v, dtype) if dtype is not None and v.is_floating_point() else v
        for k, v in tensors.items()
    }
    for key in not_finite(tensors):
        name = str(tensors[key].dtype).removeprefix("torch.")
        if dtype in EIGHTS:
            raise NumericalError(
                f"weight {key} is NaN or beyond {torch.finfo(dtype).max:g}, the largest number of "
                f"{name}: nothing was written; store it in bfloat16, or scaled"
            )
        raise NumericalError(
            f"weight {key} is NaN or infinite in {name}: nothing was written; "
            "store it in float32, or repair the training"
        )
    return tensors


def scale_of(key: str, tensors: Mapping[str, object]) -> str | None:
    """Return the key of the scale of a weight of eight bits; None without one.

    Raises:
        UserError: a weight with two scales.
    """
    stem, _, last = key.rpartition(".")
    names = (f"{stem}.scale_weight", f"{stem}.weight_scale") if last == "weight" else ()
    scales = [name for name in names if name in tensors]
    if len(scales) > 1:
        raise UserError(
            f"{key} has two scales ({' and '.join(scales)}): expected one; use a file of one layout"
        )
    return scales[0] if scales else None


def scaled(key: str, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weight * scale, computed in float32 and cast to `dtype`.

    Args:
        key: of the weight, for messages.
        weight: of any dtype.
        scale: one number, or one a row.
        dtype: of the product.

    Raises:
        UserError: a scale of another shape.
    """
    rows = weight.shape[0] if weight.ndim else 1
    if scale.numel() not in (1, rows) or scale.numel() != max([1, *scale.shape]):
        raise UserError(
            f"the scale of {key} has shape {tuple(scale.shape)}: "
            f"expected one number, or one for each of {rows} rows"
        )
    shape = () if scale.numel() == 1 else (rows, *[1] * (weight.ndim - 1))
    return (weight.float() * scale.float().reshape(shape)).to(dtype)


def scale_keys(dtypes: Mapping[str, torch.dtype]) -> set[str]:
    """Return the keys beside scaled weights of eight bits: all scales, and marks.

    Args:
        dtypes: of a file's tensors by key.
    """
    keys = {key for key in dtypes if key.rpartition(".")[2] in ("scaled_fp8", "comfy_quant")}
    for key, dtype in dtypes.items():
        stem, _, last = key.rpartition(".")
        if dtype in EIGHTS and last == "weight":
            names = {scale_of(key, dtypes), f"{stem}.scale_input", f"{stem}.input_scale"}
            keys |= names & dtypes.keys()
    return keys


def _damage(where: object, key: str) -> UserError:
    return UserError(
        f"{where}: {key} has NaN or infinite numbers; the file is damaged or its training diverged"
    )


def not_finite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the keys of tensors with NaN or infinity."""
    return (k for k, v in tensors.items() if not _finite(v))
