"""Ways to decode and to encode one large image: seconds, peak memory, and the errors against all at
once.

    python benchmarks/decode_memory.py                                        512 pixels
    python benchmarks/decode_memory.py --size 2048 --ways whole exact tiled   about 17 GB and an
    hour of processor time (30 minutes on two cores) python benchmarks/decode_memory.py --parts
    encode

With `--keep FOLDER` what each way gave stays there, and is not worked out again: ways can be run
one by one, and the last command prints all.

    python benchmarks/decode_memory.py --size 2048 --keep runs/2048 --ways whole --parts decode
    python benchmarks/decode_memory.py --size 2048 --keep runs/2048 --ways exact
    python benchmarks/decode_memory.py --size 2048 --keep runs/2048 --ways whole exact tiled

The autoencoder has the shape of Stable Diffusion's and random weights, as its norms and attention
are there whatever the weights; the latent is normal noise, the image to encode uniform noise. Each
way runs in a process of its own. Its peak is the largest resident memory (VmHWM of Linux) above
what was resident before: weights, libraries and a first small run. diffusers, if it is installed,
has the same weights; its tiles are as large as those of sfumato. Errors are of images in [-1, 1],
or of the posterior's means (of its own units), against the first way; PSNR is 10 log10(range^2 /
mean squared error), where the range is 2 for pixels, and from the lowest to the highest for means.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from _common import flags, process_memory, run_side, side_arguments
from sfumato.compress import AutoencoderKL, KLConfig
from sfumato.decode import exact, exact_posterior, tiled, tiled_posterior, whole
from sfumato.io.atomic import write_tensors


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    size: int = 512
    """Pixels along a side."""
    parts: tuple[Literal["decode", "encode"], ...] = ("decode", "encode")
    ways: tuple[str, ...] = ("whole", "exact", "tiled", "diffusers", "diffusers tiled")
    """The first is what the others are held against. "exact 4.5": with maps of 4.5 GB between
    layers; "exact 0 8": in strips of 8 rows."""
    tile: int = 32
    """Latent cells along a tile; a quarter of them overlap."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 2
    seed: int = 0
    keep: Path | None = None
    """A folder in which what was made stays: ways whose results lie there are not run again."""

    @property
    def title(self) -> str:
        """Values that all ways have in common."""
        return (
            f"{self.size}x{self.size}, {self.dtype}, tiles of {self.tile} cells, seed {self.seed}, "
            f"{torch.__version__}, "
            f"{self.threads} threads"
        )


def build(settings: Settings) -> AutoencoderKL:
    """Of Stable Diffusion's shape.

    The last convolution is smaller than torch makes it, so that few pixels are limited to [-1, 1].
    """
    torch.manual_seed(settings.seed)
    autoencoder = AutoencoderKL(
        KLConfig(
            block_out_channels=(128, 256, 512, 512), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
        )
    )
    autoencoder.decoder.conv_out.weight.data.mul_(0.5)
    return autoencoder.eval().requires_grad_(False).to(getattr(torch, settings.dtype))


def diffusers_autoencoder(autoencoder: AutoencoderKL, settings: Settings, tiles: bool) -> Any:
    """diffusers' autoencoder with the same weights."""
    import diffusers

    config = {
        k: v
        for k, v in autoencoder.to_config().items()
        if k not in ("_class_name", "latents_mean", "latents_std")
    }
    other: Any = diffusers.AutoencoderKL.from_config(config)
    other.load_state_dict(autoencoder.state_dict())
    if tiles:
        other.enable_tiling()
        other.tile_latent_min_size, other.tile_sample_min_size = settings.tile, 8 * settings.tile
    # its own `to` warns of float32 modules that it has not
    return nn.Module.to(other.eval().requires_grad_(False), autoencoder.dtype)


def runner(settings: Settings, way: str, part: str) -> Callable[[Tensor], Tensor]:
    """The way as a function of the latent, or of the image to encode."""
    autoencoder, decodes = build(settings), part == "decode"
    kind, *numbers = way.split()
    if kind == "diffusers":
        other = diffusers_autoencoder(autoencoder, settings, tiles="tiled" in numbers)
        if decodes:
            return lambda z: other.decode(z.to(other.dtype)).sample.float().clamp(-1, 1)
        return lambda image: other.encode(image.to(other.dtype)).latent_dist.mean.float()
    if kind == "whole":
        return (
            (lambda z: whole(autoencoder, z))
            if decodes
            else (lambda image: autoencoder.posterior(image.to(autoencoder.dtype)).mean)
        )
    if kind == "exact":
        memory = int(float(numbers[0]) * 1e9) or None if numbers else None
        rows = int(numbers[1]) if len(numbers) > 1 else None
        if decodes:
            return lambda z: exact(autoencoder, z, rows, memory)
        return lambda image: exact_posterior(autoencoder, image, rows, memory).mean
    tile, overlap = settings.tile, settings.tile // 4
    if decodes:
        return lambda z: tiled(autoencoder, z, tile, overlap)
    return lambda image: tiled_posterior(autoencoder, image, tile, overlap).mean


@torch.inference_mode()
def measure(settings: Settings, way: str, part: str, folder: Path) -> None:
    """Runs one way in this process; writes its numbers and what it made."""
    torch.set_num_threads(settings.threads)
    run = runner(settings, way, part)
    generator = torch.Generator().manual_seed(settings.seed)
    side = settings.size // 8
    inputs = torch.randn(1, 4, side, side, generator=generator)
    if part == "encode":
        inputs = torch.rand(1, 3, settings.size, settings.size, generator=generator) * 2 - 1
    small = 8 if part == "decode" else 64
    run(inputs[:, :, :small, :small])
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest memory begins anew
    before, begun, busy = process_memory("VmRSS"), perf_counter(), process_time()
    made = run(inputs)
    numbers = {
        "seconds": perf_counter() - begun,
        "busy": process_time() - busy,
        "peak": process_memory() - before,
    }
    write_tensors(folder / "made.safetensors", {"made": made.float().contiguous()})
    # last: with it the results are whole
    (folder / "numbers.json").write_text(json.dumps({**numbers, "title": settings.title}))


def results(settings: Settings, way: str, part: str, folder: Path) -> tuple[dict[str, Any], Tensor]:
    """The numbers of `measure` in a process of its own, and what was made; of an earlier run where
    they lie in the folder.
    """
    numbers = folder / "numbers.json"
    if not numbers.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_side(
            __file__,
            way,
            part,
            folder,
            *flags(settings, "size", "tile", "dtype", "threads", "seed"),
        )
    result = json.loads(numbers.read_text())
    if result["title"] != settings.title:
        raise SystemExit(
            f"{folder} is of another run ({result['title']}): give another folder to keep this one "
            f"in ({settings.title})"
        )
    return result, load_file(folder / "made.safetensors")["made"]


def cells(
    numbers: dict[str, Any], made: Tensor, first: tuple[dict[str, Any], Tensor], part: str
) -> list[str]:
    """A row of the table, without its name: cost, and what is different from the first way."""
    error, low, high = (made - first[1]).abs(), float(first[1].min()), float(first[1].max())
    square = float(error.double().square().mean())
    peak = 2.0 if part == "decode" else high - low
    return [
        f"{numbers['seconds']:.1f}",
        f"{numbers['busy']:.1f}",
        f"{numbers['peak'] / 1e9:.2f}",
        f"{numbers['peak'] / first[0]['peak']:.2f}" if first[0]["peak"] else "-",  # a small image
        f"{float(error.max()):.1e}",
        f"{float(error.mean()):.1e}",
        f"{10 * math.log10(peak**2 / square):.1f}" if square else "same",
    ]


def main() -> None:
    if (side := side_arguments()) is not None:
        way, part, folder, *rest = side
        measure(tyro.cli(Settings, args=rest), way, part, Path(folder))
        return
    settings = tyro.cli(Settings, description=__doc__)
    # rich cuts what is wider than a terminal it assumes
    console = Console(width=None if sys.stdout.isatty() else 120)
    table, below = Table(title=settings.title), []
    for column in (
        "",
        "way",
        "seconds",
        "CPU seconds",
        "peak GB",
        "of the first",
        "largest error",
        "mean error",
        "PSNR dB",
    ):
        table.add_column(column, justify="left" if column in ("", "way") else "right")
    with TemporaryDirectory() as temporary:
        for part in settings.parts:
            first: tuple[dict[str, Any], Tensor] | None = None
            for way in settings.ways:
                if way.startswith("diffusers") and find_spec("diffusers") is None:
                    continue
                with console.status(f"{part} {way}"):
                    result = results(
                        settings, way, part, (settings.keep or Path(temporary)) / f"{part} {way}"
                    )
                first = first or result
                table.add_row(part, way, *cells(*result, first, part))
            table.add_section()
            if first is not None:
                limited = (
                    f", {float((first[1].abs() == 1).float().mean()):.2%} limited to [-1, 1]"
                    if part == "decode"
                    else ""
                )
                below.append(
                    f"{part} {settings.ways[0]}: standard deviation "
                    f"{float(first[1].std()):.3f}{limited}"
                )
    console.print(table)
    console.print("\n".join(below))


if __name__ == "__main__":
    main()
