"""Train the classifier of Fashion-MNIST whose features the evaluation uses.

It takes about 5 minutes on two cores.

    python examples/fashion_classifier.py --out my-classifier

Random shifts of up to two pixels and flips, label smoothing, AdamW, one cycle of the learning rate
(Smith and Topin 2017, arXiv:1708.07120), batch normalisation folded into the convolutions at the
end: scale = gamma / sqrt(var + eps), w' = w * scale, b' = beta - mean * scale.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import sfumato
from sfumato.data import open_images
from sfumato.evaluate.fashion_classifier import (
    ClassifierConfig,
    FashionClassifier,
    accuracy,
    load,
    save,
)


@dataclass(frozen=True)
class Training:
    """Settings of the run. `lr` is the peak of the cycle, `shift` in pixels."""

    epochs: int = 11
    batch_size: int = 256
    lr: float = 5e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    shift: int = 2
    seed: int = 0
    bfloat16: bool = True


class NormalisedConv(nn.Sequential):
    """A convolution and its batch normalisation, to be folded into one."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outside),
        )


def fold(network: FashionClassifier) -> FashionClassifier:
    """The same function in evaluation mode, with plain convolutions."""
    network = network.float().eval()
    state: dict[str, Tensor] = {f"head.{k}": v for k, v in network.head.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, NormalisedConv):
            fused = fuse_conv_bn_eval(module[0], module[1])  # pyright: ignore[reportArgumentType]
            state |= {f"{name}.{k}": v for k, v in fused.state_dict().items()}
    folded = FashionClassifier(network.config)
    folded.load_state_dict(state)
    return folded.eval()


def read(split: str) -> tuple[Tensor, Tensor]:
    """The whole split: grey images (N, 1, 28, 28) in [0, 1], labels (N,)."""
    data = open_images("fashion-mnist", split=split)
    batch = data.batch(range(len(data)))
    return ((batch["image"] + 1) / 2).mean(dim=1, keepdim=True), batch["label"]


def augment(images: Tensor, shift: int, draw: torch.Generator) -> Tensor:
    """Shift every image (B, 1, H, W) by -shift..shift pixels, and flip it with probability 1/2.

    Each image has its own shift; black comes in at the border.
    """
    count, _, height, width = images.shape
    offset = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=draw)
    columns = torch.arange(width).expand(count, width)
    columns = (
        torch.where(torch.rand(count, 1, generator=draw) < 0.5, columns, width - 1 - columns)
        + offset[0]
    )
    rows = torch.arange(height).expand(count, height) + offset[1]
    padded = F.pad(images, (shift,) * 4)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][
        :, None
    ]


def train(
    images: Tensor, labels: Tensor, settings: Training, console: Console
) -> FashionClassifier:
    """Trains from random weights and returns the folded network."""
    torch.manual_seed(settings.seed)
    draw = torch.Generator().manual_seed(settings.seed)
    network = FashionClassifier(ClassifierConfig(), NormalisedConv).to(
        memory_format=torch.channels_last
    )  # pyright: ignore[reportCallIssue]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    per_epoch = len(images) // settings.batch_size
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=per_epoch * settings.epochs, pct_start=0.2
    )
    columns = (
        TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]:.3f}"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    mean_loss = 0.0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=per_epoch * settings.epochs, epoch=0, loss=0.0)
        for epoch in range(settings.epochs):
            start = time.perf_counter()
            for rows in torch.randperm(len(images), generator=draw).split(settings.batch_size)[
                :per_epoch
            ]:
                batch = augment(images[rows], settings.shift, draw)
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                    logits = network(batch)
                loss = F.cross_entropy(
                    logits.float(), labels[rows], label_smoothing=settings.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                cycle.step()
                mean_loss += 0.02 * (loss.item() - mean_loss)
                progress.update(bar, advance=1, epoch=epoch + 1, loss=mean_loss)
            if not console.is_terminal:  # a log file shows no bar
                console.print(
                    f"epoch {epoch + 1}/{settings.epochs}  loss {mean_loss:.4f}  "
                    f"{time.perf_counter() - start:.1f} s"
                )
    return fold(network)


def main() -> None:
    """Train the classifier, save it, and print its accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bundled = Path(sfumato.__path__[0]) / "bundled" / "fashion" / "classifier"
    parser.add_argument(
        "--out",
        type=Path,
        default=bundled,
        help="folder that receives config.json and model.safetensors",
    )
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--seed", type=int, default=Training.seed)
    arguments = parser.parse_args()
    settings = Training(epochs=arguments.epochs, seed=arguments.seed)
    console = Console()

    images, labels = read("train")
    test_images, test_labels = read("test")
    start = time.perf_counter()
    network = train(images, labels, settings, console)
    seconds = time.perf_counter() - start

    config = ClassifierConfig()
    save(arguments.out, network, config)  # the accuracy is that of the float16 weights, read back
    saved, _ = load(arguments.out)
    total, by_class = accuracy(saved, test_images, test_labels, len(config.class_names))
    facts = {
        **asdict(settings),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    save(
        arguments.out,
        network,
        replace(config, test_accuracy=total, class_accuracy=by_class, training=facts),
    )

    table = Table("class", "test accuracy %")
    for name, share in zip(config.class_names, by_class, strict=True):
        table.add_row(name, f"{100 * share:.1f}")
    console.print(table)
    console.print(
        f"{100 * total:.2f} % of {len(test_labels)} test images, trained in {seconds:.0f} s, saved "
        f"in {arguments.out}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
