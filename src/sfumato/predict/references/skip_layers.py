"""Skip-layer guidance: the same network with some of its layers left out (the residual branches;
what they are added to goes on).

It is autoguidance (Karras et al. 2024, arXiv:2406.02507) by a network that costs nothing to train,
as perturbed attention is; spatio-temporal skip guidance (Hyung et al. 2024, arXiv:2411.18664) names
layers in the same way. Stability AI recommends it for Stable Diffusion 3.5 medium, without blocks
7, 8 and 9 (`layers=transformer_blocks.7-9`), beside the usual guidance, at the times of the steps
between 1% and 20% of the run; its scale of 2.8 is a `second` of 3.8 here (1 is off). Of 28 steps
these are 1 to 5, t = 0.963 to 0.815: `7 dual:kind=away,second=3.8,low=0.8,high=0.98 condition
skip_layers:layers=transformer_blocks.7-9`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.nn.attention import (
    Attention,
    FeedForward,
    PictureAttention,
    SpatialAttention,
    SpatialTransformer,
    TransformerBlock,
)
from sfumato.nn.blocks import ResnetBlock
from sfumato.nn.mmdit import JointAttention
from sfumato.predict.references._copies import weakened
from sfumato.types import Conditioning


class PassedOn(nn.Module):
    """In place of a layer with its own residual: the input, through the shortcut where the layer
    changes the width.
    """

    def __init__(self, shortcut: nn.Module | None = None):
        super().__init__()
        self.conv_shortcut = shortcut

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class AddedNothing(nn.Module):
    """In place of a branch that is added to something: `plus` as it is, or zeros."""

    def forward(self, x: Tensor, *rest: Any, plus: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x) if plus is None else plus


class BothPassedOn(nn.Module):
    """In place of a block of two streams: both as they are."""

    def forward(self, x: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return x, text


class AddedNothingToBoth(nn.Module):
    """In place of the attention of two streams, which is added to them: zeros."""

    def forward(self, x: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(text)


def branches(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, what takes its place) of every layer that can be left out."""
    for name, module in network.named_modules():
        if isinstance(module, SpatialAttention | SpatialTransformer | TransformerBlock):
            yield name, PassedOn()
        elif hasattr(module, "streams"):  # a transformer's block
            yield name, BothPassedOn() if module.streams == 2 else PassedOn()
        elif isinstance(module, ResnetBlock) and module.resample is None:
            # what changes the size of the map has to stay
            yield name, PassedOn(module.conv_shortcut)
        elif isinstance(module, JointAttention):
            yield name, AddedNothingToBoth()
        elif isinstance(module, Attention | PictureAttention | FeedForward) or name.rpartition(".")[
            2
        ] in ("ff", "ff_context"):
            yield name, AddedNothing()


@dataclass(frozen=True)
class SkipLayers:
    """layers: names of modules, as in the state dict, a.3-5 for a.3, a.4 and a.5: residual blocks,
    transformer blocks, their parts, or all that a block has of them. None: a transformer's block in
    the middle, a U-Net's attention there.
    """

    layers: tuple[str, ...] = ()

    condition = False

    def pair(
        self, denoiser: Any, conditioning: Conditioning, reference: Conditioning, weaker: Any
    ) -> tuple[Any, Conditioning]:
        """`UserError` for layers that cannot be left out."""
        return weakened(denoiser, self.layers, branches, "layer that can be left out"), conditioning
