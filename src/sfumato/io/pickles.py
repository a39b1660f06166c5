"""Pickled checkpoints (.ckpt, .bin, .pt), read with `weights_only=True`: no code runs.

Old checkpoints name classes of training frameworks beside their tensors (Lightning's callbacks, the
arguments of a script). Those few names are read as empty placeholders. Any other name is a
`UserError`: torch refuses it.
"""

import pickle
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.signatures import ZIP, another_kind, first_bytes, is_pickle

_NESTS = ("state_dict", "module")
"""Entries of checkpoints that hold the weights: Lightning's, DeepSpeed's."""
_HARMLESS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse.")


class _Placeholder:
    """Placeholder for a class of a training framework; drops its state."""

    def __init__(self, *values: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read the dictionary in a file, with tensors memory-mapped where the format allows it.

    Raises:
        UserError: a file that is missing, truncated, no pickle of tensors, or that would run code:
            torch refuses it before any code runs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a .ckpt, .bin or .pt file there")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if _zipped(path) else []
        harmless: list[Any] = [
            (type(n.rpartition(".")[2], (_Placeholder,), {}), n)
            for n in names
            if n.startswith(_HARMLESS)
        ]
        with torch.serialization.safe_globals(harmless):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=_zipped(path))
    except Exception as error:  # a damaged pickle can raise nearly anything from inside torch
        raise _refusal(path, error) from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds a {type(values).__name__}: expected a dictionary of tensors")
    return {str(k): v for k, v in values.items()}


def _refusal(path: Path, error: Exception) -> UserError:
    kind = None if is_pickle(path) else another_kind(path)
    if kind is not None:
        return UserError(f"{path} is not a pickle of tensors: {kind}")
    if isinstance(error, pickle.UnpicklingError):
        return UserError(
            f"{path} is refused: {_reason(error)}; "
            "use a .safetensors file, which holds numbers only"
        )
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{path} cannot be read ({type(error).__name__}: {reason}): it may be truncated; "
        "copy or download it again"
    )


def _zipped(path: Path) -> bool:
    """Return True for torch's zip format (1.6 and later), which can be memory-mapped."""
    return first_bytes(path, len(ZIP)) == ZIP


def _reason(error: pickle.UnpicklingError) -> str:
    text = " ".join(str(error).split())
    operand = re.search(r"Unsupported operand (\d+)", text)
    opcodes = {op.code for op in pickletools.opcodes}
    foreign = operand is not None and chr(int(operand[1])) not in opcodes
    if not foreign and ("GLOBAL" in text or "not allowed" in text or "Unsupported" in text):
        name = text.partition("GLOBAL ")[2].split(" ")[0]
        code = f"code ({name})" if name else "code"
        return f"it is a pickle that wants to run {code}, and nothing of it was run"
    return f"it is not a whole pickle of tensors ({text[:120]}) and may be truncated"


def state_dict(values: Mapping[str, Any], where: object) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, also from inside `state_dict` or `module`.

    Other values (steps, settings) are left out. Where the file has a running average beside the
    weights ("ema" and "model": DiT, SiT), the average is returned, which its authors sample with.

    Args:
        values: the dictionary of the file.
        where: the file, for messages.

    Raises:
        UserError: a file without tensors.
    """
    if isinstance(values.get("ema"), Mapping) and isinstance(values.get("model"), Mapping):
        values = values["ema"]
    while nested := [k for k in _NESTS if isinstance(values.get(k), Mapping)]:
        values = values[nested[0]]
    tensors = {str(k): v for k, v in values.items() if isinstance(v, Tensor)}
    if not tensors:
        keys = ", ".join(sorted(map(str, values))[:6]) or "none"
        raise UserError(f"{where} holds no tensors by name (its keys: {keys})")
    return tensors
