"""Training state on disk, whole or absent: one folder of safetensors files a checkpoint.

It has the networks, their average, the optimizers and the step.
All other state is a function of (seed, step), so that these files are enough to go on bit for bit:
the learning rate, the order of the data and every random draw are computed from the step's number.
"""

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.io.atomic import (
    atomic_folder,
    read_json,
    read_tensors,
    recover,
    write_json,
    write_tensors,
)
from sfumato.io.safetensors import check_keys

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as named tensors; numbers become float64 scalars."""
    return {
        f"{index}.{key}": value
        if isinstance(value, Tensor)
        else torch.tensor(float(value), dtype=torch.float64)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        # the optimizer keeps its tensors: they must not map the file
        state.setdefault(int(index), {})[key] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save(
    folder: Path,
    step: int,
    networks: dict[str, nn.Module],
    average: dict[str, Tensor],
    optimizers: dict[str, torch.optim.Optimizer],
    run: dict[str, Any],
    scaler: dict[str, Any] | None = None,
    means: dict[str, Any] | None = None,
    keep: int = 2,
    keep_every: int | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Write folder/step-XXXXXXXX atomically, then remove all but the newest checkpoints.

    Args:
        folder: The folder of the run's checkpoints.
        step: Number of finished steps.
        networks: By phase.
        average: State dict of the averaged network.
        optimizers: By phase.
        run: JSON of the settings and data to which the checkpoint belongs.
        scaler: State of the gradient scaler.
        means: State of the numbers since the last line of the log.
        keep: Number of checkpoints to keep.
        keep_every: Those of multiples of these steps are kept beside them; None: no others.
        more: Other entries of state.json.
    """
    with atomic_folder(folder / f"step-{step:08d}") as temporary:
        for name, network in networks.items():
            write_tensors(temporary / f"{name}.safetensors", network.state_dict())
            write_tensors(temporary / f"{name}.optimizer.safetensors", _flatten(optimizers[name]))
        write_tensors(temporary / "average.safetensors", average)
        state = {"step": step, "run": run, "scaler": scaler, "means": means or {}, **(more or {})}
        write_json(temporary / "state.json", state)
    for old in steps(folder)[:-keep]:
        if keep_every is not None and old % keep_every == 0:
            continue
        # Renamed first: a kill in the middle of removing leaves no half checkpoint under the name
        # of a whole one.
        gone = folder / f".step-{old:08d}.{os.getpid()}.tmp"
        with suppress(OSError):
            os.replace(folder / f"step-{old:08d}", gone)
        shutil.rmtree(gone, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """The steps with a whole checkpoint, rising; what an interrupted save left is not one."""
    if not folder.is_dir():
        return []
    return sorted(
        int(m[1])
        for f in folder.iterdir()
        if (m := _NAME.fullmatch(f.name)) and (f / "state.json").exists()
    )


def clean(folder: Path) -> None:
    """Remove what a killed save left behind: by one process, before any loads."""
    recover(folder)


def load(
    folder: Path,
    networks: dict[str, nn.Module],
    average: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    run: dict[str, Any],
    change: bool = False,
) -> dict[str, Any] | None:
    """Restore the newest checkpoint in place.

    A damaged one is skipped, with a warning, for the one before it.

    Args:
        folder: The folder of the run's checkpoints.
        networks: By phase.
        average: The averaged network.
        optimizers: By phase.
        run: JSON of this run's settings and data.
        change: Go on where settings of the loop, the loss or the data differ.

    Returns:
        Its state.json, with the differences as "changed": {name: [before, now]}; None where there
        is no checkpoint.

    Raises:
        UserError: Where none is whole, or the newest was made by a run with other settings or data,
            so that resuming would give neither run's result.
    """
    damage: list[str] = []
    for step in reversed(steps(folder)):
        place = folder / f"step-{step:08d}"
        try:
            state = _read_state(folder, step)
            changed = _check_run(place, state.get("run"), run, change)
            # with --change a phase may be new, such as a discriminator that joins
            old = [n for n in networks if not changed or (place / f"{n}.safetensors").exists()]
            states = {name: _read(place, name, networks[name]) for name in old}
            averaged = _read(place, "average", average)
            optimizer_states = {
                name: read_tensors(place / f"{name}.optimizer.safetensors") for name in old
            }
        except OtherRun:
            raise
        except UserError as error:
            damage.append(str(error))
            logger.warning("checkpoint %s is passed over: %s", place, error)
            continue
        for name in old:
            networks[name].load_state_dict(states[name])
            _unflatten(optimizers[name], optimizer_states[name])
        average.load_state_dict(averaged)
        return {**state, "changed": changed}
    if damage:
        raise UserError(
            f"no checkpoint in {folder} is whole ({damage[0]}): "
            "put a copy of one there, or train into another folder"
        )
    return None


def saved_precision(folder: Path) -> str | None:
    """The precision of the newest readable checkpoint in a folder; None: there is none."""
    for step in reversed(steps(folder)):
        try:
            run = _read_state(folder, step).get("run")
        except UserError:  # `load` passes it over, with a warning
            continue
        loop = run.get("loop") if isinstance(run, dict) else None
        value = loop.get("precision") if isinstance(loop, dict) else None
        return value if value in ("fp32", "bf16", "fp16") else None
    return None


def preview_written(folder: Path, step: int) -> None:
    """Record that the preview that a checkpoint had postponed is written."""
    state = _read_state(folder, step)
    write_json(folder / f"step-{step:08d}" / "state.json", {**state, "preview": False})


def load_average(folder: Path, network: nn.Module) -> int:
    """Load the averaged weights of the newest whole checkpoint.

    Args:
        folder: The folder of the run's checkpoints.
        network: Receives them in place.

    Returns:
        The checkpoint's number of finished steps.

    Raises:
        UserError: Where there is no whole checkpoint.
    """
    damage = "it has none yet"
    for step in reversed(steps(folder)):
        place = folder / f"step-{step:08d}"
        try:
            _read_state(folder, step)
            network.load_state_dict(_read(place, "average", network))
            return step
        except UserError as error:
            damage = str(error)
            logger.warning("checkpoint %s is passed over: %s", place, error)
    raise UserError(
        f"no whole checkpoint in {folder} ({damage}): "
        "Ctrl-C during training writes one, as does every loop.save-every steps"
    )


def _read_state(folder: Path, step: int) -> dict[str, Any]:
    path = folder / f"step-{step:08d}" / "state.json"
    state = read_json(path)
    if not isinstance(state, dict) or state.get("step") != step:
        raise UserError(f"{path} is not of step {step}: it is damaged or of another version")
    return state


def _read(place: Path, name: str, network: nn.Module) -> dict[str, Tensor]:
    tensors = read_tensors(place / f"{name}.safetensors")
    check_keys(network.state_dict(), tensors, place / f"{name}.safetensors")
    return tensors


class OtherRun(UserError):
    """A checkpoint of a run with other settings or data."""


_FREE = ("loop.", "objective.loss.", "objective.data.", "objective.conditioner.captions")
"""Settings with which weights and moments of other settings go on: not the network's own."""


def _check_run(
    place: Path, saved: Any, run: dict[str, Any], change: bool
) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as {name: (before, now)}; `OtherRun` where they may not."""
    changed = dict(_differences(saved, json.loads(json.dumps(run)), ""))
    fixed = {name: pair for name, pair in changed.items() if not name.startswith(_FREE)}
    if fixed or (changed and not change):
        words = [
            f"{name.rsplit('.', 1)[-1] or 'run'}: {_short(before)} there, {_short(now)} now"
            for name, (before, now) in changed.items()
        ]
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        advice = "resume with the same ones, or train into another folder" + (
            "; --init MODEL begins a new run with the weights of a model"
            if fixed
            else "; --change goes on with the new ones and records it"
        )
        raise OtherRun(
            f"{place} was made with other settings or data ({'; '.join(words[:3])}{more}): {advice}"
        )
    return changed


def _differences(a: Any, b: Any, name: str) -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for key in sorted(a.keys() | b.keys())
            for d in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if a == b else [(name, (a, b))]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
