"""Training state on disk, whole or absent: networks, average, optimizers and step as safetensors in one folder a checkpoint.

All other state is a function of (seed, step), so that these files are enough to go on bit for bit: the learning rate, the order of the
data and every random draw are computed from the step's number.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.files import atomic_folder, read_json, read_tensors, write_json, write_tensors

_NAME = re.compile(r"step-(\d{8})")


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as named tensors; numbers become float64 scalars."""
    flat: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            flat[f"{index}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    return flat


def _unflatten(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(
    folder: Path,
    step: int,
    networks: dict[str, nn.Module],
    average: dict[str, Tensor],
    optimizers: dict[str, torch.optim.Optimizer],
    extra: dict[str, Any],
    keep: int = 2,
) -> None:
    """Writes folder/step-XXXXXXXX atomically, then removes all but the newest `keep`."""
    with atomic_folder(folder / f"step-{step:08d}") as temporary:
        for name, network in networks.items():
            write_tensors(temporary / f"{name}.safetensors", network.state_dict())
            write_tensors(temporary / f"{name}.optimizer.safetensors", _flatten(optimizers[name]))
        write_tensors(temporary / "average.safetensors", average)
        write_json(temporary / "state.json", {"step": step, **extra})
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """The steps with a whole checkpoint, rising. What an interrupted save left is not one."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for f in folder.iterdir() if (m := _NAME.fullmatch(f.name)) and (f / "state.json").exists())


def load(
    folder: Path,
    networks: dict[str, nn.Module],
    average: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    settings_hash: str,
) -> dict[str, Any] | None:
    """Restores the newest checkpoint in place and returns its state.json; None where there is none.

    Settings other than those it was made with are a `UserError`: the result would be neither run.
    """
    found = steps(folder)
    for leftover in folder.glob(".step-*.tmp") if folder.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    if not found:
        return None
    newest = folder / f"step-{found[-1]:08d}"
    state = read_json(newest / "state.json")
    if state["settings"] != settings_hash:
        raise UserError(f"{newest} was made with other settings or data: resume with the same ones, or train into another folder")
    for name, network in networks.items():
        network.load_state_dict(read_tensors(newest / f"{name}.safetensors"))
        _unflatten(optimizers[name], read_tensors(newest / f"{name}.optimizer.safetensors"))
    average.load_state_dict(read_tensors(newest / "average.safetensors"))
    return state
