"""A small residual classifier of Fashion-MNIST: 128 features and 10 logits of an image.

    prepare: [0, 1] images, RGB averaged to grey, resized to 28x28 (bilinear, antialiased),
    (x - 0.286) / 0.353
    network: 3x3 conv -> { 3x3 conv, stride 2 -> relu(x + conv(relu(conv(x)))) } a width -> 1x1 conv
    -> mean over pixels -> linear

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

CLASS_NAMES = tuple(
    "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
)

MakeConv = Callable[[int, int, int, int], nn.Module]
"""(channels in, channels out, kernel, stride) -> a convolution with padding kernel // 2."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The fields of `config.json` beside the weights.

    Attributes:
        name: Of the classifier.
        class_names: Of class 0, 1, ...
        size: Side of the prepared image in pixels.
        widths: Channels at 28, 14, 7 and 4 pixels.
        dim: Features after the mean over pixels.
        mean: Of the grey training pixels, in [0, 1].
        std: Of the grey training pixels.
        test_accuracy: On the whole test set with the saved weights, in [0, 1]; None before
            training.
        class_accuracy: That of each class.
        training: The settings of the training.
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
        """Add the two convolutions to x."""
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
    """Write `config.json` and `model.safetensors` (float16) atomically.

    Args:
        folder: The folder to write.
        network: With plain convolutions, into which the normalisation has been folded.
        config: Of the network.
    """
    halves = {k: v.half() for k, v in network.state_dict().items()}
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", asdict(config))
        write_tensors(temporary / "model.safetensors", halves)


def load(folder: str | Path) -> tuple[FashionClassifier, str]:
    """Load the network in evaluation mode, and the hash of its weights and preprocessing.

    Raises:
        UserError: For a file that is missing or broken, and weights that do not fit the config.
    """
    file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    values = read_json(file)
    if not isinstance(values, dict) or not {"class_names", "widths", "dim"} <= set(values):
        raise UserError(
            f"{file} is not a classifier's: expected class_names, widths and dim; "
            "point at a folder made by `save`"
        )
    lists = ("class_names", "widths", "class_accuracy")
    names = ClassifierConfig.__dataclass_fields__
    fields: dict[str, Any] = {k: v for k, v in values.items() if k in names}
    fields |= {k: tuple(fields[k]) for k in lists if k in fields}
    config = ClassifierConfig(**fields)
    network, tensors = FashionClassifier(config), read_tensors(weights)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{weights} does not fit its config.json ({problem}): "
            "take both files from one training run"
        ) from error
    shape = {k: getattr(config, k) for k in ("size", "widths", "dim", "mean", "std", "class_names")}
    return network.eval().requires_grad_(False), hash_json([hash_tensors(tensors), shape])


@torch.no_grad()
def accuracy(
    network: nn.Module, images: Float[Tensor, "N C H W"], labels: Tensor, classes: int
) -> tuple[float, tuple[float, ...]]:
    """Share of right classes over all images and for each class, in [0, 1].

    Args:
        network: Images -> logits.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) integers.
        classes: Number of classes.
    """
    guesses = torch.cat([network(batch).argmax(dim=1) for batch in images.split(500)])
    right = (guesses == labels).double()
    return float(right.mean()), tuple(float(right[labels == k].mean()) for k in range(classes))
