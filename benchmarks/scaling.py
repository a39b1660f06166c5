"""A scaling law in small: the same diffusion transformer at several widths, its loss and its
Frechet distance against compute.

    python benchmarks/scaling.py --widths 64 96 128 192 --pflop 0.012 0.036 0.108 --out runs/scaling

Every width is trained once for each budget of floating-point operations, with a schedule that ends
there (a run cut short is not a run that was planned short), on the bundled model's latents.
Held-out loss: the mean of ||y - (eps - z)||^2 over 64 fixed times and noises of images that were
not trained on. The picture is log-log, as in Peebles & Xie 2022 (arXiv:2212.09748), figures 6 to 9;
a line through each budget's best points gives the exponent.
"""

import json
import math
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
from sfumato.data import open_images
from sfumato.diffuse import Process
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.schedule import schedule
from sfumato.evaluate import extract, frechet_distance, gaussian, load_features
from sfumato.io.atomic import write_json
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict import ClassNames, Denoiser, ModernDiT, ModernDiTConfig
from sfumato.sampling import Defaults
from sfumato.train import DenoiserLoss, DenoiserObjective, LoopSettings, encode_all, train
from sfumato.train.conditions.classes import Classes
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    model: str = "fashion"
    """The model whose autoencoder makes the latents."""
    data: str = "fashion-mnist"
    widths: tuple[int, ...] = (64, 96, 128, 192)
    """Heads are 32 wide."""
    depth: int = 6
    pflop: tuple[float, ...] = (0.012, 0.036, 0.108)
    """Training budgets, each for every width."""
    batch_size: int = 64
    lr: float = 1.2e-3
    """Of width 128; others' falls with the square root of the width."""
    samples: int = 2000
    sampling_steps: int = 15
    seed: int = 0
    out: Path = Path("runs/scaling")


class Bench:
    """Data, features and the held-out questions: what all runs share."""

    def __init__(self, settings: Settings):
        self.settings, self.model = settings, load(settings.model)
        autoencoder = self.model.autoencoder
        assert isinstance(autoencoder, AutoencoderKL)
        images, held_out = (
            open_images(settings.data, split="train"),
            open_images(settings.data, split="test"),
        )
        self.conditioner, self.features = ClassNames(images.class_names), load_features("fashion")
        self.latents = encode_all(images, autoencoder, settings.out / "latents")
        pixels = all_pixels(images)
        self.statistics = gaussian(extract(self.features, (pixels + 1) / 2))
        real = held_out.batch(torch.arange(settings.samples))
        self.floor = frechet_distance(
            gaussian(extract(self.features, (real["image"] + 1) / 2)), self.statistics
        )
        self.z, self.labels = self.model.compress(real["image"]), real["label"]
        self.process = Process(schedule("flow"), parameterization("flow"))

    def network(self, width: int) -> ModernDiT:
        """The network of a width, with the same first weights in every run."""
        channels, side = self.model.autoencoder.space.channels, self.latents.shape[-1]
        config = ModernDiTConfig(
            sample_size=side, in_channels=channels, patch_size=1, num_layers=self.settings.depth,
            num_attention_heads=width // 32,
            attention_head_dim=32, register_tokens=2,
            num_class_embeds=len(self.conditioner.names) + 1,
        )  # fmt: skip
        torch.manual_seed(self.settings.seed)
        return ModernDiT(config)

    def flops(self, network: nn.Module) -> float:
        """Of a training step."""
        count = self.settings.batch_size
        x, classes = self.z[:count], torch.zeros(count, len(self.conditioner.names) + 1)
        with FlopCounterMode(display=False) as counted:
            network(
                x, torch.full((count,), 500.0), Conditioning(vector=classes)
            ).square().mean().backward()
        network.zero_grad(set_to_none=True)
        return counted.get_total_flops()

    @torch.inference_mode()
    def loss(self, network: nn.Module) -> float:
        """The held-out loss."""
        generator, total, denoiser = (
            torch.Generator().manual_seed(1),
            0.0,
            Denoiser(network, self.process),
        )
        for k in range(64):
            rows = slice(k * 31, k * 31 + 31)
            z, eps = self.z[rows], torch.randn(self.z[rows].shape, generator=generator)
            t = (k + 0.5) / 64
            y = denoiser.output(
                self.process.add_noise(z, eps, t),
                t,
                self.conditioner.from_labels(self.labels[rows]),
            )
            total += float((y - (eps - z)).square().mean()) / 64
        return total

    def distance(self, network: nn.Module, path: Path) -> float:
        """The Frechet distance of class-balanced samples without guidance; some of them as a
        picture.
        """
        from sfumato.images import grid, to_pil

        s, names = self.settings, self.conditioner.names
        defaults = Defaults(steps=s.sampling_steps, sampler="ddim")
        model = LatentDiffusion(
            self.model.autoencoder, Denoiser(network, self.process), self.conditioner, defaults
        )
        result: list[Tensor] = []
        for start in range(0, s.samples, 200):
            prompts = [names[(start + k) % len(names)] for k in range(200)]
            result.append(model.generate(prompts, seed=start, output="tensor")[:, :1])
        images = torch.cat(result)[: s.samples]
        grid(to_pil(images[:80] * 2 - 1), columns=10).save(path)
        return frechet_distance(gaussian(extract(self.features, images)), self.statistics)

    def run(self, width: int, pflop: float) -> dict[str, Any]:
        """Trains one network for one budget, or reads what an earlier call measured."""
        s = self.settings
        folder = s.out / f"{width}-{pflop:g}"
        if (folder / "found.json").exists():
            return json.loads((folder / "found.json").read_text())
        network = self.network(width)
        flops, parameters = self.flops(network), sum(p.numel() for p in network.parameters())
        steps = max(20, round(pflop * 1e15 / flops))
        loop = LoopSettings(
            steps=steps, batch_size=s.batch_size, lr=s.lr * math.sqrt(128 / width),
            warmup=min(100, steps // 8), decay="cosine",
            final_lr=0.02, betas=(0.9, 0.99), weight_decay=0.01, ema=1 - 10 / steps,
            precision="bf16", seed=s.seed, save_every=10**9,
            show_every=10**9, log_every=max(1, steps // 20),
        )  # fmt: skip
        objective = DenoiserObjective(
            network,
            self.process,
            self.latents,
            self.model.autoencoder.space,
            Classes(self.conditioner),
            DenoiserLoss(drop=0.0),
        )
        began = perf_counter()
        trained = train(objective, loop, folder)
        seconds = perf_counter() - began
        result = {
            "width": width,
            "parameters": parameters,
            "pflop": steps * flops / 1e15,
            "steps": steps,
            "seconds": seconds,
        }
        result |= {
            "loss": self.loss(trained),
            "frechet": self.distance(trained, folder / "samples.png"),
        }
        write_json(folder / "found.json", result)
        return result


def exponent(points: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """(a, b) of value = a C^-b through the best point of each budget, by least squares of
    logarithms.
    """
    x, y = (
        torch.tensor([math.log(p[name]) for p in points], dtype=torch.float64)
        for name in ("pflop", key)
    )
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float((y.mean() - slope * x.mean()).exp()), -float(slope)


def picture(
    result: list[dict[str, Any]], best: dict[str, list[dict[str, Any]]], floor: float, path: Path
) -> None:
    """Loss and FD against compute, a line a width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for i, (key, label) in enumerate((("loss", "held-out loss"), ("frechet", "Frechet distance"))):
        axes = figure.add_subplot(1, 2, i + 1)
        for width in dict.fromkeys(p["width"] for p in result):
            mine = [p for p in result if p["width"] == width]
            label_of = f"width {width}, {mine[0]['parameters'] / 1e6:.1f} M"
            axes.plot(
                [p["pflop"] for p in mine], [p[key] for p in mine], marker="o", label=label_of
            )
        a, b = exponent(best[key], key)
        ends = [min(p["pflop"] for p in result), max(p["pflop"] for p in result)]
        axes.plot(
            ends,
            [a * c**-b for c in ends],
            color="black",
            linestyle="--",
            linewidth=1,
            label=f"best: C^-{b:.2f}",
        )
        if key == "frechet":
            axes.axhline(floor, linestyle=":", color="grey", label="floor: real images")
        axes.set(xlabel="training compute, PFLOP", ylabel=label, xscale="log", yscale="log")
        budgets = sorted({float(f"{p['pflop']:.2g}") for p in result})
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        if key == "loss":
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(settings: Settings) -> None:
    """Trains all, prints the table, writes scaling.json and scaling.png; what was measured before
    is not measured again.
    """
    bench = Bench(settings)
    result = [bench.run(width, pflop) for width in settings.widths for pflop in settings.pflop]
    budgets = [
        [result[k * len(settings.pflop) + i] for k in range(len(settings.widths))]
        for i in range(len(settings.pflop))
    ]
    best = {
        key: [min(column, key=lambda p, k=key: p[k]) for column in budgets]
        for key in ("loss", "frechet")
    }
    table = Table(
        title=f"Diffusion transformers of {settings.depth} layers, batch {settings.batch_size}; "
        f"floor {bench.floor:.3f}"
    )
    for column in (
        "width",
        "million",
        "PFLOP",
        "steps",
        "seconds",
        "held-out loss",
        "Frechet distance",
    ):
        table.add_column(column, justify="right")
    for p in result:
        numbers = (
            f"{p['parameters'] / 1e6:.2f}",
            f"{p['pflop']:.3f}",
            str(p["steps"]),
            f"{p['seconds']:.0f}",
        )
        table.add_row(str(p["width"]), *numbers, f"{p['loss']:.4f}", f"{p['frechet']:.3f}")
    console = Console(width=120)
    console.print(table)
    for key, points in best.items():
        a, b = exponent(points, key)
        console.print(
            f"{key}: {a:.4g} * PFLOP^-{b:.3f} through the best width of each budget "
            f"({', '.join(str(p['width']) for p in points)})"
        )
    picture(result, best, bench.floor, settings.out / "scaling.png")
    facts = {k: str(v) for k, v in vars(replace(settings)).items()}
    write_json(
        settings.out / "scaling.json",
        {"settings": facts, "floor": bench.floor, "runs": result, "torch": torch.__version__},
    )
    console.print(settings.out / "scaling.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
