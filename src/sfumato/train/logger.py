"""What a run leaves for people: a progress bar, log.jsonl, TensorBoard scalars and pictures, sample
grids and a picture of the curves.

A line of log.jsonl is the mean over the steps since the line before it: of one batch, a loss is
mostly noise.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image as PIL
from torch import Tensor

from sfumato.io.atomic import NotWritten, atomic_file, recover

logger = logging.getLogger(__name__)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Failures of the disk as one sentence. What training needs is in the checkpoints: after a
    failure, the run goes on from the last.
    """
    try:
        yield
    except OSError as error:
        raise NotWritten(path, error) from error


@dataclass
class Means:
    """Each number's mean over the steps since the last line, of those steps that had it: a sum and
    a count by name.

    What lies on a GPU is summed there, so that no step waits for the device.
    """

    sums: dict[str, float | Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, numbers: Mapping[str, float | Tensor]) -> None:
        """One step's numbers; tensors without axes."""
        for name, value in numbers.items():
            kept = (
                value.detach().float()
                if isinstance(value, Tensor) and value.device.type != "cpu"
                else float(value)
            )
            self.sums[name] = self.sums.get(name, 0.0) + kept
            self.counts[name] = self.counts.get(name, 0) + 1

    def now(self) -> dict[str, float]:
        """The means so far."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def state(
        self, reduced: Callable[[dict[str, float]], dict[str, float]] = dict
    ) -> dict[str, Any]:
        """The JSON of a checkpoint between two lines. reduced: what the processes make of their
        sums.
        """
        sums = reduced({name: float(total) for name, total in self.sums.items()})
        # JSON has no NaN
        return {"sums": {name: repr(total) for name, total in sums.items()}, "counts": self.counts}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """What goes on where `state` was asked for; from nothing, a new one."""
        return cls(
            {name: float(total) for name, total in state.get("sums", {}).items()},
            dict(state.get("counts", {})),
        )


class Record:
    """Writes while a run goes on. Lines past `first` (of a run that was killed after its last
    checkpoint) are removed at the start.
    """

    def __init__(self, out: Path, first: int, total: int, stage: str, active: bool = True):
        self.out, self.first, self.total, self.stage, self.active = out, first, total, stage, active
        self.path = out / "log.jsonl"
        self.writer: Any = None
        self.progress: Any = None

    def __enter__(self) -> Self:
        if not self.active:
            return self
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from torch.utils.tensorboard.writer import SummaryWriter

        with _writing(self.out):
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            for folder in (self.out, self.out / "samples"):
                recover(folder)
            kept = [line for line in self.lines() if line["step"] <= self.first]
            self.before = max((line["seconds"] for line in kept), default=0.0)
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self.file = self.path.open("a")
            self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.first + 1)
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)  # stdout belongs to the program's answer
        self.progress = Progress(
            *columns, TextColumn("{task.fields[loss]}"), console=console, refresh_per_second=2
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.stage, total=self.total, completed=self.first, loss=""
        )
        self.started = time.perf_counter()
        self.told = -math.inf
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.active:
            return
        self.progress.stop()
        failures: list[OSError | NotWritten] = []
        for close in (self.writer.close, self.file.close, self.curves):
            try:
                close()
            except (OSError, NotWritten) as failure:
                failures.append(failure)
        if failures and error is None:  # else the error that ended the run is the one to tell
            first = failures[0]
            raise first if isinstance(first, NotWritten) else NotWritten(self.out, first) from first

    def lines(self) -> list[dict[str, Any]]:
        """What log.jsonl holds; a last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        line = {
            "step": step,
            "seconds": round(self.before + time.perf_counter() - self.started, 2),
            **numbers,
        }
        with _writing(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        with _writing(self.out / "tensorboard"):
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)

    @property
    def due(self) -> bool:
        """Whether the bar's losses are a second old: to ask for them at every step would be to wait
        for a GPU at every step.
        """
        return self.active and time.perf_counter() - self.told >= 1

    def step(self, step: int, numbers: dict[str, float], log: bool) -> None:
        """A step is done; the bar shows the losses among the numbers, if there are any, and all are
        written when `log`.
        """
        if not self.active:
            return
        self.progress.update(self.task, completed=step)
        if numbers:
            self.progress.update(
                self.task,
                loss="  ".join(f"{k} {v:.4g}" for k, v in numbers.items() if k.endswith("/loss")),
            )
            self.told = time.perf_counter()
        if log:
            self._write(step, numbers)

    def show(self, step: int, numbers: dict[str, float], pictures: dict[str, PIL.Image]) -> None:
        """Held-out numbers and pictures at a step."""
        if not self.active:
            return
        if numbers:
            self._write(step, numbers)
            logger.info(
                "%s step %d: %s",
                self.stage,
                step,
                "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()),
            )
        for name, picture in pictures.items():
            with atomic_file(self.out / "samples" / f"{name}-{step:08d}.png") as temporary:
                picture.save(temporary, format="PNG")
            with _writing(self.out / "tensorboard"):
                self.writer.add_image(
                    name, np.asarray(picture.convert("RGB")), step, dataformats="HWC"
                )
        with _writing(self.out / "tensorboard"):
            self.writer.flush()

    def curves(self) -> None:
        """Draws every logged number against the step: out/curves.png."""
        lines = self.lines()
        names = sorted({name for line in lines for name in line} - {"step", "seconds"})
        if not names:
            return
        from matplotlib.figure import Figure

        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
        for i, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, i + 1)
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(
                *zip(*points, strict=True), linewidth=1, marker="." if len(points) < 30 else None
            )
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if name.endswith("loss") and all(value > 0 for _, value in points):
                axes.set_yscale("log")
        with atomic_file(self.out / "curves.png") as temporary:
            figure.savefig(temporary, format="png", dpi=90)
