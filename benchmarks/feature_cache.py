"""Savings and errors of a feature cache, against the same run with every call whole.

    python benchmarks/feature_cache.py

Each row is one run of the same images: seeds, classes, guidance and sampler are the same, only the
calls differ at which the U-Net runs whole. Printed: floating-point operations and processor seconds
of the run (decoding is not in them), the largest and mean difference of the final latents, and the
PSNR of the decoded images, all against every = 1. A latent's variance is near 1.
"""

from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from _common import operations
from sfumato.batching import drive
from sfumato.decode import whole
from sfumato.diffuse import SeededNoise, sampler_coroutine
from sfumato.evaluate import psnr
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict import Guidance, evaluate_calls, feature_cache
from sfumato.predict.guidance.settings import build
from sfumato.registry import find


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    model: str = "fashion"
    n: int = 64
    """Images, of all classes in turn."""
    steps: int = 20
    seed: int = 0
    every: tuple[int, ...] = (1, 2, 3, 5)
    skips: tuple[int, ...] = (1, 2)
    """Number of skips above the cut of the network."""
    calls: tuple[int, ...] = (0, 1, 2, 4, 7, 11, 16)
    """A schedule of key calls, at the first of `skips`."""
    thresholds: tuple[float, ...] = (0.2, 0.4)
    """For caches that decide image by image, at the first of `skips`."""


def run(model: LatentDiffusion, settings: Settings, n: int, **cache: Any) -> Tensor:
    """The final latents of n images."""
    classes = (
        [model.class_names[k % len(model.class_names)] for k in range(n)]
        if model.class_names
        else [None] * n
    )
    conditioning, null = model.conditioner(classes), model.conditioner([None] * n)
    schedule, times = model.denoiser.process.schedule, model.times(settings.steps)
    guided = build(
        Guidance.parse(model.defaults.guidance), model.denoiser, conditioning, null, schedule.point
    )
    ask = feature_cache(guided, **cache)
    side = model.sample_size // model.autoencoder.space.factor
    draw = SeededNoise(
        (model.autoencoder.space.channels, side, side), [settings.seed + k for k in range(n)]
    )
    sampler = find("diffuse.samplers", model.defaults.sampler)
    z = drive(
        sampler_coroutine(sampler(draw(), times, schedule, draw), ask, settings.steps),
        evaluate_calls,
    )
    assert z is not None
    return z


def label(cache: dict[str, Any]) -> str:
    if cache["every"] is None:
        return f"moved > {cache['threshold']}"
    return (
        f"every {cache['every']}"
        if isinstance(cache["every"], int)
        else f"at {', '.join(map(str, cache['every']))}"
    )


@torch.inference_mode()
def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    model, console = load(settings.model), Console()
    caches: list[dict[str, Any]] = [
        {"every": e, "skips": s} for s in settings.skips for e in settings.every
    ]
    caches += [{"every": settings.calls, "skips": settings.skips[0]}] if settings.calls else []
    caches += [
        {"every": None, "threshold": t, "skips": settings.skips[0]} for t in settings.thresholds
    ]
    run(model, settings, 2)  # the first pass of a process is slower
    table = Table(
        title=f"{settings.model}, {settings.n} images, {settings.steps} steps, seed "
        f"{settings.seed}, {torch.__version__}, 1 thread"
    )
    for column in (
        "key calls",
        "skips above",
        "GFLOP an image",
        "saved",
        "CPU seconds",
        "saved",
        "latent max",
        "mean",
        "PSNR dB",
    ):
        table.add_column(column, justify="right")
    exact = run(model, settings, settings.n)
    image = whole(model.autoencoder, exact).add(1).div(2).clamp(0, 1)
    gflop_whole = seconds_whole = 0.0
    for cache in [
        {"every": 1, "skips": settings.skips[0]},
        *(c for c in caches if c["every"] != 1),
    ]:
        begun = process_time()
        z = run(model, settings, settings.n, **cache)
        seconds = process_time() - begun
        # proportional to images
        gflop = operations(lambda cache=cache: run(model, settings, 8, **cache)) / 8e9
        gflop_whole, seconds_whole = gflop_whole or gflop, seconds_whole or seconds
        result, difference = (
            whole(model.autoencoder, z).add(1).div(2).clamp(0, 1),
            (z - exact).abs(),
        )
        table.add_row(
            label(cache),
            str(cache["skips"]),
            f"{gflop:.2f}",
            f"{1 - gflop / gflop_whole:.0%}",
            f"{seconds:.2f}",
            f"{1 - seconds / seconds_whole:.0%}",
            f"{float(difference.max()):.3f}",
            f"{float(difference.mean()):.4f}",
            f"{psnr(image, result):.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings))
