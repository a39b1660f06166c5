"""InceptionV3 as the Frechet distance uses it: 2048 features, from a file of weights.

    images [0, 1] -> 299x299 (bilinear, not antialiased) -> 2x - 1 -> network
    -> mean over 8x8 pixels -> (B, 2048)

Szegedy et al. 2016, arXiv:1512.00567, in the variant of the TensorFlow graph of 2015-12-05 that
Heusel et al. 2017 (arXiv:1706.08500) measured with: average pools do not count padding, and the
last block pools by maximum. Layers carry the names of the public PyTorch conversion
(`Conv2d_1a_3x3.conv.weight`, `Mixed_5b.branch1x1.bn.bias`, ... , `fc`), so
`pt_inception-2015-12-05` loads without a table. No weights come with this library.

Each row of the tables is a branch; a step is `name:channels:height x width`, `/2` a stride of two
without padding, and two steps joined by `+` read the same input and are concatenated.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

DIM = 2048
CLASSES = 1008


def _a(pool: int) -> tuple[str, ...]:
    return (
        "branch1x1:64:1x1",
        "branch5x5_1:48:1x1 branch5x5_2:64:5x5",
        "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3",
        f"avg branch_pool:{pool}:1x1",
    )


def _c(mid: int) -> tuple[str, ...]:
    return (
        "branch1x1:192:1x1",
        f"branch7x7_1:{mid}:1x1 branch7x7_2:{mid}:1x7 branch7x7_3:192:7x1",
        f"branch7x7dbl_1:{mid}:1x1 branch7x7dbl_2:{mid}:7x1 branch7x7dbl_3:{mid}:1x7 "
        f"branch7x7dbl_4:{mid}:7x1 branch7x7dbl_5:192:1x7",
        "avg branch_pool:192:1x1",
    )


def _e(pool: str) -> tuple[str, ...]:
    return (
        "branch1x1:320:1x1",
        "branch3x3_1:384:1x1 branch3x3_2a:384:1x3+branch3x3_2b:384:3x1",
        "branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3 "
        "branch3x3dbl_3a:384:1x3+branch3x3dbl_3b:384:3x1",
        f"{pool} branch_pool:192:1x1",
    )


STEM = (
    "Conv2d_1a_3x3:32:3x3/2 Conv2d_2a_3x3:32:3x3/v Conv2d_2b_3x3:64:3x3 max/2 "
    "Conv2d_3b_1x1:80:1x1 Conv2d_4a_3x3:192:3x3/v max/2"
)
_6A = (
    "branch3x3:384:3x3/2",
    "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3/2",
    "max/2",
)
_7A = (
    "branch3x3_1:192:1x1 branch3x3_2:320:3x3/2",
    "branch7x7x3_1:192:1x1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3x3/2",
    "max/2",
)
BLOCKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "Mixed_5b": (192, _a(32)),
    "Mixed_5c": (256, _a(64)),
    "Mixed_5d": (288, _a(64)),
    "Mixed_6a": (288, _6A),
    "Mixed_6b": (768, _c(128)),
    "Mixed_6c": (768, _c(160)),
    "Mixed_6d": (768, _c(160)),
    "Mixed_6e": (768, _c(192)),
    "Mixed_7a": (768, _7A),
    "Mixed_7b": (1280, _e("avg")),
    "Mixed_7c": (2048, _e("max")),
}
"""name -> (channels in, branches)"""


class ConvNormRelu(nn.Module):
    """relu(norm(conv(x))); batch normalisation with eps 1e-3."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=1e-3)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D v u"]:
        """Convolve, normalise, rectify."""
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """The rows of a table, side by side, concatenated along channels."""

    def __init__(self, inside: int, rows: Sequence[str]) -> None:
        super().__init__()
        self.rows = [[step.split("+") for step in row.split()] for row in rows]
        for row in self.rows:
            channels = inside
            for step in row:
                made = [self._make(text, channels) for text in step]
                channels = sum(made) or channels

    def _make(self, text: str, inside: int) -> int:
        """Add the convolution of a step and return its channels, 0 for a pool."""
        if ":" not in text:
            return 0
        name, outside, shape = text.split(":")
        # mode: "" keeps the size, "v" no padding, "2" stride two and no padding
        size, _, mode = shape.partition("/")
        height, width = map(int, size.split("x"))
        padding = (0, 0) if mode else (height // 2, width // 2)
        stride = 2 if mode == "2" else 1
        layer = ConvNormRelu(inside, int(outside), (height, width), stride, padding)
        self.add_module(name, layer)
        return int(outside)

    def _apply_step(self, text: str, x: Tensor) -> Tensor:
        if text == "avg":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if text == "max":
            return F.max_pool2d(x, 3, 1, 1)
        if text == "max/2":
            return F.max_pool2d(x, 3, 2)
        return self.get_submodule(text.split(":")[0])(x)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D v u"]:
        """Concatenate the branches."""
        outputs = []
        for row in self.rows:
            h = x
            for step in row:
                h = torch.cat([self._apply_step(text, h) for text in step], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class InceptionV3(Branches):
    """Images (B, 3, H, W) in [0, 1] -> features (B, 2048).

    `fc` holds weights of the published file; the distance does not use it.
    """

    def __init__(self) -> None:
        super().__init__(3, [STEM])
        for name, (inside, rows) in BLOCKS.items():
            self.add_module(name, Branches(inside, rows))
        self.fc = nn.Linear(DIM, CLASSES)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2048"]:
        """Resize, apply the blocks, and average over pixels."""
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = super().forward(x)  # (B, 192, 35, 35)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))
