"""The weights of one part of a model folder, however its files are cut: whole or in shards, a
variant such as fp16, safetensors or pickled.

    diffusion_pytorch_model.safetensors              diffusion_pytorch_model.fp16.safetensors
    diffusion_pytorch_model.safetensors.index.json   {"weight_map": {key: file of a shard}}
                                                     .bin instead of .safetensors: pickled

Safetensors come first and are memory-mapped. Pickled files are read with `weights_only`, which
makes tensors and runs nothing; what wants more is refused.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import NumericalError, UserError
from sfumato.io import host_memory
from sfumato.io.atomic import read_json, read_tensors
from sfumato.io.pickles import read_pickle

ENDINGS = (".safetensors", ".bin")
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Formats of eight bits; the largest numbers are 448 and 57344 (Micikevicius et al. 2022,
arXiv:2209.05433)."""


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    found = read_pickle(path)
    strange = [k for k, v in found.items() if not isinstance(v, Tensor)]
    if strange:
        raise UserError(
            f"{path} holds things that are not tensors ({', '.join(map(repr, strange[:8]))}): expected a table of tensors"
        )
    return found


def find_weights(
    folder: str | Path, stem: str, variant: str | None = None, pickled: str | None = None
) -> list[Path]:
    """The file of a part's weights, or its shards: `stem` with the variant, or without one;
    `UserError` that lists what is there if none.

    pickled: the stem of pickled files, where it is another one.
    """
    folder, stems = Path(folder), {ENDINGS[0]: stem, ENDINGS[1]: pickled or stem}
    marks = [f".{variant}", ""] if variant else [""]
    for mark in marks:
        for ending in ENDINGS:
            whole, listed = (
                folder / f"{stems[ending]}{mark}{ending}",
                folder / f"{stems[ending]}{ending}.index{mark}.json",
            )
            if whole.exists():
                return [whole]
            if listed.exists():
                return _shards(listed)
    there = (
        ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))
        if folder.is_dir()
        else "nothing"
    )
    marked = {
        p.name.removeprefix(f"{stem}.").split(".")[0] for p in folder.glob(f"{stem}.*.safetensors")
    }
    others = sorted({re.sub(r"-\d+-of-\d+$", "", mark) for mark in marked} - {"safetensors"})
    hint = (
        f"ask for variant {' or '.join(map(repr, others))}"
        if others
        else "copy or download it again"
    )
    raise UserError(
        f"{folder} has no weights {stem}{''.join(marks[:1])}.safetensors (it has {there}): {hint}"
    )


def _shards(listed: Path) -> list[Path]:
    """The files that an index names; all must lie beside it."""
    names = read_json(listed)
    names = names.get("weight_map") if isinstance(names, dict) else None
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(n, str) for n in names.values())
    ):
        raise UserError(f"{listed} has no weight_map of keys and files: copy or download it again")
    found = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise UserError(f"{listed} names a path outside its folder ({name!r}): it is refused")
        found.append(listed.parent / name)
    return found


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor of a part's files. Shards may not hold a key twice (`UserError`)."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        found = _read(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise UserError(
                f"{path} holds {min(twice)!r}, which another shard holds too: copy or download the folder again"
            )
        tensors |= found
    return tensors


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: object) -> None:
    """`UserError` that lists every missing, extra and misshapen key, and weights of whole or
    complex numbers.

    Whole numbers are what quantised files hold: without their scales, which are kept elsewhere,
    they are not the weights.
    """
    both = sorted(expected.keys() & found.keys())
    problems = key_faults(
        missing=expected.keys() - found.keys(),
        extra=found.keys() - expected.keys(),
        shapes=[
            f"{k} {tuple(found[k].shape)} instead of {tuple(expected[k].shape)}"
            for k in both
            if found[k].shape != expected[k].shape
        ],
        dtypes=[
            f"{k} {str(found[k].dtype).removeprefix('torch.')}"
            for k in both
            if expected[k].is_floating_point() and not found[k].is_floating_point()
        ],
    )
    if problems:
        raise UserError(
            f"{where} does not fit its config: keys {problems}; use the weights that belong to the config"
        )


def key_faults(
    missing: Iterable[str], extra: Iterable[str], shapes: Sequence[str], dtypes: Sequence[str]
) -> str:
    """One clause of all that is wrong with a file's keys, the first eight of each kind; empty where
    nothing is.
    """
    listed = (
        (sorted(missing), "missing"),
        (sorted(extra), "not expected"),
        (shapes, "of another shape"),
        (dtypes, "not of floating-point numbers"),
    )
    return "; ".join(
        f"{len(names)} {fault} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for names, fault in listed
        if names
    )


def require_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """`UserError` that names the first weight with NaN or infinity in it."""
    for key in not_finite(tensors):
        raise _damage(where, key)


def looked_at(
    files: Sequence[Path], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> bool:
    """Look for NaN and infinity in memory-mapped tensors that are used as they lie in their files.

    The numbers are read some at a time, and their pages are given back: the mapping does not become
    resident, and the files are not opened again.

    Args:
        files: where the tensors are from
        tensors: all of theirs
        dtype: what the tensors are used in; None: they are streamed, and checked when first used

    Returns:
        False where nothing was looked at: the files are pickled or the tensors will be converted.

    Raises:
        UserError: the first tensor with NaN or infinity.
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
    """A finite sum says that all are, for less than to look at each number."""
    # torch has no arithmetic for them: bytes that are not finite are few
    if numbers.dtype in EIGHTS:
        bits = numbers.contiguous().view(torch.uint8) & 0x7F
        return not bool((bits >= (0x7F if numbers.dtype is torch.float8_e4m3fn else 0x7C)).any())
    return bool(numbers.sum(dtype=torch.float32).isfinite() or numbers.isfinite().all())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in `dtype`. Those beyond the largest of a format of eight bits become NaN, as in
    wider formats infinity: torch would write the largest instead, and nobody could tell.
    """
    if dtype not in EIGHTS or tensor.dtype == dtype:
        return tensor.to(dtype)
    wide, largest = tensor.float(), torch.finfo(dtype).max
    beyond = (wide > largest) | (wide < -largest)
    return (wide.masked_fill(beyond, torch.nan) if beyond.any() else wide).to(dtype)


def storable(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights in the dtype that is to be stored (None: their own); counters stay whole numbers.

    Raises:
        NumericalError: a weight that is NaN or infinite in it (float16 ends at 65504): readers
            would refuse the file.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(
            f"dtype {dtype}: weights are stored as floating-point numbers such as torch.float32 or torch.float16"
        )
    tensors = {
        k: cast(v, dtype) if dtype is not None and v.is_floating_point() else v
        for k, v in tensors.items()
    }
    for key in not_finite(tensors):
        name = str(tensors[key].dtype).removeprefix("torch.")
        if dtype in EIGHTS:
            raise NumericalError(
                f"weight {key} is NaN or beyond {torch.finfo(dtype).max:g}, the largest number of {name}: nothing was written; store it in "
                "bfloat16, or scaled"
            )
        raise NumericalError(
            f"weight {key} is NaN or infinite in {name}: nothing was written; store it in float32, or repair the training"
        )
    return tensors


def scale_of(key: str, tensors: Mapping[str, object]) -> str | None:
    """The key of the number by which a weight of eight bits is multiplied, if a file has one;
    `UserError` where it has two.
    """
    stem, _, last = key.rpartition(".")
    found = [
        name
        for name in (f"{stem}.scale_weight", f"{stem}.weight_scale")
        if last == "weight" and name in tensors
    ]
    if len(found) > 1:
        raise UserError(
            f"{key} has two scales ({' and '.join(found)}): expected one; use a file of one layout"
        )
    return found[0] if found else None


def scaled(key: str, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """weight * scale, in float32 and then in `dtype`: one scale for all, or one for each row;
    `UserError` for scales of another shape.
    """
    rows = weight.shape[0] if weight.ndim else 1
    if scale.numel() not in (1, rows) or scale.numel() != max([1, *scale.shape]):
        raise UserError(
            f"the scale of {key} has shape {tuple(scale.shape)}: expected one number, or one for each of {rows} rows"
        )
    shape = () if scale.numel() == 1 else (rows, *[1] * (weight.ndim - 1))
    return (weight.float() * scale.float().reshape(shape)).to(dtype)


def aside(kinds: Mapping[str, torch.dtype]) -> set[str]:
    """Keys that files with scaled weights of eight bits hold beside them and that are no weights:
    the scales, those of activations, marks.
    """
    found = {key for key in kinds if key.rpartition(".")[2] in ("scaled_fp8", "comfy_quant")}
    for key, kind in kinds.items():
        stem, _, last = key.rpartition(".")
        if kind in EIGHTS and last == "weight":
            names = (scale_of(key, kinds), f"{stem}.scale_input", f"{stem}.input_scale")
            found |= {name for name in names if name is not None and name in kinds}
    return found


def unscaled(
    tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The weights themselves, in `dtype` where a file holds them in eight bits and a scale
    (`weight_scale`, `scale_weight`) beside each.
    """
    beside = aside({key: value.dtype for key, value in tensors.items()})
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        scale = scale_of(key, tensors) if value.dtype in EIGHTS else None
        if key not in beside:
            found[key] = value if scale is None else scaled(key, value, tensors[scale], dtype)
    return found


def _damage(where: object, key: str) -> UserError:
    return UserError(
        f"{where}: {key} has NaN or infinite numbers; the file is damaged or its training diverged"
    )


def not_finite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Keys with NaN or infinity."""
    return (k for k, v in tensors.items() if not _finite(v))
