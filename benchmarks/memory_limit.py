"""Largest memory of the command line under `--memory`, for several limits and numbers of images.

    python benchmarks/memory_limit.py
    python benchmarks/memory_limit.py --cases "1 512 1150MB"    images, pixels along a side, limit

The model is random: a U-Net of 220 million numbers, an autoencoder of SD's shape and CLIP-L, in
float32 (1.7 GB of disk). Each case is one `sfumato generate` of one step in a process of its own.
The peak is its `ru_maxrss`, which also counts the process that started it: the model is therefore
written by another process. A limit that is too small is refused.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from _common import print_header, print_row, run_side, side_arguments, weights_size
from _models import FAMILIES, SD15_UNET, write_folder


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    cases: tuple[str, ...] = ("4 256 900MB", "1 512 1150MB")
    """Each: images, pixels along a side, limit."""
    threads: int = 2
    folder: Path | None = None
    """Folder of the model, kept and used again. Default: a temporary folder."""


def peak(arguments: list[str], threads: int) -> tuple[float, float]:
    """Return MB and seconds of a run of the command line."""
    command = [sys.executable, "-m", "sfumato", *arguments]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - begin


def main() -> None:
    if (arguments := side_arguments()) is not None:
        network = SD15_UNET | {"block_out_channels": (160, 320, 640, 640)}
        write_folder(Path(arguments[0]), FAMILIES["sd15"] | {"unet": network})
        return
    settings = tyro.cli(Settings, description=__doc__)
    with TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary) / "model"
        run_side(__file__, folder)
        print(f"{weights_size(folder):.2f} GB of weights, {settings.threads} threads\n")
        print_header("images", "pixels", "limit", "peak, MB", "seconds")
        for case in settings.cases:
            count, side, limit = case.split()
            arguments = ["generate", "a cat", f"--model={folder}", f"--n={count}", "--steps=1"]
            arguments += [f"--height={side}", f"--width={side}", f"--memory={limit}", "--overwrite"]
            arguments += [f"--out={Path(temporary) / 'image.png'}"]
            memory, seconds = peak(arguments, settings.threads)
            print_row(count, side, limit, f"{memory:.0f}", f"{seconds:.1f}")


if __name__ == "__main__":
    main()
