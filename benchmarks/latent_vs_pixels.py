"""Latent against pixels: the same U-Net trained on 28x28 pixels and on 7x7 latents with equal
compute.

    python benchmarks/latent_vs_pixels.py --model fashion --steps 1600 --out runs/latent_vs_pixels

Both runs share network (but for its first and last convolution), objective, optimizer, batch and
data; the pixel run gets as many steps as the same number of floating-point operations pays for.
Printed for both: operations, saved activations and state a step, seconds, and the Frechet distance
of samples over time. The autoencoder's own training is not in the latent run's compute: its cost is
printed beside it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from _common import all_pixels
from sfumato.compress import AutoencoderKL
from sfumato.data import ImageSet, open_images
from sfumato.decode import whole
from sfumato.diffuse import Process, SeededNoise, run_sampler
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.samplers.ddim import ddim
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.timesteps import timesteps
from sfumato.evaluate import extract, frechet_distance, gaussian, load_features
from sfumato.images import grid, to_pil
from sfumato.io.atomic import write_json
from sfumato.loading import load
from sfumato.predict import ClassNames, Denoiser, UNet
from sfumato.train import (
    DenoiserLoss,
    DenoiserObjective,
    DenoiserRecipe,
    Draw,
    LoopSettings,
    encode_all,
    load_recipe,
    train,
)
from sfumato.train.conditions.classes import Classes
from sfumato.types import LatentSpace


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    model: str = "fashion"
    """The model whose autoencoder makes the latents."""
    data: str = "fashion-mnist"
    steps: int = 1600
    """Steps of the latent run; the pixel run gets the same floating-point operations."""
    batch_size: int = 128
    points: int = 4
    """Number of measurements of the Frechet distance, evenly over the run."""
    samples: int = 500
    sampling_steps: int = 10
    lr: float = 1e-3
    seed: int = 0
    out: Path = Path("runs/latent_vs_pixels")


class Pixels:
    """Images in the place of a latent cache: mean is the image, std is 0."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        result = self.images.batch(indices)
        return {
            "mean": result["image"],
            "std": torch.zeros_like(result["image"]),
            "label": result["label"],
        }


def unet(channels: int, classes: int, size: int) -> UNet:
    """The network of the bundled model's recipe, for `channels` in and out."""
    recipe = load_recipe("fashion_mnist", "denoiser")
    assert isinstance(recipe, DenoiserRecipe)
    return UNet(
        replace(
            recipe.network,
            in_channels=channels,
            out_channels=channels,
            sample_size=size,
            num_class_embeds=classes + 1,
        )
    )


def cost(objective: DenoiserObjective, batch_size: int) -> tuple[float, float, float]:
    """(FLOPs, bytes of activations kept for the backward pass, bytes of weights + gradients + AdamW
    + average) of one training step.
    """
    network = objective.networks["denoiser"]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    draw = Draw(torch.Generator().manual_seed(0), batch_size)
    batch = objective.batch(torch.arange(batch_size), draw)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with FlopCounterMode(display=False) as flops, torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss, _ = objective.loss("denoiser", objective.networks, batch, 0, draw)
        loss.backward()
    network.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in network.parameters())
    return (
        flops.get_total_flops(),
        sum(v for k, v in kept.items() if k not in weights),
        parameters * 4 * 5,
    )


class Run:
    """One side of the comparison: trains, stops the clock to measure, and remembers the curve."""

    def __init__(
        self,
        name: str,
        objective: DenoiserObjective,
        decode: Any,
        shape: tuple[int, ...],
        settings: Settings,
        reference: Any,
    ):
        self.name, self.objective, self.decode, self.shape, self.settings = (
            name,
            objective,
            decode,
            shape,
            settings,
        )
        self.features, self.statistics, self.conditioner = reference
        self.flops, self.activations, self.state = cost(objective, settings.batch_size)
        self.curve: list[dict[str, float]] = []
        self.paused = 0.0
        objective.preview = self.measure

    def draw(self, network: nn.Module) -> Tensor:
        """Class-balanced samples without guidance, (n, C, H, W) in [-1, 1]."""
        s, process = self.settings, self.objective.process
        denoiser, result = Denoiser(network, process), []
        for start in range(0, s.samples, 100):
            count = min(100, s.samples - start)
            noise = SeededNoise(self.shape, [s.seed + start + k for k in range(count)])
            condition = self.conditioner.from_labels(
                (torch.arange(count) + start) % len(self.conditioner.names)
            )
            times = timesteps("trailing", s.sampling_steps, process.schedule)
            with torch.autocast("cpu", torch.bfloat16):
                z = run_sampler(
                    ddim(noise(), times, process.schedule, noise),
                    lambda x, t, c=condition: denoiser(x, t, c),
                    s.sampling_steps,
                )
            assert z is not None
            result.append(self.decode(z))
        return torch.cat(result)

    @torch.inference_mode()
    def measure(self, network: nn.Module, step: int) -> tuple[dict[str, float], dict[str, Any]]:
        """The Frechet distance now; the time it takes does not count as training."""
        began = perf_counter()
        images = self.draw(network)
        distance = frechet_distance(
            gaussian(extract(self.features, (images + 1) / 2)), self.statistics
        )
        seconds = began - self.started - self.paused
        self.curve.append(
            {
                "step": step,
                "pflop": step * self.flops / 1e15,
                "seconds": seconds,
                "frechet": distance,
            }
        )
        self.paused += perf_counter() - began
        return {"frechet": distance}, {"samples": grid(to_pil(images[:80]), columns=10)}

    def train(self, steps: int) -> None:
        """Trains for `steps`, measuring at `points` places."""
        s = self.settings
        every = max(1, steps // s.points)
        loop = LoopSettings(
            steps=every * s.points, batch_size=s.batch_size, lr=s.lr, warmup=min(100, steps // 10),
            decay="cosine", final_lr=0.05,
            betas=(0.9, 0.99), ema=0.99, precision="bf16", seed=s.seed, save_every=10**9,
            show_every=every, log_every=max(1, every // 10),
        )  # fmt: skip
        self.started = perf_counter()
        train(self.objective, loop, s.out / self.name)


def picture(runs: list[Run], floor: float, path: Path) -> None:
    """FD against compute and against seconds, both sides."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for i, (key, label) in enumerate(
        (("pflop", "training compute, PFLOP"), ("seconds", "training time, seconds"))
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        for run in runs:
            axes.plot(
                [p[key] for p in run.curve],
                [p["frechet"] for p in run.curve],
                marker="o",
                label=run.name,
            )
        axes.axhline(floor, linestyle=":", color="grey", label="floor: real images")
        axes.set(xlabel=label, ylabel="Frechet distance", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=110)


def main(settings: Settings) -> None:
    """Runs both sides and prints the table."""
    torch.manual_seed(settings.seed)
    model = load(settings.model)
    autoencoder = model.autoencoder
    assert isinstance(autoencoder, AutoencoderKL)
    images, held_out = (
        open_images(settings.data, split="train"),
        open_images(settings.data, split="test"),
    )
    condition = Classes(ClassNames(images.class_names))
    features = load_features("fashion")
    pixels = all_pixels(images)
    statistics = gaussian(extract(features, (pixels + 1) / 2))
    real = held_out.batch(torch.arange(settings.samples))["image"]
    floor = frechet_distance(gaussian(extract(features, (real + 1) / 2)), statistics)
    process = Process(schedule("flow"), parameterization("flow"))
    loss = DenoiserLoss(times="logit_normal", drop=0.0)
    reference = (features, statistics, condition.conditioner)

    latents = encode_all(images, autoencoder, settings.out / "latents")
    c, classes = images.shape[0], len(images.class_names)
    everywhere = LatentSpace(c, 1, (float(pixels.mean()),) * c, (float(pixels.std()),) * c)
    torch.manual_seed(settings.seed)
    latent = DenoiserObjective(
        unet(latents.shape[0], classes, latents.shape[-1]),
        process,
        latents,
        autoencoder.space,
        condition,
        loss,
    )
    torch.manual_seed(settings.seed)
    pixel = DenoiserObjective(
        unet(c, classes, images.shape[-1]),
        process,
        Pixels(images),
        everywhere,
        condition,
        loss,
    )
    runs = [
        Run("latent", latent, lambda z: whole(autoencoder, z), latents.shape, settings, reference),
        Run(
            "pixels",
            pixel,
            lambda z: everywhere.restore(z).clamp(-1, 1),
            images.shape,
            settings,
            reference,
        ),
    ]
    budget = settings.steps * runs[0].flops
    for run in runs:
        run.train(max(settings.points, round(budget / run.flops)))

    with FlopCounterMode(display=False) as counted:
        autoencoder.requires_grad_(True)(pixels[:8])[0].square().mean().backward()
    table = Table(
        title=f"The same U-Net on pixels and on latents, {budget / 1e15:.2f} PFLOP each, batch "
        f"{settings.batch_size}; floor {floor:.3f}"
    )
    for column in (
        "",
        "GFLOP a step",
        "activations, MB",
        "weights and optimizer, MB",
        "steps",
        "seconds",
        "FD over time",
    ):
        table.add_column(column, justify="left" if column == "" else "right")
    for run in runs:
        last, path = run.curve[-1], "  ".join(f"{p['frechet']:.2f}" for p in run.curve)
        numbers = (
            f"{run.flops / 1e9:.1f}",
            f"{run.activations / 1e6:.0f}",
            f"{run.state / 1e6:.0f}",
            f"{last['step']:.0f}",
            f"{last['seconds']:.0f}",
            path,
        )
        table.add_row(run.name, *numbers)
    console = Console(width=140)
    console.print(table)
    image_cost = counted.get_total_flops() / 8
    console.print(
        f"not in the latent run: training its autoencoder ({image_cost / 1e9:.2f} GFLOP an image, "
        "paid once) and encoding the data "
        f"({image_cost / 6 * len(images) / 1e15:.3f} PFLOP, once)"
    )
    picture(runs, floor, settings.out / "latent_vs_pixels.png")
    sides = {
        r.name: {
            "flops": r.flops,
            "activation_bytes": r.activations,
            "state_bytes": r.state,
            "curve": r.curve,
        }
        for r in runs
    }
    facts = {k: str(v) for k, v in vars(replace(settings)).items()}
    write_json(
        settings.out / "latent_vs_pixels.json",
        {"settings": facts, "floor": floor, "runs": sides, "torch": torch.__version__},
    )
    console.print(settings.out / "latent_vs_pixels.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
