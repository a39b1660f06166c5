"""Whole pipelines of Stable Diffusion's real sizes beside diffusers': the same folder, prompt, seed
and steps, the largest difference of a pixel.

    python benchmarks/full_size.py --family sd15      about 5 GB of disk and of memory
    python benchmarks/full_size.py --family sdxl      about 14 GB of each

Weights are random, with the published configs; the vocabulary is small (none is at hand offline),
the text encoders have their full size. Each side runs in a process of its own, with guidance 5 and
the folder's scheduler (DDIM), and says how long it took and its largest resident memory.
Differences are of pictures in [0, 1].
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal

import torch
import tyro

from _common import (
    compare_sides,
    flags,
    print_header,
    print_row,
    process_memory,
    side_arguments,
    weights_size,
    write_result,
)
from _models import FAMILIES, write_folder

PROMPT = "a cat and a red dog"


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    family: Literal["sd15", "sdxl"] = "sd15"
    size: int = 512
    """Pixels along a side."""
    steps: int = 2
    threads: int = 2
    folder: Path | None = None
    """Folder of the model, kept and used again. Default: a temporary folder."""
    ways: tuple[str, ...] = ("diffusers", "sfumato", "sfumato optimized")


def run(way: str, folder: Path, settings: Settings, out: Path) -> None:
    """Write a side's image, seconds and memory to `out`."""
    torch.set_num_threads(settings.threads)
    begin = perf_counter()
    size = {"height": settings.size, "width": settings.size}
    if way == "diffusers":
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            PROMPT,
            negative_prompt="a car",
            guidance_scale=5.0,
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **size,
        ).images
        image = torch.from_numpy(images).permute(0, 3, 1, 2)
    else:
        import sfumato

        model = sfumato.load(folder)
        model = model.optimized() if way.endswith("optimized") else model
        image = model.generate(
            PROMPT,
            negative_prompt="a car",
            guidance=5.0,
            steps=settings.steps,
            seed=0,
            output="tensor",
            **size,
        )
    write_result(out, image, seconds=perf_counter() - begin, memory=process_memory() / 1e9)


def main() -> None:
    if (side := side_arguments()) is not None:
        way, folder, out, *rest = side
        run(way, Path(folder), tyro.cli(Settings, args=rest), Path(out))
        return
    settings = tyro.cli(Settings, description=__doc__)
    with TemporaryDirectory() as temporary:
        folder = write_folder(
            settings.folder or Path(temporary) / "model", FAMILIES[settings.family]
        )
        weights = f"{settings.family}, {weights_size(folder):.1f} GB of weights in float32"
        print(f"{weights}, {settings.size} pixels, {settings.steps} steps, guidance 5\n")
        print_header("way", "seconds", "largest resident memory, GB", "largest difference")
        contrast = 0.0
        arguments = flags(settings, "family", "size", "steps", "threads")
        for way, image, expected, numbers in compare_sides(
            __file__, settings.ways, folder, arguments
        ):
            difference, contrast = float((image - expected).abs().max()), float(expected.std())
            print_row(
                way, f"{numbers['seconds']:.1f}", f"{numbers['memory']:.2f}", f"{difference:.1e}"
            )
    assert contrast > 0.02, "an image in which something can be seen"
    print(f"\nthe image's standard deviation: {contrast:.3f}")


if __name__ == "__main__":
    main()
