"""Perturbed-attention guidance, PAG (Ahn et al. 2024, arXiv:2403.17377): the same network with self-attention maps that are the identity.

softmax(Q K^T / sqrt(d)) V becomes V, in named layers: each place sees only itself, so that texture stays and structure goes. It needs no
condition, and the condition that there is stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sfumato.nn.attention import Attention, SpatialAttention, TransformerBlock
from sfumato.predict.references._copies import weakened
from sfumato.types import Conditioning


class IdentityAttention(nn.Module):
    """Self-attention in which every token attends to itself alone: (B, N, D) -> (B, N, D). It holds the layers of the one it stands for."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.to_v, self.to_out = attention.to_v, attention.to_out

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        return self.to_out[0](self.to_v(x), plus=plus)


class IdentitySpatialAttention(IdentityAttention):
    """The same over the positions of a feature map, with its norm and residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, attention: SpatialAttention):
        super().__init__(attention)
        self.group_norm = attention.group_norm

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def self_attentions(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, what takes its place) of every self-attention; attention to a condition's tokens is none."""
    for name, module in network.named_modules():
        if isinstance(module, SpatialAttention):
            yield name, IdentitySpatialAttention(module)
        elif isinstance(module, TransformerBlock) and isinstance(module.attn1, Attention):
            yield f"{name}.attn1", IdentityAttention(module.attn1)


@dataclass(frozen=True)
class PerturbedAttention:
    """layers: names of modules, as in the state dict; all self-attention in them is perturbed. The paper's choice is the middle."""

    layers: tuple[str, ...] = ()

    condition = False

    def pair(self, denoiser: Any, conditioning: Conditioning, reference: Conditioning, weaker: Any) -> tuple[Any, Conditioning]:
        """`UserError` for layers without self-attention."""
        return weakened(denoiser, self.layers, self_attentions, "layer with self-attention"), conditioning
