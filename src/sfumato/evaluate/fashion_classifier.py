"""A small residual classifier of Fashion-MNIST: the "Inception" of 28x28 grey clothes, with 128
features and 10 logits.

    prepare: [0, 1] images, RGB averaged to grey, resized to 28x28 (bilinear, antialiased), (x -
    0.286) / 0.353 network: 3x3 conv -> { 3x3 conv, stride 2 -> relu(x + conv(relu(conv(x)))) } a
    width -> 1x1 conv -> mean over pixels -> linear

It is trained with batch normalisation, which is folded into the convolutions before saving, so the
shipped network is convolutions with a bias, and features do not depend on the rest of the batch.
Residual block: He et al. 2015, arXiv:1512.03385, Eq. 1. Data: Xiao et al. 2017, arXiv:1708.07747.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.io.atomic import (
    atomic_folder,
    hash_json,
    hash_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

MakeConv = Callable[[int, int, int, int], nn.Module]
"""(channels in, channels out, kernel, stride) -> a convolution with padding kernel // 2, of
whatever kind."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What is written in `config.json` beside the weights.

    widths         channels at 28, 14, 7 and 4 pixels
    dim            features after the mean over pixels
    mean, std      of the grey training pixels, in [0, 1]
    test_accuracy  measured on the whole test set with the saved weights, in [0, 1]; None before
                   training
    """

    name: str = "fashion"
    class_names: tuple[str, ...] = CLASS_NAMES
    size: int = 28
    widths: tuple[int, ...] = (16, 32, 64, 80)
    dim: int = 128
    mean: float = 0.286
    std: float = 0.353
    test_accuracy: float | None = None
    class_accuracy: tuple[float, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


def plain_conv(inside: int, outside: int, kernel: int, stride: int) -> nn.Module:
    """A convolution with a bias: what remains when the normalisation has been folded."""
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2)


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), arXiv:1512.03385, Eq. 1."""

    def __init__(self, width: int, conv: MakeConv) -> None:
        super().__init__()
        self.conv1 = conv(width, width, 3, 1)
        self.conv2 = conv(width, width, 3, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class FashionClassifier(nn.Module):
    """Images (B, 1 or 3, H, W) in [0, 1] -> features (B, dim), and logits (B, classes).

    `conv` builds the convolutions: plain ones by default, normalised ones while training.
    """

    def __init__(self, config: ClassifierConfig, conv: MakeConv = plain_conv) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = conv(1, widths[0], 3, 1)
        self.downs = nn.ModuleList(conv(a, b, 3, 2) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(Residual(b, conv) for b in widths[1:])
        self.mix = conv(widths[-1], config.dim, 1, 1)
        self.head = nn.Linear(config.dim, len(config.class_names))

    def prepare(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 h w"]:
        """Grey, 28x28, standardised. A 28-pixel image is not resampled at all."""
        grey = images.float().mean(dim=1, keepdim=True)
        size = self.config.size
        if grey.shape[-2:] != (size, size):
            grey = F.interpolate(
                grey, (size, size), mode="bilinear", antialias=True, align_corners=False
            )
        return (grey - self.config.mean) / self.config.std

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Non-negative features, the mean over 4x4 pixels of the last feature map."""
        x = F.relu(self.stem(self.prepare(images)))
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(F.relu(down(x)))
        return F.relu(self.mix(x)).mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        return self.head(self.features(images))


def save(folder: str | Path, network: FashionClassifier, config: ClassifierConfig) -> None:
    """Writes `config.json` and `model.safetensors` (float16) atomically. `network` must be the
    folded one.
    """
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", asdict(config))
        write_tensors(
            temporary / "model.safetensors", {k: v.half() for k, v in network.state_dict().items()}
        )


def load(folder: str | Path) -> tuple[FashionClassifier, str]:
    """The network in float32, evaluation mode, and the hash of its weights and preprocessing.

    Errors: `UserError` where a file is missing or broken, or the weights are not those of the
    config.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    known = ClassifierConfig.__dataclass_fields__
    if not isinstance(values, dict) or not {"class_names", "widths", "dim"} <= set(values):
        file = folder / "config.json"
        raise UserError(
            f"{file} is not a classifier's: expected class_names, widths and dim; point at a folder made by `save`"
        )
    lists = ("class_names", "widths", "class_accuracy")
    taken: dict[str, Any] = {
        k: tuple(v) if k in lists else v for k, v in values.items() if k in known
    }
    config = ClassifierConfig(**taken)
    network = FashionClassifier(config)
    tensors = read_tensors(folder / "model.safetensors")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        file = folder / "model.safetensors"
        raise UserError(
            f"{file} does not fit its config.json ({problem}): take both files from one training run"
        ) from error
    shape = {k: getattr(config, k) for k in ("size", "widths", "dim", "mean", "std", "class_names")}
    return network.eval().requires_grad_(False), hash_json([hash_tensors(tensors), shape])


@torch.no_grad()
def accuracy(
    network: nn.Module, images: Float[Tensor, "N C H W"], labels: Tensor, classes: int
) -> tuple[float, tuple[float, ...]]:
    """Share of right answers over all images, and for each class, in [0, 1]. `images` in [0, 1],
    `labels` (N,) integers.
    """
    guesses = torch.cat([network(batch).argmax(dim=1) for batch in images.split(500)])
    right = (guesses == labels).double()
    return float(right.mean()), tuple(float(right[labels == k].mean()) for k in range(classes))
