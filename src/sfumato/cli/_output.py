"""Output of commands: PNG files and their names, clocks, progress, sizes."""

import itertools
import logging
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.diffuse.run import Step
    from sfumato.model import LatentDiffusion


@dataclass(frozen=True)
class Target:
    """Names of the PNG files of a run: none replaces an older file unless that is meant.

    Attributes:
        path: The PNG, or the first of several.
        named: --out has its name: several files are numbered NAME-0.png, NAME-1.png ... Else they
            are named after their seeds, and files of the same names are left, with a number added.
        overwrite: Replace files of the same names.
        seed: Seed in the name of the first image; None: images are numbered.
    """

    path: Path
    named: bool
    overwrite: bool
    seed: int | None = None

    def files(self, count: int, several: bool) -> list[Path]:
        """The files of a run.

        Args:
            count: Number of images.
            several: A file an image, instead of one for all.

        Raises:
            UserError: For a name of --out that is taken.
        """
        if self.named:
            files = [self.path]
            if several:
                files = [_suffixed(self.path, str(k)) for k in range(count)]
            taken = next((file for file in files if os.path.lexists(file)), None)
            if taken is not None and not self.overwrite:
                raise UserError(
                    f"{taken} exists and is left as it is: choose another --out, "
                    "or add --overwrite to replace it"
                )
            return files
        for number in itertools.count(1):
            files = self._default_files(count, several, number)
            if self.overwrite or not any(map(os.path.lexists, files)):
                return files
        raise AssertionError

    def _default_files(self, count: int, several: bool, number: int) -> list[Path]:
        """The files of the run of this number among those of the same names."""
        if not several:
            files = [self.path if self.seed is None else _suffixed(self.path, f"seed{self.seed}")]
        elif self.seed is None:
            files = [_suffixed(self.path, str(k)) for k in range(count)]
        else:
            files = [_suffixed(self.path, f"seed{self.seed + k}") for k in range(count)]
        return files if number == 1 else [_suffixed(file, str(number)) for file in files]


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}-{suffix}{path.suffix}")


_OTHER_ENDINGS = set(
    ".jpg .jpeg .jfif .jpe .jp2 .jxl .webp .avif .heic .heif .gif .bmp .tif .tiff .ppm .tga .svg "
    ".pdf .mp4 .webm .json .txt .html .safetensors".split()
)
"""Endings of other kinds of files. Others belong to the name: v1.5 becomes v1.5.png."""
_LONGEST = 220
"""Bytes of a name. File systems allow 255; numbers and temporary names come on top."""


def target(out: str | None, name: str, overwrite: bool = False, seed: int | None = None) -> Target:
    """Choose the names of the PNG files to write.

    Args:
        out: Value of --out: None, a file, or a folder, which may be missing where it ends in "/".
        name: Name of the file if `out` has none, without its ending.
        overwrite: Replace files of the same names.
        seed: Seed of the first image, for names that `out` lacks; None: images are numbered.

    Raises:
        UserError: For another ending, or a place that cannot be written to.
    """
    if out is None:
        return Target(Path(f"{name}.png"), False, overwrite, seed)
    path = Path(os.path.expanduser(out))
    # pathlib drops the slash at the end, and the dot
    last = out.replace(os.sep, "/").rsplit("/", 1)[-1]
    try:
        folder = last in ("", ".", "..") or path.is_dir()
        if folder:
            path = path / f"{name}.png"
        elif path.suffix.lower() in _OTHER_ENDINGS:
            raise UserError(
                f"--out {out} ends in {path.suffix}: images are written as PNG, "
                f"which keeps parameters; name it {path.with_suffix('.png')}"
            )
        elif path.suffix.lower() != ".png":
            path = path.with_name(f"{path.name}.png")
        if len(os.fsencode(path.name)) > _LONGEST:
            raise UserError(
                f"--out {quoted(out)} has a name of {len(os.fsencode(path.name))} bytes: "
                f"expected at most {_LONGEST}, file systems allow little more"
            )
        parent = next((p for p in path.absolute().parents if os.path.lexists(p)), Path("/"))
        usable = parent.is_dir() and os.access(parent, os.W_OK)
        odd = path.exists() and not path.is_file()
    except OSError as error:
        raise UserError(
            f"--out {quoted(out)} cannot be used ({error.strerror}): choose another place"
        ) from error
    if not usable or odd:
        wrong = f"{path} is not a file" if usable else f"{parent} is not a folder"
        raise UserError(
            f"--out {out} cannot be written: {wrong} that you may write to; choose another place"
        )
    return Target(path, not folder, overwrite, None if not folder else seed)


def slug(prompt: str | None) -> str:
    """A file name for a prompt: 'Ankle boot, red!' -> 'ankle-boot-red'."""
    text = unicodedata.normalize("NFC", prompt or "").lower()
    # letters, numbers, and the marks without which some scripts cannot be read
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    return short("-".join("".join(kept).split())).strip("-") or "sfumato"


def short(name: str) -> str:
    """The beginning of a name, of at most 100 bytes, as far as the file system can spell it."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a system whose names are ASCII
        name = name.encode("ascii", "ignore").decode()
    while len(os.fsencode(name)) > 100:
        name = name[:-1]
    return name


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
    target: Target,
    images: "Sequence[Image]",
    parameters: Mapping[str, Any],
    grid: bool,
    columns: int | None = None,
    numbered: bool = False,
) -> list[Path]:
    """Write images with their parameters inside.

    Args:
        target: Names of the PNG files.
        images: At least one.
        parameters: Written into each PNG, with the image's index if each has its own file.
        grid: Write one PNG with all images.
        columns: Columns of the grid; None: square.
        numbered: Add its number to the name of a single file of --out too.

    Returns:
        The files written.
    """
    from sfumato.images import grid as arrange

    if grid:
        (file,) = free_files(target, 1, several=False)
        return [write_image(file, arrange(images, columns), parameters, target.overwrite)]
    several = numbered or len(images) > 1
    return [
        write_image(file, image, {**parameters, "index": k}, target.overwrite)
        for k, (file, image) in enumerate(
            zip(free_files(target, len(images), several), images, strict=True)
        )
    ]


def free_files(target: Target, count: int, several: bool) -> list[Path]:
    """The files of a run that has ended: names of --out that were taken meanwhile get numbers."""
    try:
        return target.files(count, several)
    except UserError:
        return replace(target, overwrite=True).files(count, several)


def write_image(path: Path, image: "Image", parameters: Mapping[str, Any], overwrite: bool) -> Path:
    """Write a PNG; NAME-2.png, NAME-3.png ... where the name is taken, also at this moment."""
    from sfumato.images import write_png

    for number in itertools.count(1):
        file = path if number == 1 else _suffixed(path, str(number))
        if overwrite or not os.path.lexists(file):
            try:
                return write_png(file, image, parameters, replace=overwrite)
            except FileExistsError:
                if overwrite:
                    raise
    raise AssertionError


def read_image(path: Path) -> "Image":
    """Read an image file.

    Raises:
        UserError: For a file that is missing, or no image.
    """
    from sfumato.io.image_files import open_image

    if str(path).startswith(("http:/", "https:/")):
        raise UserError(f"{path} is an address: download the image and give its file")
    try:
        return open_image(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected an image there") from error
    except UserError as error:
        raise UserError(f"{path} could not be read as an image ({error})") from error


def note_losses(
    path: Path, image: "Image", keeps: bool = False, grey: bool = False, mask: bool = False
) -> None:
    """Print on stderr the parts of an image that the result lacks.

    Args:
        path: The file.
        image: The image as opened.
        keeps: As for `losses`.
        grey: As for `losses`.
        mask: The image is a mask, of which frames alone are noted.
    """
    from sfumato.io.image_files import frame_count, losses

    frames = frame_count(path)
    notes = [f"the first of its {frames} frames is used"] if frames > 1 else []
    notes += [] if mask else losses(image, keeps, grey)
    if notes:
        print(f"sfumato: {path}: {'; '.join(notes)}", file=sys.stderr)


class _StderrHandler(logging.Handler):
    """Log lines on the stderr of the moment: a progress bar replaces it to stay below them."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show the library's lines about a run, such as how data are read.

    Of several processes (torchrun) the first one speaks, and the others of errors alone.
    """
    logger = logging.getLogger("sfumato")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


@contextmanager
def without_logs() -> Iterator[None]:
    """Drop the library's log records of this Python thread until the end of the `with` block."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.name.partition(".")[0] != "sfumato"

    # filters of loggers do not see the records of their children, those of handlers do
    handlers = [*logging.root.handlers, *logging.getLogger("sfumato").handlers]
    handlers += [] if logging.lastResort is None else [logging.lastResort]
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


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
