"""What commands share: parsing, clocks, checks that need no torch, and a progress bar where
somebody watches.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

from sfumato.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

    from sfumato.model import LatentDiffusion

T = TypeVar("T")


def unset(meaning: str) -> Any:
    """For a flag whose default is None: what the help says instead of None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {meaning})")


MODELS = "the model's"
"""What `unset` says where the model decides."""


def parse(
    kind: type[T],
    arguments: Sequence[str],
    command: str,
    default: T | None = None,
    description: str | None = None,
    none: bool = False,
) -> T:
    """The dataclass `kind` filled from the command line; arguments that do not parse print why and
    exit with code 2.

    none: whether the word None may be given for a setting that can be None.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    config = (
        tyro.conf.PositionalMetavarFromFieldName,
        *(() if none else (tyro.conf.DisallowNone,)),
    )
    return tyro.cli(
        kind,
        args=list(arguments),
        prog=f"sfumato {command}",
        description=description,
        config=config,
        **options,
    )


FEW = 4
"""Steps for which packed weights do not pay: to pack them takes as long as three steps of one
Stable Diffusion picture gain."""


Precision = Literal["fp32", "bf16", "fp16"]


def torch_dtype(name: str) -> "torch.dtype":
    """torch's name for one of `Precision`'s."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in known:  # of a picture that was changed: the command line knows the names
        raise unknown("dtype", name, known)
    return known[name]


@dataclass(frozen=True)
class Opening:
    """How a command opens its models.

    memory: bytes that the process may take; weights are streamed then, and not packed. dtype (None:
    float32) and device (None: the CPU): as `load` takes them. transformer: a file, in place of the
    first model's own.
    """

    memory: int | None = None
    dtype: Precision | None = None
    device: str | None = None
    transformer: Path | None = None

    def load(self, source: str) -> "LatentDiffusion":
        """The model, as it lies in its files."""
        from sfumato.loading import load

        dtype = None if self.dtype is None else torch_dtype(self.dtype)
        how = {
            "memory": self.memory,
            "transformer": self.transformer,
            "dtype": dtype,
            "device": self.device,
        }
        return load(source, **{name: value for name, value in how.items() if value is not None})  # pyright: ignore[reportArgumentType]

    def ready(self, source: str, steps: int | None) -> "LatentDiffusion":
        """A model ready to make pictures in so many steps (None: its own). Its hash, which they
        carry, is made before weights are packed.
        """
        model = self.load(source)
        if self.memory is not None or model.settings(steps=steps)["steps"] <= FEW:
            return model
        _ = model.hash
        return model.optimized()

    def others(self) -> "Opening":
        """The same for models beside the first."""
        return replace(self, transformer=None)

    def recorded(self) -> dict[str, str]:
        """What a picture remembers of it, for it decides the bits."""
        return {
            name: value
            for name in ("dtype", "device")
            if (value := getattr(self, name)) is not None
        }


def weaker_for(guidance: Any, opening: Opening | None = None) -> Any:
    """The model that guidance by a weaker one names ("2 model:path=small"), opened; None for other
    guidance.
    """
    from sfumato.predict.guidance.settings import Guidance

    paths = [
        path
        for path in (getattr(r, "path", None) for r in Guidance.parse(guidance).parts()[2])
        if path
    ]
    return (opening or Opening()).others().load(paths[0]) if paths else None


def at_least(low: int, **values: int | None) -> None:
    """Refuses numbers below `low`; None means that the model decides."""
    for name, value in values.items():
        if value is not None and value < low:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} {value} is too small: expected a whole number of at least {low}"
            )


class Clock:
    """Seconds spent in named stages, in order."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Books the time since the last lap on `stage`."""
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        split = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.stages.items())
        return f"{sum(self.stages.values()):.2f} s ({split})"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `update(done, total)` for a bar on stderr; without a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def readable_size(size: int) -> str:
    """Bytes for people: 1234567 -> '1.2 MB'."""
    number = float(size)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
