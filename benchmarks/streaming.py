"""A model of many gigabytes in little memory: time and peak memory of its weights streamed from the
disk, beside all of them in memory.

    python benchmarks/streaming.py                          8 GB of weights, 3 GB of memory: 9 GB of
                                                            disk, about 10 GB of memory for the
                                                            first way
    python benchmarks/streaming.py --weights 1 --memory 1GB --steps 2
    python benchmarks/streaming.py --ways streamed cold     without the way that needs the memory

The model is a U-Net of Stable Diffusion 1.5's widths with as many transformer blocks at 16 x 16 as
make the size, in bfloat16 with random weights, written shard by shard; autoencoder and text encoder
are SD 1.5's. Each way makes the same picture in a process of its own. "streamed" finds the files in
the system's cache, as after a first run where memory is plenty; "cold" has the cache of the files
dropped before every step, as where other programs need all of it: each step reads everything that
does not stay from the disk. "held" is the largest resident memory that Linux tells (VmHWM): Python,
libraries, weights, feature maps, and all pages of files. "own" is the largest part of it that is no
file's (RssAnon, looked at every 20 ms). For a limit that the kernel keeps, run it all with
`systemd-run --user --scope -p MemoryMax=3G`.

With --steps 3 (two cores of an AMD EPYC with AVX-512, torch 2.13): 8.43 GB of weights in memory 4.8
s a step and 8.97 GB held, streamed in 3GB 5.3 s and 2.91 GB, cold 14.1 s and 2.91 GB; the same
bits. In another run, with others' work beside it, 18, 23 and 29 s a step.
"""

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import torch
import tyro
from safetensors.torch import save_file

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

SHARD = 10**9
BLOCK = 31_500_000
"""Numbers of a transformer block of 1280 channels that attends to 768."""


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    weights: float = 8.0
    """GB of the U-Net."""
    memory: str = "3GB"
    """For the streamed ways."""
    size: int = 256
    """Pixels along a side."""
    steps: int = 4
    threads: int = 2
    folder: Path | None = None
    """Folder of the model, kept and used again. Default: a temporary folder."""
    ways: tuple[str, ...] = ("in memory", "streamed", "cold")


def write(folder: Path, size: float) -> Path:
    """The model's folder; one that is complete is left as it is."""
    if (folder / "model_index.json").exists():
        return folder
    small = {
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
    }
    small |= {"mid_block_type": None, "sample_size": 64, "cross_attention_dim": 768}
    place = folder.with_name(folder.name + ".part")
    shutil.rmtree(place, ignore_errors=True)
    write_folder(place, FAMILIES["sd15"] | {"unet": small}, torch.bfloat16)
    shutil.rmtree(place / "unet")
    _write_unet(place / "unet", size)
    place.rename(folder)
    return folder


def _write_unet(folder: Path, size: float) -> None:
    """Shard by shard: no more than one is in memory."""
    from sfumato.predict.networks.unet import UNet, UNetConfig

    def network(depth: int) -> tuple[UNetConfig, dict[str, torch.Tensor]]:
        config = UNetConfig(
            sample_size=64, cross_attention_dim=768, transformer_layers_per_block=(1, 1, depth, 1)
        )
        with torch.device("meta"):
            return config, UNet(config).state_dict()

    least = sum(t.numel() for t in network(1)[1].values())
    config, state = network(1 + max(0, round((size * 1e9 / 2 - least) / (5 * BLOCK))))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    generator, shard, places, number = torch.Generator().manual_seed(0), {}, {}, 1
    for k, (name, shape) in enumerate(state.items()):
        weight = torch.empty(shape.shape).normal_(0, 0.02, generator=generator)
        shard[name] = (
            weight + 1 if "norm" in name and name.endswith("weight") else weight
        ).bfloat16()
        places[name] = f"diffusion_pytorch_model-{number:05}.safetensors"
        if sum(t.nbytes for t in shard.values()) > SHARD or k == len(state) - 1:
            save_file(shard, folder / places[name], metadata={"format": "pt"})
            shard, number = {}, number + 1
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def evict(folder: Path) -> None:
    """Asks the system to forget what it has cached of the files."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Watching(threading.Thread):
    """The largest RssAnon so far, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, process_memory("RssAnon"))
            sleep(0.02)


def side(way: str, folder: Path, settings: Settings, out: Path) -> None:
    """Write a way's image, seconds and memory to `out`."""
    import sfumato

    torch.set_num_threads(settings.threads)
    watching, ends = Watching(), []
    watching.start()
    if way == "cold":
        evict(folder)
    begin = perf_counter()
    model = sfumato.load(
        folder, dtype=torch.bfloat16, memory=None if way == "in memory" else settings.memory
    )
    opened = perf_counter()

    def on_step(step: Any) -> None:
        ends.append(perf_counter())
        if way == "cold":
            evict(folder)

    image = model.generate(
        "a cat",
        steps=settings.steps,
        height=settings.size,
        width=settings.size,
        output="tensor",
        on_step=on_step,
    )
    done = perf_counter()
    steps = [b - a for a, b in zip([opened, *ends], ends, strict=False)]
    memory = {"held": process_memory() / 1e9, "own": watching.most / 1e9}
    write_result(out, image, seconds=done - begin, steps=steps, decode=done - ends[-1], **memory)


def main() -> None:
    if (arguments := side_arguments()) is not None:
        way, folder, out, *rest = arguments
        side(way, Path(folder), tyro.cli(Settings, args=rest), Path(out))
        return
    settings = tyro.cli(Settings, description=__doc__)
    with TemporaryDirectory() as temporary:
        begin = perf_counter()
        folder = write(settings.folder or Path(temporary) / "model", settings.weights)
        weights = (
            f"{weights_size(folder):.2f} GB of weights in bfloat16 (written in "
            f"{perf_counter() - begin:.0f} s)"
        )
        print(f"{weights}, {settings.size} pixels, {settings.steps} steps, ")
        print(
            f"guidance 7.5, {settings.threads} threads, memory={settings.memory}; "
            f"torch {torch.__version__}\n"
        )
        print_header(
            "way",
            "seconds",
            "first step",
            "other steps",
            "decode",
            "held, GB",
            "own, GB",
            "the same bits",
        )
        contrast = 0.0
        arguments = flags(settings, "memory", "size", "steps", "threads")
        for way, image, expected, numbers in compare_sides(
            __file__, settings.ways, folder, arguments
        ):
            first, *others = numbers["steps"]
            times = (
                numbers["seconds"],
                first,
                sum(others) / max(len(others), 1),
                numbers["decode"],
            )
            same = (
                "yes"
                if torch.equal(image, expected)
                else f"no: up to {float((image - expected).abs().max()):.1e}"
            )
            print_row(
                way,
                *(f"{time:.1f}" for time in times),
                f"{numbers['held']:.2f}",
                f"{numbers['own']:.2f}",
                same,
            )
            contrast = float(expected.std())
    print(f"\nthe image's standard deviation: {contrast:.3f}")


if __name__ == "__main__":
    main()
