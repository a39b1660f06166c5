"""PixArt: a transformer over latent patches with cross-attention to a text.

Chen et al. 2023, arXiv:2310.00426, section 2.3; Sigma: Chen et al. 2024, arXiv:2403.04692.

adaLN-single: S = W SiLU(c) is computed once for all blocks, and each block adds a table of its own,
(shift, scale, gate) x 2 = S + table:

    x <- x + gate attention(LN(x) (1 + scale) + shift)
    x <- x + attention to the text
    x <- x + gate' mlp(LN(x) (1 + scale') + shift')

c = MLP(sinusoidal(t)); PixArt-alpha at 1024 x 1024 pixels adds embeddings of height, width and
height/width. Module names and config are diffusers' PixArtTransformer2DModel.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention, FeedForward
from sfumato.nn.embeddings import TimestepEmbedding
from sfumato.nn.modulation import gated, modulated
from sfumato.predict.networks._patch_transformer import (
    ACTIVATIONS,
    PatchConfig,
    PatchTransformer,
    zero_init,
)
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH
from sfumato.types import Conditioning
from sfumato.validate import flag, number_in, whole_number


@dataclass(frozen=True)
class PixArtConfig(PatchConfig):
    """The numbers of a PixArt, with diffusers' names and defaults.

    The defaults are PixArt-XL/2's for 1024 x 1024 pixels.

    Attributes:
        cross_attention_dim: Channels of text tokens in the blocks.
        interpolation_scale: The divisor of positions; None: sample_size / 64.
        use_additional_conditions: Whether it is conditioned on the image's size; None: where
            sample_size is 128.
        caption_channels: Channels of the text encoder's tokens, which are projected to the
            network's width; None: cross_attention_dim, without a projection.
        num_embeds_ada_norm: Kept for the file's sake.
    """

    class_name = "PixArtTransformer2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        "dropout": 0.0,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "attention_type": "default",
    }

    out_channels: int | None = 8
    cross_attention_dim: int = 1152
    sample_size: int = 128
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("cross_attention_dim")
        if self.caption_channels is not None:
            whole_number("caption_channels", self.caption_channels, at_least=1)
            if self.cross_attention_dim != self.width:
                raise UserError(
                    f"cross_attention_dim {self.cross_attention_dim} with caption_channels: "
                    f"expected the network's own width, {self.width}"
                )
        if self.use_additional_conditions is not None:
            flag("use_additional_conditions", self.use_additional_conditions)
        if self.conditioned_on_size and self.width % 3:
            raise UserError(
                f"use_additional_conditions with a width of {self.width}: height, width and aspect "
                "need a third of it each"
            )
        if self.interpolation_scale is not None:
            number_in("interpolation_scale", self.interpolation_scale, above=0)

    @property
    def conditioned_on_size(self) -> bool:
        """True where it is conditioned on height, width and their ratio."""
        if self.use_additional_conditions is None:
            return self.sample_size == 128
        return self.use_additional_conditions

    @property
    def position_scale(self) -> float:
        """The divisor of positions."""
        if self.interpolation_scale is None:
            return max(self.sample_size // 64, 1)
        return self.interpolation_scale


class _TimeSizeEmbedding(nn.Module):
    """Time (B,) and perhaps (height, width, height/width) (B, 3) -> c (B, D).

    To the embedding of time, the sizes' embeddings side by side are added: two thirds of height and
    width, one third of their ratio.
    """

    def __init__(self, width: int, conditioned_on_size: bool):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOIDAL_WIDTH, width)
        if conditioned_on_size:
            self.resolution_embedder = TimestepEmbedding(SINUSOIDAL_WIDTH, width // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(SINUSOIDAL_WIDTH, width // 3)

    def forward(
        self, timestep: Float[Tensor, " B"], size: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        c = self.timestep_embedder.embed(timestep, dtype)
        if size is None:
            return c
        sides = self.resolution_embedder.embed(size[:, :2].flatten(), dtype)
        ratio = self.aspect_ratio_embedder.embed(size[:, 2], dtype)
        return c + torch.cat([sides.view(len(size), -1), ratio], dim=1)  # (B, 2/3 D) and (B, 1/3 D)


class _AdaLNSingle(nn.Module):
    """adaLN-single: time and size -> S (B, 6, D) for all blocks, and c (B, D)."""

    def __init__(self, width: int, conditioned_on_size: bool):
        super().__init__()
        self.emb = _TimeSizeEmbedding(width, conditioned_on_size)
        self.linear = batch_invariant.Linear(width, 6 * width)

    def forward(
        self, timestep: Float[Tensor, " B"], size: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "B 6 D"], Float[Tensor, "B D"]]:
        c = self.emb(timestep, size, dtype)
        return self.linear(batch_invariant.silu(c)).unflatten(1, (6, -1)), c


class _CaptionProjection(nn.Module):
    """Text tokens in the network's width, by two layers with GELU: (B, L, E) -> (B, L, D)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = batch_invariant.Linear(channels, width)
        self.linear_2 = batch_invariant.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B L E"]) -> Float[Tensor, "B L D"]:
        return self.linear_2(batch_invariant.gelu(self.linear_1(tokens), tanh=True))


class _Block(nn.Module):
    """Self-attention, cross-attention to the text, and feed-forward; first and last modulated."""

    streams = 1  # one stream of tokens in and out

    def __init__(self, config: PixArtConfig):
        super().__init__()
        width, bias = config.width, config.attention_bias
        heads, head_width = config.num_attention_heads, config.attention_head_dim
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(width, heads, head_width, qkv_bias=bias)
        self.attn2 = Attention(width, heads, head_width, config.cross_attention_dim, bias)
        self.ff = FeedForward(width, ACTIVATIONS[config.activation_fn])
        # a network that was trained without text goes on unchanged
        zero_init(cast("nn.Linear", self.attn2.to_out[0]))

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        modulation: Float[Tensor, "B 6 D"],
        text: Float[Tensor, "B L E"],
        mask: Bool[Tensor, "B L"] | None,
    ) -> Float[Tensor, "B N D"]:
        # (B, 1, D) each
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (
            self.scale_shift_table + modulation
        ).chunk(6, dim=1)
        x = gated(x, gate, self.attn1(modulated(x, scale, shift, self.eps)))
        x = self.attn2(x, text, mask, plus=x)
        return gated(x, gate_ff, self.ff(modulated(x, scale_ff, shift_ff, self.eps)))


class PixArt(PatchTransformer):
    """The transformer: see the module's docstring.

    Built from a `PixArtConfig`; weights are random until loaded. `Conditioning.tokens` (B, L, E) is
    the text, with `mask` (B, L) False on padding; `vector` (B, 3) the height and width in pixels
    and their ratio, where the network is conditioned on them. A new network's output is 0.
    """

    text_width_fields = ("caption_channels",)
    config: PixArtConfig

    def __init__(self, config: PixArtConfig):
        super().__init__(config)
        width = config.width
        self.transformer_blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = zero_init(
            batch_invariant.Linear(width, config.patch_size**2 * config.outputs)
        )
        self.adaln_single = _AdaLNSingle(width, config.conditioned_on_size)
        self.caption_projection = (
            None
            if config.caption_channels is None
            else _CaptionProjection(config.caption_channels, width)
        )

    @property
    def token_width(self) -> int:
        """Channels of `Conditioning.tokens`."""
        return self.config.caption_channels or self.config.cross_attention_dim

    @property
    def vector_width(self) -> int | None:
        """3, for height, width and their ratio; None where the network ignores a vector."""
        return 3 if self.config.conditioned_on_size else None

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B K h w"]:
        """The network's target and, behind it, a learned variance.

        Args:
            x: Noisy latent.
            timestep: In 0..1000.
            cond: With `tokens`, and `vector` where the network is conditioned on the image's size.

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        width, size = self.token_width, None
        text = self.require(cond, "tokens", width, f"attends to tokens of width {width}")
        if self.caption_projection is not None:
            text = self.caption_projection(text)  # (B, L, E)
        if self.config.conditioned_on_size:
            sizes = "is conditioned on the image's height, width and height/width"
            size = self.require(cond, "vector", 3, sizes)
        modulation, c = self.adaln_single(timestep, size, x.dtype)  # (B, 6, D), (B, D)

        y = self.patchify(x, cond)  # (B, N, D)
        for block in cast("Iterable[_Block]", self.transformer_blocks):
            y = block(y, modulation, text, cond.mask)

        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)
        return self.unpatchify(self.proj_out(modulated(y, scale, shift)), x.shape[2:])


CLASSES = {"PixArtTransformer2DModel": (PixArt, PixArtConfig)}
