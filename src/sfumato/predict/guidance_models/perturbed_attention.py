"""Perturbed-attention guidance, PAG: self-attention maps are the identity.

(Ahn et al. 2024, arXiv:2403.17377.) softmax(Q K^T / sqrt(d)) V becomes V, in named layers: each
position attends to itself alone, so that texture stays and structure goes. It needs no condition,
and a condition that there is stays: where image tokens attend to other tokens too (text, reference
images, registers), each attends to itself and to those, and those attend to all.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention, ImageTokenAttention, SpatialAttention, TransformerBlock
from sfumato.nn.mmdit import NormedAttention
from sfumato.predict.guidance_models._layer_replacement import ReplacedLayers


class IdentityAttention(nn.Module):
    """Self-attention in which every token attends to itself alone: (B, N, D) -> (B, N, D).

    Args:
        attention: Attention to replace, whose layers it uses.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.to_v, self.to_out = attention.to_v, attention.to_out

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Return the values, projected, plus `plus`."""
        return self.to_out[0](self.to_v(x), plus=plus)


class IdentitySpatialAttention(IdentityAttention):
    """The same over a feature map, with its norm and residual: (B, C, H, W) -> (B, C, H, W).

    Args:
        attention: Attention to replace, whose layers it uses.
    """

    def __init__(self, attention: SpatialAttention):
        super().__init__(attention)
        self.group_norm = attention.group_norm

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return x plus the projected values of its normed positions."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def attend_to_itself_and_others(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_image_tokens: int
) -> Tensor:
    """Attend from each image token to itself and to all tokens that are not the image's.

    In the attention map the block of the image is the identity before the softmax: minus infinity
    off the diagonal. It replaces `ImageTokenAttention.attend_heads`.

    Args:
        q: (B, N, H, d), the image's tokens first.
        k: (B, M, H, d).
        v: (B, M, H, d).
        mask: (B, M), True where a key counts; None: everywhere.
        num_image_tokens: Number of the image's tokens.

    Returns:
        (B, N, H d).
    """
    # Image by image: the scores are many, and their bits do not depend on the batch.
    masks = [None] * len(q) if mask is None else mask[:, num_image_tokens:]
    images = zip(q[:, :num_image_tokens], k, v, masks, strict=True)
    image = torch.stack([_attend_one_image(*parts) for parts in images])
    if q.shape[1] == num_image_tokens:
        return image
    return torch.cat([image, batch_invariant.attend(q[:, num_image_tokens:], k, v, mask)], dim=1)


def _attend_one_image(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from each token i of one image: softmax([q_i k_i, q_i K^T] / sqrt(d)) [v_i, V].

    K and V are those of all tokens that are not the image's.
    q (N, H, d), k and v (N + L, H, d), mask (L,) -> (N, H d); computed in float32.
    """
    # Each is (H, N or L, d).
    (own_k, other_k), (own_v, other_v) = (
        p.float().transpose(0, 1).split([len(q), len(k) - len(q)], dim=1) for p in (k, v)
    )
    queries = q.float().transpose(0, 1)
    other_scores = queries @ other_k.mT  # (H, N, L)
    if mask is not None:
        other_scores = other_scores.masked_fill(~mask, float("-inf"))
    scores = torch.cat([(queries * own_k).sum(-1, keepdim=True), other_scores], dim=-1)
    weights = (scores / queries.shape[-1] ** 0.5).softmax(-1)
    out = weights[..., :1] * own_v + weights[..., 1:] @ other_v
    return out.transpose(0, 1).flatten(1).to(q.dtype)


def _perturbed(attention: ImageTokenAttention) -> ImageTokenAttention:
    """Return another module with the same layers and a perturbed map."""
    perturbed = copy.copy(attention)
    perturbed.__dict__["attend_heads"] = attend_to_itself_and_others
    return perturbed


def self_attentions(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, replacement) of every self-attention of the image.

    Attention to a condition's tokens alone is none.
    """
    crossing = {
        f"{name}.attn1"
        for name, module in network.named_modules()
        if isinstance(module, TransformerBlock) and module.only_cross
    }
    for name, module in network.named_modules():
        if isinstance(module, SpatialAttention):
            yield name, IdentitySpatialAttention(module)
        elif isinstance(module, ImageTokenAttention):
            yield name, _perturbed(module)
        elif isinstance(module, NormedAttention) or (
            name.rpartition(".")[2] == "attn1" and name not in crossing
        ):
            yield name, IdentityAttention(cast("Attention", module))


@dataclass(frozen=True)
class PerturbedAttention(ReplacedLayers):
    """The denoiser with perturbed self-attention.

    Args:
        layers: Names of modules, as in the state dict, a.3-5 for a.3, a.4 and a.5; all
            self-attention in them is perturbed. None: the middle, which is the paper's choice.
    """

    find = staticmethod(self_attentions)
    kind = "layer with self-attention"
