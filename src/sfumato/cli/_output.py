"""Output of commands: PNG files and their names, clocks, progress, sizes."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.diffuse.run import Step
    from sfumato.model import LatentDiffusion


def target(out: Path | None, name: str) -> Path:
    """Path of the PNG to write.

    Args:
        out: Value of --out: None, a file or a folder.
        name: Name of the file if `out` has none, without its ending.

    Raises:
        UserError: For another ending, or a place that cannot be written to.
    """
    if out is None:
        return Path(f"{name}.png")
    if out.is_dir():
        return out / f"{name}.png"
    if out.suffix.lower() not in ("", ".png"):
        raise UserError(
            f"--out {out} ends in {out.suffix}: images are written as PNG, "
            f"which keeps parameters; name it {out.with_suffix('.png')}"
        )
    parent = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"--out {out} cannot be written: {parent} is not a folder that you may write to; "
            "choose another place"
        )
    return out if out.suffix else out.with_name(out.name + ".png")


def slug(prompt: str | None) -> str:
    """A file name for a prompt: 'Ankle boot, red!' -> 'ankle-boot-red'."""
    words = re.sub(r"[\W_]+", "-", (prompt or "").lower()).strip("-")
    # file systems allow 255 bytes, numbers and temporary names come on top
    while len(words.encode()) > 100:
        words = words[:-1]
    return words.strip("-") or "sfumato"


def provenance(name: str, model: "LatentDiffusion") -> dict[str, Any]:
    """Parameters of a PNG about the model and the machine."""
    import torch

    from sfumato import __version__

    return {
        "model": name,
        "model_hash": model.hash,
        "version": __version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def write_images(
    path: Path,
    images: "Sequence[Image]",
    parameters: Mapping[str, Any],
    grid: bool,
    columns: int | None = None,
    numbered: bool = False,
) -> list[Path]:
    """Write images with their parameters inside.

    Args:
        path: The PNG; the numbers of several files are added to its name.
        images: At least one.
        parameters: Written into each PNG, with the image's index if each has its own file.
        grid: Write one PNG with all images.
        columns: Columns of the grid; None: square.
        numbered: Add its number to the name of a single file too.

    Returns:
        The files written.
    """
    from sfumato.images import grid as arrange
    from sfumato.images import write_png

    if grid:
        return [write_png(path, arrange(images, columns), parameters)]
    files = [path.with_name(f"{path.stem}-{k}.png") for k in range(len(images))]
    if len(images) == 1 and not numbered:
        files = [path]
    return [
        write_png(file, image, {**parameters, "index": k})
        for k, (file, image) in enumerate(zip(files, images, strict=True))
    ]


def read_image(path: Path) -> "Image":
    """Read an image file.

    Raises:
        UserError: For a file that is missing, or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected an image there") from error
    # UnidentifiedImageError is an OSError
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} could not be read as an image ({error}): "
            "it may be truncated; copy or download it again"
        ) from error


class Clock:
    """Seconds spent in named stages, in order."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        split = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.stages.items())
        return f"{sum(self.stages.values()):.2f} s ({split})"


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `update(done, total)` for a bar on stderr; without a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def sampling_progress(title: str, clock: Clock) -> Iterator[Callable[["Step"], None]]:
    """Yield an `on_step` that times the steps of a run and moves a bar on stderr."""
    with progress(title) as update:

        def on_step(step: "Step") -> None:
            clock.lap("sample")
            update(step.index + 1, step.count)

        yield on_step


def readable_size(size: int) -> str:
    """Bytes for people: 1234567 -> '1.2 MB'."""
    number = float(size)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
