"""`.ckpt`, `.bin` and `.pt` files: pickles, read with `weights_only=True`, so that nothing in them
can run.

Old checkpoints name classes of training frameworks beside their tensors (Lightning's callbacks, the
arguments of a script). Those few names are read as empty placeholders; any other name is refused by
torch, and the refusal becomes one sentence.
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

_HARMLESS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse.")


class _Placeholder:
    """Stands for a class of a training framework; takes anything and does nothing."""

    def __init__(self, *values: object):
        """Whatever was pickled is dropped."""

    def __setstate__(self, state: object) -> None:
        """Whatever was pickled is dropped."""


def read_pickle(path: str | Path) -> dict[str, Any]:
    """The dictionary in the file, tensors memory-mapped where the format allows it. `UserError` for
    a file that is missing, truncated, not a pickle of tensors, or that would run code: torch
    refuses before any of it is executed.
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
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: {_reason(error)}; use a .safetensors file, which holds numbers only"
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything from inside torch
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {reason}): it may be truncated; copy or download it again"
        ) from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds a {type(values).__name__}: expected a dictionary of tensors")
    return {str(k): v for k, v in values.items()}


def _zipped(path: Path) -> bool:
    """Whether torch wrote its zip format (1.6 and later), which can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: pickle.UnpicklingError) -> str:
    text = " ".join(str(error).split())
    operand = re.search(r"Unsupported operand (\d+)", text)
    foreign = operand is not None and chr(int(operand[1])) not in {
        op.code for op in pickletools.opcodes
    }
    if not foreign and ("GLOBAL" in text or "not allowed" in text or "Unsupported" in text):
        name = text.partition("GLOBAL ")[2].split(" ")[0]
        return f"it is a pickle that wants to run code{f' ({name})' if name else ''}, and nothing of it was run"
    return f"it is not a whole pickle of tensors ({text[:120]}) and may be truncated"


def state_dict(values: Mapping[str, Any], where: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint, from below `state_dict` where it is nested; what is no tensor
    (steps, settings) is left out.

    Where training left the running average beside the weights ("ema" and "model": DiT, SiT), it is
    the average, which its authors draw with. `UserError` where there are none.
    """
    if isinstance(values.get("ema"), Mapping) and isinstance(values.get("model"), Mapping):
        values = values["ema"]
    while isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    tensors = {str(k): v for k, v in values.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(
            f"{where} holds no tensors by name (its keys: {', '.join(sorted(map(str, values))[:6]) or 'none'})"
        )
    return tensors
