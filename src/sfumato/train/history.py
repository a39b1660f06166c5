"""A run's past: the steps behind a checkpoint, changes of settings, and the machine."""

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.train import checkpoint

logger = logging.getLogger(__name__)

_CLOCK = {f"loop.{name}" for name in ("steps", "lr", "warmup", "decay", "final_lr")}
"""Settings of the learning rate: where they change, it begins again."""


@dataclass(frozen=True)
class History:
    """The part of a run that lies behind: its steps, its changes, and its machine.

    Attributes:
        step: Number of finished steps.
        origin: Step at which the learning rate's warm-up and decay began.
        changes: Of settings: {"step", "date", "changed": {name: [before, now]}}.
        machine: On which the run goes on; decides the bits beside the settings.
        before: The machine of the checkpoint; None: unknown.
    """

    step: int
    origin: int
    changes: list[dict[str, Any]]
    machine: dict[str, Any]
    before: dict[str, Any] | None

    @classmethod
    def of(cls, state: Mapping[str, Any], accelerator: Any) -> "History":
        """The history of a checkpoint's state.json; of an empty state, a new run's."""
        step, origin = state.get("step", 0), state.get("origin", 0)
        changes, changed = [*state.get("changes", [])], state.get("changed", {})
        if changed:
            date = time.strftime("%Y-%m-%d %H:%M:%S")
            pairs = {name: list(pair) for name, pair in changed.items()}
            changes.append({"step": step, "date": date, "changed": pairs})
        if _CLOCK & changed.keys():
            origin = step
        machine = {
            "torch": str(torch.__version__),
            "device": accelerator.device.type,
            "threads": torch.get_num_threads(),
            "processes": accelerator.num_processes,
        }
        return cls(step, origin, changes, machine, state.get("machine"))

    @property
    def entries(self) -> dict[str, Any]:
        """The entries of state.json and run.json."""
        return {"changes": self.changes, "machine": self.machine}

    def tell(self, steps: int) -> None:
        """Log where the run goes on, and what differs there."""
        if not self.step:
            return
        if self.step >= steps:
            logger.info("step %d of %d is done: nothing is left to train", self.step, steps)
            if self.step > steps:
                logger.warning(
                    "steps=%d: the run has %d already, and its weights are of step %d",
                    *(steps, self.step, self.step),
                )
        else:
            logger.info("resuming at step %d of %d", self.step, steps)
        for change in self.changes[-1:]:
            if change["step"] == self.step:
                pairs = change["changed"].items()
                words = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in pairs)
                logger.info("changed at step %d: %s", self.step, words)
        if self.before is not None and self.before != self.machine and self.step < steps:
            words = ", ".join(
                f"{name} {self.before.get(name)} -> {value}"
                for name, value in self.machine.items()
                if self.before.get(name) != value
            )
            logger.warning(
                "the first %d steps ran with another machine (%s): "
                "the result differs by rounding from that of a run without a break",
                *(self.step, words),
            )


def set_aside(out: Path) -> None:
    """Rename the folder of an earlier run, so that a new one starts and nothing is lost."""
    if not (out / "log.jsonl").exists() and not checkpoint.steps(out / "checkpoints"):
        return
    names = (out.with_name(f"{out.name}-{number}") for number in range(1, 10_000))
    free = next(name for name in names if not name.exists())
    os.replace(out, free)
    logger.info("the earlier run is kept in %s", free)


def stopped_sentence(checkpoints: Path, done: int | None, steps: int, resume: bool) -> str:
    """The last words of a run that a signal ended.

    Args:
        checkpoints: Folder of the run's checkpoints.
        done: Number of finished steps; None where the run ended at once.
        steps: Of the whole run.
        resume: False for a run that was told to start anew: its command would do so again.
    """
    saved = checkpoint.steps(checkpoints)
    if done is None and not saved:
        return "stopped at once, before the first checkpoint: the same command starts again"
    step = saved[-1] if done is None else done
    at_once = " at once" if done is None else ""
    return (
        f"stopped{at_once}; the checkpoint of step {step} of {steps} is in {checkpoints}: "
        f"{'' if resume else 'without --no-resume '}the same command goes on from there"
    )


def to_json(value: Any) -> Any:
    """Settings as JSON, which has neither infinity nor paths."""
    if isinstance(value, Mapping):
        return {str(name): to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, str | int | float | type(None)) and finite else str(value)
