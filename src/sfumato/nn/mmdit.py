"""Two streams of tokens, a picture's and a text's, each with its own weights, that attend to each
other (MMDiT; Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2b).

    a, b = softmax([Qx, Qc] [Kx, Kc]^T / sqrt(d)) [Vx, Vc]     each head's queries and keys
    RMS-normed, or turned, before, where the model is x <- x + gate * out(a), x <- x + gate * ff(x),
    and so for c with b; every input normed and steered by time and condition

Blocks of MMDiT-X (Stable Diffusion 3.5 medium, Stability AI 2024) have a second attention, of the
picture to itself, beside the first. Parameter names are diffusers'.
"""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.kernels import batch_invariant
from sfumato.nn import rope
from sfumato.nn.attention import Attention, FeedForward, PictureAttention
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated


def with_picture(mask: Bool[Tensor, "B L"] | None, count: int) -> Bool[Tensor, "B S"] | None:
    """A mask of a text's tokens with `count` others before them, which all count."""
    return None if mask is None else torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def _norm(width: int, normed: bool, eps: float) -> nn.Module:
    return RMSNorm(width, eps) if normed else nn.Identity()


class NormedAttention(Attention):
    """Self-attention: (B, N, D) -> (B, N, D). `normed`: each head's queries and keys are
    RMS-normed, with a weight. bias: of all its maps.
    """

    def __init__(
        self, width: int, heads: int, normed: bool = True, bias: bool = True, eps: float = 1e-6
    ):
        super().__init__(width, heads, width // heads, qkv_bias=bias, bias=bias)
        self.norm_q, self.norm_k = (_norm(width // heads, normed, eps) for _ in range(2))

    def cut(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N H d"]:
        """Into heads."""
        return x.unflatten(-1, (self.heads, -1))

    def heads_of(
        self, x: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B N H d"], Float[Tensor, "B N H d"], Float[Tensor, "B N H d"]]:
        """Queries, keys and values of x."""
        return (
            self.norm_q(self.cut(self.to_q(x))),
            self.norm_k(self.cut(self.to_k(x))),
            self.cut(self.to_v(x)),
        )

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.to_out[0](batch_invariant.attend(*self.heads_of(x)))


class JointAttention(NormedAttention, PictureAttention):
    """The picture's tokens x (B, N, D) and the text's (B, L, D) attend to both: what they find, (B,
    N, D) and (B, L, D).

    mask (B, N + L): True where a key counts, the picture's first; turn (N + L, d, 2): where tokens
    are (nn/rope.py). picture: how many of the N are of the picture itself (None: all), if others
    are of references. last: nobody reads the text after, and None stands for what it would find;
    files hold its queries all the same.
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
        # what nobody reads gets no gradient, for which processes that train together would wait
        if last:
            for idle in (self.add_q_proj, self.norm_added_q):
                idle.requires_grad_(False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "B N D"],
        text: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "B S"] | None = None,
        turn: Float[Tensor, "S d 2"] | None = None,
        picture: int | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"] | None]:
        count = x.shape[1]
        q, k, v = self.heads_of(x)
        if self.to_add_out is not None:
            # (B, N + L, H, d)
            q = torch.cat([q, self.norm_added_q(self.cut(self.add_q_proj(text)))], dim=1)
        k = torch.cat([k, self.norm_added_k(self.cut(self.add_k_proj(text)))], dim=1)
        v = torch.cat([v, self.cut(self.add_v_proj(text))], dim=1)
        if turn is not None:
            q, k = rope.rotate(q, turn[: q.shape[1]]), rope.rotate(k, turn)
        y = self.find(q, k, v, mask, count if picture is None else picture)
        return self.to_out[0](y[:, :count]), None if self.to_add_out is None else self.to_add_out(
            y[:, count:]
        )


class JointBlock(nn.Module):
    """Attention of both streams and a feed-forward layer for each: x (B, N, D), text (B, L, D),
    embedding (B, D) -> x, text.

    dual: with a second attention, of the picture to itself. last: the text is only read, and comes
    back as it is.
    """

    streams = 2  # it takes and gives two streams of tokens

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
        # (B, 1, D) each
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(embedding)
        if self.ff_context is None:
            text_scale, text_shift, *rest = self.norm1_context(embedding)
        else:
            text_shift, text_scale, *rest = self.norm1_context(embedding)

        # attention
        found, of_text = self.attn(
            modulated(x, scale, shift), modulated(text, text_scale, text_shift), mask
        )
        y = gated(x, gate, found)
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
