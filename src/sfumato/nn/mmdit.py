"""MMDiT: image and text tokens with separate weights and joint attention.

    a, b = softmax([Qx, Qc] [Kx, Kc]^T / sqrt(d)) [Vx, Vc]
    x <- x + gate * out(a)
    x <- x + gate * ff(x)                                      and likewise c with b

Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2b. Inputs are modulated by the embedding
of time and condition. Some models normalise queries and keys (RMS norm) or rotate them (RoPE).
Blocks of MMDiT-X (Stable Diffusion 3.5 medium, Stability AI 2024) have a second attention among
image tokens. Parameter names are diffusers'.
"""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.kernels import batch_invariant
from sfumato.nn import rope
from sfumato.nn.attention import Attention, FeedForward, ImageTokenAttention
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated


def with_image_tokens(mask: Bool[Tensor, "B L"] | None, count: int) -> Bool[Tensor, "B S"] | None:
    """Prepend `count` True entries, for image tokens, to a mask of text tokens."""
    return None if mask is None else torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def _norm(width: int, normed: bool, eps: float) -> nn.Module:
    return RMSNorm(width, eps) if normed else nn.Identity()


class NormedAttention(Attention):
    """Self-attention with optional RMS norm of queries and keys: (B, N, D) -> (B, N, D).

    Args:
        width: D.
        heads: Number of heads.
        normed: Apply RMS norm with a weight to each head's queries and keys.
        bias: Whether all projections have a bias.
        eps: Epsilon of the norms.
    """

    def __init__(
        self, width: int, heads: int, normed: bool = True, bias: bool = True, eps: float = 1e-6
    ):
        super().__init__(width, heads, width // heads, qkv_bias=bias, bias=bias)
        self.norm_q, self.norm_k = (_norm(width // heads, normed, eps) for _ in range(2))

    def cut(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N H d"]:
        """Split into heads."""
        return x.unflatten(-1, (self.heads, -1))

    def heads_of(
        self, x: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B N H d"], Float[Tensor, "B N H d"], Float[Tensor, "B N H d"]]:
        """Return the queries, keys and values of x."""
        q, k, v = (self.cut(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B N D"]:
        """Attend among all tokens."""
        return self.to_out[0](batch_invariant.attend(*self.heads_of(x)))


class JointAttention(NormedAttention, ImageTokenAttention):
    """Joint attention of image tokens x (B, N, D) and text tokens (B, L, D).

    `forward` returns (B, N, D) and (B, L, D). Its `mask` (B, N + L) is True for keys to attend to,
    image tokens first. `rotations` (N + L, d, 2) are the angles of RoPE. The first
    `num_image_tokens` of the N tokens (default: all) are of the image, others of reference images.

    In the last block (`last`) the text's output is unused: None is returned for it. Checkpoints
    still hold its query projection.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        normed: bool = True,
        bias: bool = True,
        eps: float = 1e-6,
        last: bool = False,
    ):
        super().__init__(width, heads, normed, bias, eps)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            batch_invariant.Linear(width, width, bias=bias) for _ in range(3)
        )
        self.norm_added_q, self.norm_added_k = (
            _norm(width // heads, normed, eps) for _ in range(2)
        )
        self.to_add_out = None if last else batch_invariant.Linear(width, width, bias=bias)
        # Unused parameters have no gradient, for which distributed training would wait.
        if last:
            for idle in (self.add_q_proj, self.norm_added_q):
                idle.requires_grad_(False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "B N D"],
        text: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "B S"] | None = None,
        rotations: Float[Tensor, "S d 2"] | None = None,
        num_image_tokens: int | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"] | None]:
        """Attend among all tokens of both streams."""
        count = x.shape[1]
        q, k, v = self.heads_of(x)
        if self.to_add_out is not None:
            # (B, N + L, H, d)
            q = torch.cat([q, self.norm_added_q(self.cut(self.add_q_proj(text)))], dim=1)
        k = torch.cat([k, self.norm_added_k(self.cut(self.add_k_proj(text)))], dim=1)
        v = torch.cat([v, self.cut(self.add_v_proj(text))], dim=1)
        if rotations is not None:
            q, k = rope.rotate(q, rotations[: q.shape[1]]), rope.rotate(k, rotations)
        y = self.attend_heads(
            q, k, v, mask, count if num_image_tokens is None else num_image_tokens
        )
        of_text = None if self.to_add_out is None else self.to_add_out(y[:, count:])
        return self.to_out[0](y[:, :count]), of_text


class JointBlock(nn.Module):
    """Joint attention and a feed-forward layer for each stream.

    x (B, N, D), text (B, L, D), embedding (B, D) -> x, text.

    Args:
        width: D.
        heads: Number of heads.
        normed: RMS norm of queries and keys.
        dual: A second attention among image tokens.
        last: The text is returned unchanged.
    """

    streams = 2  # token streams that the block takes and returns

    def __init__(
        self, width: int, heads: int, normed: bool = False, dual: bool = False, last: bool = False
    ):
        super().__init__()
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, normed, last=last)
        self.attn2 = NormedAttention(width, heads, normed) if dual else None
        self.ff = FeedForward(width, "gelu")
        self.ff_context = None if last else FeedForward(width, "gelu")

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        text: Float[Tensor, "B L D"],
        embedding: Float[Tensor, "B D"],
        mask: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        """Both streams after the block."""
        # (B, 1, D) each
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(embedding)
        if self.ff_context is None:
            text_scale, text_shift, *rest = self.norm1_context(embedding)
        else:
            text_shift, text_scale, *rest = self.norm1_context(embedding)

        # attention
        of_image, of_text = self.attn(
            modulated(x, scale, shift), modulated(text, text_scale, text_shift), mask
        )
        y = gated(x, gate, of_image)
        if self.attn2 is not None:
            shift, scale, gate = second
            y = gated(y, gate, self.attn2(modulated(x, scale, shift)))

        # feed-forward
        y = gated(y, ff_gate, self.ff(modulated(y, ff_scale, ff_shift)))
        if self.ff_context is None:
            return y, text
        gate, ff_shift, ff_scale, ff_gate = rest
        text = gated(text, gate, cast("Tensor", of_text))
        return y, gated(text, ff_gate, self.ff_context(modulated(text, ff_scale, ff_shift)))
