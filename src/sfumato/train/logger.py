"""Log of a run: progress bar, log.jsonl, TensorBoard, sample grids, plot of the curves.

A line of log.jsonl is the mean over the steps since the line before it: of one batch, a loss is
mostly noise.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image as PIL
from torch import Tensor

from sfumato.io.atomic import NotWritten, atomic_file, recover
from sfumato.train.bars import Bars

logger = logging.getLogger(__name__)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise failures of the disk as `NotWritten`: the run can resume from its last checkpoint."""
    try:
        yield
    except OSError as error:
        raise NotWritten(path, error) from error


def _text(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds: 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@dataclass
class Means:
    """Each number's mean over the steps since the last line, of those steps that had it.

    Numbers on a GPU are summed there, so that no step waits for the device.

    Attributes:
        sums: By name.
        counts: Number of steps by name.
    """

    sums: dict[str, float | Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, numbers: Mapping[str, float | Tensor]) -> None:
        """Add one step's numbers; tensors are scalars."""
        for name, value in numbers.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                number = value.detach().float()
            else:
                number = float(value)
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1

    def now(self) -> dict[str, float]:
        """The means so far."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def state(
        self, reduced: Callable[[dict[str, float]], dict[str, float]] = dict
    ) -> dict[str, Any]:
        """The JSON of a checkpoint between two lines.

        Args:
            reduced: Reduces the sums over the processes.
        """
        sums = reduced({name: float(total) for name, total in self.sums.items()})
        # JSON has no NaN
        return {"sums": {name: repr(total) for name, total in sums.items()}, "counts": self.counts}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `state`; of an empty state, new means."""
        sums = state.get("sums", {}).items()
        return cls({n: float(total) for n, total in sums}, dict(state.get("counts", {})))


class RunLog:
    """The log of a run, written as it goes on.

    Lines after `first` (of a run that was killed after its last checkpoint) are removed at the
    start, and the line of a preview that is made again.

    Args:
        out: Folder of the run.
        first: Number of finished steps.
        total: Number of all steps.
        stage: Title of the progress bar.
        changes: Changes of settings, each with its "step": lines of their own.
        postponed: The preview of `first` is still to be made.
    """

    def __init__(
        self,
        out: Path,
        first: int,
        total: int,
        stage: str,
        changes: Sequence[Mapping[str, Any]] = (),
        postponed: bool = False,
    ):
        self.out, self.first, self.total, self.stage = out, first, total, stage
        self.path, self.changes, self.postponed = out / "log.jsonl", changes, postponed
        self.shown = -math.inf  # time of the losses in the bar
        self.bars = Bars()

    def __enter__(self) -> Self:
        from torch.utils.tensorboard.writer import SummaryWriter

        with _writing(self.out):
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            for folder in (self.out, self.out / "samples"):
                recover(folder)
            kept = [
                line
                for line in self.lines()
                if line["step"] <= self.first
                and "changed" not in line
                # a line of training has the learning rate, that of a preview has not
                and not (self.postponed and line["step"] == self.first and "lr" not in line)
            ]
            self.before = max((line["seconds"] for line in kept), default=0.0)
            kept = sorted([*kept, *self.changes], key=lambda line: line["step"])
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self.file = self.path.open("a")
            self.writer: Any = SummaryWriter(
                str(self.out / "tensorboard"), purge_step=self.first + 1
            )
        self.bars.__enter__()
        self.bars.step(self.stage, self.first, self.total, "")
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.bars.__exit__(kind, error, trace)
        failures: list[OSError | NotWritten] = []
        for close in (self.writer.close, self.file.close, self.curves):
            try:
                close()
            except (OSError, NotWritten) as failure:
                failures.append(failure)
        if failures and error is None:  # else the error that ended the run is the one to raise
            first = failures[0]
            raise first if isinstance(first, NotWritten) else NotWritten(self.out, first) from first

    def lines(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl, without a last line that was cut short by a kill."""
        lines = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return lines

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        seconds = round(self.before + time.perf_counter() - self.started, 2)
        with _writing(self.path):
            self.file.write(json.dumps({"step": step, "seconds": seconds, **numbers}) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        with _writing(self.out / "tensorboard"):
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)

    @property
    def due(self) -> bool:
        """True where the bar's losses are a second old.

        To read them at every step would be to wait for a GPU at every step.
        """
        return time.perf_counter() - self.shown >= 1

    def step(self, step: int, numbers: dict[str, float], log: bool) -> None:
        """Record that a step is done.

        Args:
            step: Number of finished steps.
            numbers: The bar shows the losses among them, if there are any.
            log: Write them all.
        """
        losses = {name: value for name, value in numbers.items() if name.endswith("/loss")}
        if numbers:
            self.shown = time.perf_counter()
        if log:
            self._write(step, numbers)
        if self.bars.visible:
            self.bars.step(self.stage, step, self.total, _text(losses) if numbers else None)
        elif log:
            pace = (time.perf_counter() - self.started) / (step - self.first)
            logger.info(
                "%s %d/%d  %s  %.3g s/step  %s left",
                *(self.stage, step, self.total, _text(losses), pace),
                _duration(pace * (self.total - step)),
            )

    def show(self, step: int, numbers: dict[str, float], images: dict[str, PIL.Image]) -> None:
        """Write held-out numbers and images of a step."""
        if numbers:
            self._write(step, numbers)
            logger.info("%s step %d: %s", self.stage, step, _text(numbers))
        for name, image in images.items():
            with atomic_file(self.out / "samples" / f"{name}-{step:08d}.png") as temporary:
                image.save(temporary, format="PNG")
            with _writing(self.out / "tensorboard"):
                pixels = np.asarray(image.convert("RGB"))
                self.writer.add_image(name, pixels, step, dataformats="HWC")
        with _writing(self.out / "tensorboard"):
            self.writer.flush()

    def curves(self) -> None:
        """Plot every logged number against the step: out/curves.png."""
        lines = self.lines()
        names = sorted(
            {name for line in lines for name, value in line.items() if isinstance(value, float)}
            - {"seconds"}
        )
        if not names:
            return
        from matplotlib.figure import Figure

        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
        for i, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, i + 1)
            points = [(line["step"], line[name]) for line in lines if name in line]
            marker = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), linewidth=1, marker=marker)
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if name.endswith("loss") and all(value > 0 for _, value in points):
                axes.set_yscale("log")
        with atomic_file(self.out / "curves.png") as temporary:
            figure.savefig(temporary, format="png", dpi=90)
