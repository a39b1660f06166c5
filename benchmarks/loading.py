"""Opening a checkpoint folder of Stable Diffusion 1.5's size: seconds from the start of the
process, and memory, beside diffusers.

    python benchmarks/loading.py [--stored float16] [--dtype bfloat16] [--folder runs/sd15]

Each side runs in a process of its own, several times in turns; the medians are printed. Files are
in the page cache, as after a first run. "opened": everything is there for a first call. "first
step": the U-Net has run once on a latent of 8 x 8, so that all weights were read. Resident memory
counts pages of the file, which the system can take back at any time, and memory of its own
(anonymous), which it cannot.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro

from _common import print_header, print_row, process_memory, run_side, side_arguments, weights_size
from _models import FAMILIES, write_folder

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    stored: Dtype = "float32"
    """The dtype of the files."""
    dtype: Dtype = "float32"
    """The dtype that the model is opened in."""
    repeats: int = 3
    folder: Path | None = None
    """Folder of the model, kept and used again. Default: a temporary folder."""
    ways: tuple[str, ...] = ("diffusers", "sfumato", "sfumato optimized")


@torch.inference_mode()
def side(way: str, folder: str, dtype: torch.dtype, begin: float) -> None:
    """Open the folder in this process; print seconds and GB of memory, opened and after a step, as
    JSON.
    """

    def cost() -> tuple[float, float, float]:
        return time.time() - begin, process_memory() / 1e9, process_memory("RssAnon") / 1e9

    torch.set_num_threads(2)
    x, t, tokens = (
        torch.zeros(1, 4, 8, 8, dtype=dtype),
        torch.full((1,), 500.0),
        torch.zeros(1, 77, 768, dtype=dtype),
    )
    if way == "diffusers":
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        opened = cost()
        pipe.unet(x, t, encoder_hidden_states=tokens)
    else:
        import sfumato
        from sfumato.types import Conditioning

        model = sfumato.load(folder, dtype=dtype)
        model = model.optimized() if way.endswith("optimized") else model
        opened = cost()
        model.denoiser.network(x, t, Conditioning(tokens=tokens))
    print(json.dumps([*opened, *cost()]))


def main() -> None:
    if (arguments := side_arguments()) is not None:
        way, folder, dtype, begin = arguments
        side(way, folder, getattr(torch, dtype), float(begin))
        return
    settings = tyro.cli(Settings, description=__doc__)
    with TemporaryDirectory() as temporary:
        folder = write_folder(
            settings.folder or Path(temporary) / "model",
            FAMILIES["sd15"],
            getattr(torch, settings.stored),
        )
        print(
            f"{weights_size(folder):.2f} GB in {settings.stored}, opened in {settings.dtype}; "
            f"torch {torch.__version__}\n"
        )
        costs: dict[str, list[list[float]]] = {way: [] for way in settings.ways}
        for turn in range(settings.repeats + 1):  # the first turn fills the page cache
            for way in settings.ways:
                printed = run_side(__file__, way, folder, settings.dtype, time.time())
                if turn:
                    costs[way].append(json.loads(printed.splitlines()[-1]))
    print_header(
        "way",
        *("opened: seconds", "peak resident GB", "anonymous GB"),
        *("first step: seconds", "peak resident GB", "anonymous GB"),
    )
    for way, rows in costs.items():
        print_row(way, *(f"{statistics.median(column):.2f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
