"""Skip-layer guidance: the same network without some of its residual branches.

It is autoguidance (Karras et al. 2024, arXiv:2406.02507) by a network that costs nothing to train,
as perturbed attention is. Spatio-temporal skip guidance (Hyung et al. 2024, arXiv:2411.18664) names
layers in the same way. Stability AI recommends it for Stable Diffusion 3.5 medium, without blocks
7, 8 and 9 (`layers=transformer_blocks.7-9`), beside the usual guidance, at the times of the steps
between 1% and 20% of the run. Its scale of 2.8 is a `second` of 3.8 here (1 is off). Of 28 steps
these are 1 to 5, t = 0.963 to 0.815: `7 dual:kind=away,second=3.8,low=0.8,high=0.98 condition
skip_layers:layers=transformer_blocks.7-9`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.nn.attention import (
    Attention,
    Branch,
    ImageTokenAttention,
    SpatialAttention,
    SpatialTransformer,
    TransformerBlock,
)
from sfumato.nn.blocks import ResnetBlock
from sfumato.nn.mmdit import JointAttention
from sfumato.predict.guidance_models._layer_replacement import ReplacedLayers


@runtime_checkable
class StreamBlock(Protocol):
    """A transformer's block, which takes and returns one stream of tokens or two."""

    streams: int


class Identity(nn.Module):
    """Replacement of a layer with its own residual: the input.

    Args:
        shortcut: The layer's convolution of the residual, where it changes the width.
    """

    def __init__(self, shortcut: nn.Module | None = None):
        super().__init__()
        self.conv_shortcut = shortcut

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Return x, through the shortcut if there is one."""
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class ZeroBranch(nn.Module):
    """Replacement of a branch that is added to a residual stream: zeros."""

    def forward(self, x: Tensor, *rest: Any, plus: Tensor | None = None) -> Tensor:
        """Return `plus`, or zeros without it."""
        return torch.zeros_like(x) if plus is None else plus


class IdentityStreams(nn.Module):
    """Replacement of a block of two streams: both inputs."""

    def forward(self, x: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Return both streams."""
        return x, text


class ZeroStreams(nn.Module):
    """Replacement of the joint attention of two streams: zeros."""

    def forward(self, x: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Return zeros for both streams."""
        return torch.zeros_like(x), torch.zeros_like(text)


def branches(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, replacement) of every layer that can be left out."""
    for name, module in network.named_modules():
        if isinstance(module, SpatialAttention | SpatialTransformer | TransformerBlock):
            yield name, Identity()
        elif isinstance(module, StreamBlock):
            yield name, IdentityStreams() if module.streams == 2 else Identity()
        elif isinstance(module, ResnetBlock) and module.resample is None:  # resizing has to stay
            yield name, Identity(module.conv_shortcut)
        elif isinstance(module, JointAttention):
            yield name, ZeroStreams()
        elif isinstance(module, Attention | ImageTokenAttention | Branch):
            yield name, ZeroBranch()


@dataclass(frozen=True)
class SkipLayers(ReplacedLayers):
    """The denoiser without some layers.

    Args:
        layers: Names of modules, as in the state dict, a.3-5 for a.3, a.4 and a.5: residual blocks,
            transformer blocks, their parts, or all of them in a block. None: a transformer's block
            in the middle, a U-Net's attention there.
    """

    find = staticmethod(branches)
    kind = "layer that can be left out"
