"""Attention and feed-forward layers of U-Nets, autoencoders and transformers.

softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). Parameter names are
diffusers', so state dicts load as they are.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.kernels import batch_invariant

_ROWS = 1024
"""Rows of a feed-forward layer per part: 5 MB of activations for width 320 in float32."""


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention to a context.

    x (B, N, width), context (B, L, context_width), mask (B, L), True for context tokens to attend
    to -> (B, N, width). `plus` is added to the output.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        context_width: int | None = None,
        qkv_bias: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q = batch_invariant.Linear(width, inner, bias=qkv_bias)
        self.to_k = batch_invariant.Linear(context_width or width, inner, bias=qkv_bias)
        self.to_v = batch_invariant.Linear(context_width or width, inner, bias=qkv_bias)
        self.to_out = nn.ModuleList([batch_invariant.Linear(inner, width, bias=bias)])

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B L E"] | None = None,
        mask: Bool[Tensor, "B L"] | None = None,
        *,
        plus: Float[Tensor, "B N D"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Attend to the context, or without one to x."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](batch_invariant.attention(q, k, v, self.heads, mask), plus=plus)


class ImageTokenAttention(nn.Module):
    """Attention of image tokens and the tokens behind them, such as a text's.

    `attend_heads` is the one call to the kernel, which perturbed attention replaces.
    """

    def attend_heads(
        self,
        q: Float[Tensor, "B N H d"],
        k: Float[Tensor, "B S H d"],
        v: Float[Tensor, "B S H d"],
        mask: Bool[Tensor, "B S"] | None,
        num_image_tokens: int,
    ) -> Float[Tensor, "B N D"]:
        """Attend, see `batch_invariant.attend`.

        The first `num_image_tokens` queries and keys are image tokens. Plain attention ignores
        this.
        """
        del num_image_tokens
        return batch_invariant.attend(q, k, v, mask)


class SpatialAttention(Attention):
    """Self-attention over the positions of a feature map, with group norm and residual.

    x (B, C, H, W) -> (B, C, H, W). Used in the middle of autoencoders and in "AttnDownBlock2D".
    """

    def __init__(self, channels: int, head_width: int, groups: int, eps: float):
        super().__init__(channels, channels // head_width, head_width, qkv_bias=True)
        self.group_norm = batch_invariant.GroupNorm(groups, channels, eps)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B C H W"]:
        """Add attention over all positions to the map."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class GEGLU(nn.Module):
    """a * gelu(b) with (a, b) = W x (Shazeer 2020, arXiv:2002.05202): (..., D) -> (..., E)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = batch_invariant.Linear(width, 2 * inner)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """Project, and gate by GELU."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * batch_invariant.gelu(gate)


class SwiGLU(nn.Module):
    """silu(a) * b with (a, b) = W x, without bias: (..., D) -> (..., E).

    Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = batch_invariant.Linear(width, 2 * inner, bias=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """Project, and gate by SiLU."""
        gate, value = self.proj(x).chunk(2, dim=-1)
        return batch_invariant.silu(gate) * value


class GELU(nn.Module):
    """gelu(W x) by the tanh approximation: (..., D) -> (..., E).

    Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = batch_invariant.Linear(width, inner)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """Project, and apply GELU."""
        return batch_invariant.gelu(self.proj(x), tanh=True)


_INNER = {"geglu": GEGLU, "gelu": GELU, "swiglu": SwiGLU}


class Branch(nn.Module):
    """Base of feed-forward layers, whose output is added to a residual stream.

    Skip-layer guidance leaves out layers of this class.
    """


class FeedForward(Branch):
    """Feed-forward layer: (..., D) -> (..., D).

    Args:
        width: D.
        kind: Activation "geglu", "gelu" or "swiglu".
        inner: Hidden width, 4 D by default.
        bias: Whether the output projection has a bias.
    """

    def __init__(
        self, width: int, kind: str = "geglu", inner: int | None = None, bias: bool = True
    ):
        super().__init__()
        inner = inner or 4 * width
        self.net = nn.Sequential(
            _INNER[kind](width, inner),
            nn.Identity(),
            batch_invariant.Linear(inner, width, bias=bias),
        )

    def forward(
        self, x: Float[Tensor, "*B D"], *, plus: Float[Tensor, "*B D"] | None = None
    ) -> Float[Tensor, "*B D"]:
        """Apply the layer; `plus` is added to the output."""
        widen, _, back = self.net
        if not _by_parts(x):
            return back(widen(x), plus=plus)
        # A part must not hold rows of two images.
        if not batch_invariant.FIXED_ORDER and x.ndim == 3:
            return by_rows(
                lambda part, *beside: back(widen(part), plus=beside[0] if beside else None),
                (x,) if plus is None else (x, plus),
            )
        # On the CPU a part's activations stay in the cache. All rows at once allocate fresh memory
        # at each call, which takes twice as long.
        parts = x.flatten(0, -2).split(_ROWS)
        added = [None] * len(parts) if plus is None else plus.flatten(0, -2).split(_ROWS)
        y = [back(widen(part), plus=beside) for part, beside in zip(parts, added, strict=True)]
        return torch.cat(y).view(x.shape)


def _by_parts(x: Tensor) -> bool:
    """Return True where rows should be processed in parts: inference on the CPU, many rows."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return x.is_cpu and not tracing and x.numel() > _ROWS * x.shape[-1]


def by_rows(
    function: Callable[..., Tensor],
    tokens: Sequence[Float[Tensor, "B N _"]],
    *of_image: Float[Tensor, "B 1 _"],
) -> Tensor:
    """Apply a function of single tokens, in parts where that is faster.

    Args:
        function: (*tokens, *of_image) -> (B, N, E). Each token's result depends on it alone.
        tokens: Tensors (B, N, _), split along N.
        of_image: Tensors shared by all tokens of an image, such as gates.
    """
    if not _by_parts(tokens[0]):
        return function(*tokens, *of_image)
    images = []
    for b in range(len(tokens[0])):
        parts = zip(*(t[b : b + 1].split(_ROWS, 1) for t in tokens), strict=True)
        shared = [v[b : b + 1] for v in of_image]
        images.append(torch.cat([function(*part, *shared) for part in parts], 1))
    return torch.cat(images) if len(images) > 1 else images[0]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each pre-normed with a residual.

    x (B, N, D) -> (B, N, D). With `only_cross` both attentions attend to the context.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, context_width: int, only_cross: bool = False
    ):
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, head_width, context_width if only_cross else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, head_width, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B L E"],
        mask: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens after the block."""
        attended = (context, mask) if self.only_cross else ()
        x = self.attn1(self.norm1(x), *attended, plus=x)
        x = self.attn2(self.norm2(x), context, mask, plus=x)
        return self.ff(self.norm3(x), plus=x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with an outer residual.

    The tokens attend to the context. The projections in and out are 1x1 convolutions (SD 1) or
    linear maps (SD 2, SDXL), which compute the same.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_width: int,
        depth: int,
        context_width: int,
        groups: int,
        linear: bool,
        only_cross: bool = False,
    ):
        super().__init__()
        self.linear = linear
        inner = heads * head_width
        self.norm = batch_invariant.GroupNorm(groups, channels, 1e-6)
        project = (
            batch_invariant.Linear if linear else partial(batch_invariant.Conv2d, kernel_size=1)
        )
        self.proj_in = project(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, heads, head_width, context_width, only_cross)
            for _ in range(depth)
        )
        self.proj_out = project(inner, channels)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        context: Float[Tensor, "B L E"],
        mask: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Add attention among the positions and to the context to the map."""
        size = x.shape[2:]
        y = self.norm(x)
        if self.linear:
            y = self.proj_in(y.flatten(2).transpose(1, 2))  # (B, H*W, D)
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context, mask)
        if self.linear:
            return x + self.proj_out(y).transpose(1, 2).unflatten(2, size)
        return self.proj_out(y.transpose(1, 2).unflatten(2, size), plus=x)
