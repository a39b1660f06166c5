"""Perturbed-attention guidance, PAG (Ahn et al. 2024, arXiv:2403.17377): the same network with
self-attention maps that are the identity.

softmax(Q K^T / sqrt(d)) V becomes V, in named layers: each place sees only itself, so that texture
stays and structure goes. It needs no condition, and the condition that there is stays: where a
picture's tokens attend to others too (a text's, references', registers), each sees itself and
those, and they see all.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention, PictureAttention, SpatialAttention, TransformerBlock
from sfumato.nn.mmdit import NormedAttention
from sfumato.predict.references._copies import weakened
from sfumato.types import Conditioning


class IdentityAttention(nn.Module):
    """Self-attention in which every token attends to itself alone: (B, N, D) -> (B, N, D). It holds
    the layers of the one it stands for.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.to_v, self.to_out = attention.to_v, attention.to_out

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        return self.to_out[0](self.to_v(x), plus=plus)


class IdentitySpatialAttention(IdentityAttention):
    """The same over the positions of a feature map, with its norm and residual: (B, C, H, W) -> (B,
    C, H, W).
    """

    def __init__(self, attention: SpatialAttention):
        super().__init__(attention)
        self.group_norm = attention.group_norm

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def itself_and_others(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, picture: int) -> Tensor:
    """What `PictureAttention.find` finds where each of the picture's `picture` tokens sees, of
    them, itself alone, and whoever else there is all.

    In their map the block of the picture's keys is the identity before the softmax: minus infinity
    off the diagonal.
    """
    # Image by image: so many scores are wanted at once, and their bits do not depend on the batch.
    masks = [None] * len(q) if mask is None else mask[:, picture:]
    found = torch.stack(
        [_itself_and_others(*parts) for parts in zip(q[:, :picture], k, v, masks, strict=True)]
    )
    return (
        torch.cat([found, batch_invariant.attend(q[:, picture:], k, v, mask)], dim=1)
        if q.shape[1] > picture
        else found
    )


def _itself_and_others(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax([q_i k_i, q_i K_others^T] / sqrt(d)) [v_i, V_others] for each token i of a picture: q
    (N, H, d), k and v (N + L, H, d), mask (L,) -> (N, H d). In float32.
    """
    (own, others), (value, of_others) = (
        p.float().transpose(0, 1).split([len(q), len(k) - len(q)], dim=1) for p in (k, v)
    )  # (H, N or L, d)
    wide = q.float().transpose(0, 1)
    seen = wide @ others.mT  # (H, N, L)
    if mask is not None:
        seen = seen.masked_fill(~mask, float("-inf"))
    scores = torch.cat([(wide * own).sum(-1, keepdim=True), seen], dim=-1)
    weights = (scores / wide.shape[-1] ** 0.5).softmax(-1)
    found = weights[..., :1] * value + weights[..., 1:] @ of_others
    return found.transpose(0, 1).flatten(1).to(q.dtype)


def _perturbed(attention: PictureAttention) -> PictureAttention:
    """Another module of the same layers."""
    found = copy.copy(attention)
    found.__dict__["find"] = itself_and_others
    return found


def self_attentions(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, what takes its place) of every attention of a picture to itself; attention to a
    condition's tokens alone is none.
    """
    crossing = {
        f"{name}.attn1"
        for name, module in network.named_modules()
        if isinstance(module, TransformerBlock) and module.only_cross
    }
    for name, module in network.named_modules():
        if isinstance(module, SpatialAttention):
            yield name, IdentitySpatialAttention(module)
        elif isinstance(module, PictureAttention):
            yield name, _perturbed(module)
        elif isinstance(module, NormedAttention) or (
            name.rpartition(".")[2] == "attn1" and name not in crossing
        ):
            yield name, IdentityAttention(cast("Attention", module))


@dataclass(frozen=True)
class PerturbedAttention:
    """layers: names of modules, as in the state dict, a.3-5 for a.3, a.4 and a.5; all
    self-attention in them is perturbed. None: the middle, which is the paper's choice.
    """

    layers: tuple[str, ...] = ()

    condition = False

    def pair(
        self, denoiser: Any, conditioning: Conditioning, reference: Conditioning, weaker: Any
    ) -> tuple[Any, Conditioning]:
        """`UserError` for layers without self-attention."""
        return weakened(
            denoiser, self.layers, self_attentions, "layer with self-attention"
        ), conditioning
