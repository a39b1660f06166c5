"""PixArt: a transformer over latent patches that attends to a text (Chen et al. 2023,
arXiv:2310.00426, section 2.3; Sigma, 2403.04692).

adaLN-single: S = W SiLU(c) is made once for all blocks, and each block adds a table of its own,
(shift, scale, gate) x 2 = S + table:

    x <- x + gate attention(LN(x) (1 + scale) + shift)
    x <- x + attention to the text
    x <- x + gate' mlp(LN(x) (1 + scale') + shift')

c = MLP(waves(t)), and for PixArt-alpha at 1024 x 1024 pixels also what height, width and
height/width are embedded as. Module names and config are diffusers' PixArtTransformer2DModel.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention, FeedForward
from sfumato.nn.embeddings import TimestepEmbedding, sinusoidal
from sfumato.nn.modulation import gated, modulated
from sfumato.predict.networks._patch_transformer import (
    ACTIVATIONS,
    LEGACY,
    WAVES,
    PatchConfig,
    PatchNetwork,
    flag,
    whole,
    zeroed,
)
from sfumato.types import Conditioning

# Fields of PixArtTransformer2DModel that we stand for with one value only.
FIXED: dict[str, Any] = {
    "dropout": 0.0,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
}


@dataclass(frozen=True)
class PixArtConfig(PatchConfig):
    """The numbers of a PixArt, with diffusers' names and defaults, which are PixArt-XL/2's for 1024
    x 1024 pixels.

    caption_channels: width of the text encoder's tokens, which are then made as wide as the
    network's; None: cross_attention_dim wide. interpolation_scale: of places; None: sample_size /
    64. use_additional_conditions: whether it is told the picture's size; None: where sample_size is
    128. num_embeds_ada_norm: kept for the file's sake.
    """

    out_channels: int | None = 8
    cross_attention_dim: int = 1152
    sample_size: int = 128
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("cross_attention_dim", self.cross_attention_dim)
        if self.caption_channels is not None:
            whole("caption_channels", self.caption_channels)
            if self.cross_attention_dim != self.width:
                raise UserError(
                    f"cross_attention_dim {self.cross_attention_dim} with caption_channels: expected the network's own width, {self.width}"
                )
        if self.use_additional_conditions is not None:
            flag("use_additional_conditions", self.use_additional_conditions)
        if self.told_sizes and self.width % 3:
            raise UserError(
                f"use_additional_conditions with a width of {self.width}: height, width and aspect need a third of it each"
            )
        scale = self.interpolation_scale
        if scale is not None and (
            isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0
        ):
            raise UserError(f"interpolation_scale {scale!r}: expected a number above 0, or null")

    @property
    def told_sizes(self) -> bool:
        """Whether it is told height, width and their ratio."""
        return (
            self.sample_size == 128
            if self.use_additional_conditions is None
            else self.use_additional_conditions
        )

    @property
    def stretch(self) -> float:
        """What places are divided by."""
        return (
            max(self.sample_size // 64, 1)
            if self.interpolation_scale is None
            else self.interpolation_scale
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PixArtConfig":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot
        honour, is refused.
        """
        return read_config(cls, values, LEGACY | FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' PixArtTransformer2DModel reads."""
        return {"_class_name": "PixArtTransformer2DModel", **asdict(self), **FIXED}


class _Sizes(nn.Module):
    """Time (B,) and perhaps (height, width, height/width) (B, 3) -> c (B, D): sizes are two thirds
    of what is added to time's, their ratio one.
    """

    def __init__(self, width: int, told_sizes: bool):
        super().__init__()
        self.told_sizes = told_sizes
        self.timestep_embedder = TimestepEmbedding(WAVES, width)
        if told_sizes:
            self.resolution_embedder = TimestepEmbedding(WAVES, width // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(WAVES, width // 3)

    def forward(
        self,
        timestep: Float[Tensor, " B"],
        picture: Float[Tensor, "B V"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "B D"]:
        time = self.timestep_embedder(sinusoidal(timestep, WAVES).to(dtype))
        if not self.told_sizes:
            return time
        if picture is None or picture.shape[1] != 3:
            found = "is missing" if picture is None else f"has {picture.shape[1]} numbers"
            raise UserError(
                f"this PixArt is told the picture's height, width and height/width: Conditioning.vector (B, 3) {found}"
            )
        # (B, 2/3 D)
        sides = self.resolution_embedder(
            sinusoidal(picture[:, :2].flatten(), WAVES).to(dtype)
        ).view(len(picture), -1)
        ratio = self.aspect_ratio_embedder(sinusoidal(picture[:, 2], WAVES).to(dtype))  # (B, 1/3 D)
        return time + torch.cat([sides, ratio], dim=1)


class _Single(nn.Module):
    """adaLN-single: -> S (B, 6, D) for all blocks, and c (B, D)."""

    def __init__(self, width: int, told_sizes: bool):
        super().__init__()
        self.emb = _Sizes(width, told_sizes)
        self.linear = batch_invariant.Linear(width, 6 * width)

    def forward(
        self,
        timestep: Float[Tensor, " B"],
        picture: Float[Tensor, "B V"] | None,
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "B 6 D"], Float[Tensor, "B D"]]:
        told = self.emb(timestep, picture, dtype)
        return self.linear(batch_invariant.silu(told)).unflatten(1, (6, -1)), told


class _Caption(nn.Module):
    """The text encoder's tokens as wide as the network's: (B, L, E) -> (B, L, D)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = batch_invariant.Linear(channels, width)
        self.linear_2 = batch_invariant.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B L E"]) -> Float[Tensor, "B L D"]:
        return self.linear_2(batch_invariant.gelu(self.linear_1(tokens), tanh=True))


class _Block(nn.Module):
    """Attention of all patches to each other, steered; to the text; and a feed-forward layer,
    steered.
    """

    streams = 1  # it takes and gives one stream of tokens

    def __init__(self, config: PixArtConfig):
        super().__init__()
        width, heads, head_width = (
            config.width,
            config.num_attention_heads,
            config.attention_head_dim,
        )
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(width, heads, head_width, qkv_bias=config.attention_bias)
        self.attn2 = Attention(
            width, heads, head_width, config.cross_attention_dim, config.attention_bias
        )
        self.ff = FeedForward(width, ACTIVATIONS[config.activation_fn])
        # a network that was trained without text goes on as it is
        zeroed(cast("nn.Linear", self.attn2.to_out[0]))

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        single: Float[Tensor, "B 6 D"],
        text: Float[Tensor, "B L E"],
        mask: Bool[Tensor, "B L"] | None,
    ) -> Float[Tensor, "B N D"]:
        # (B, 1, D) each
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.scale_shift_table + single).chunk(
            6, dim=1
        )
        x = gated(x, gate, self.attn1(modulated(x, scale, shift, self.eps)))
        x = self.attn2(x, text, mask, plus=x)
        return gated(x, gate_ff, self.ff(modulated(x, scale_ff, shift_ff, self.eps)))


class PixArt(PatchNetwork):
    """The transformer: see the module's docstring. Built from a `PixArtConfig`; weights are random
    until loaded.

    `Conditioning.tokens` (B, L, E) is the text, with `mask` (B, L) True where a token counts;
    `vector` (B, 3) the height and width in pixels and their ratio, where the network is told them.
    A fresh network answers 0.
    """

    config: PixArtConfig

    def __init__(self, config: PixArtConfig):
        super().__init__(config)
        width = config.width
        self.transformer_blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = zeroed(batch_invariant.Linear(width, config.patch_size**2 * config.outputs))
        self.adaln_single = _Single(width, config.told_sizes)
        self.caption_projection = (
            None if config.caption_channels is None else _Caption(config.caption_channels, width)
        )

    @property
    def token_width(self) -> int:
        """The width of the text encoder's tokens."""
        return self.config.caption_channels or self.config.cross_attention_dim

    @property
    def vector_width(self) -> int | None:
        """3 where it is told height, width and their ratio; None where it makes nothing of a
        vector.
        """
        return 3 if self.config.told_sizes else None

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B K h w"]:
        """x noisy latent, timestep in 0..1000, conditioning with `tokens` -> y, the network's
        target and, behind it, a learned variance.
        """
        text = self._text(cond)  # (B, L, E)
        single, told = self.adaln_single(timestep, cond.vector, x.dtype)  # (B, 6, D), (B, D)

        y = self.tokens(x, cond)  # (B, N, D)
        for block in cast("Iterable[_Block]", self.transformer_blocks):
            y = block(y, single, text, cond.mask)

        shift, scale = (self.scale_shift_table + told[:, None]).chunk(2, dim=1)
        return self.picture(self.proj_out(modulated(y, scale, shift)), x.shape[2:])

    def _text(self, cond: Conditioning) -> Float[Tensor, "B L E"]:
        if cond.tokens is None or cond.tokens.shape[2] != self.token_width:
            found = "is missing" if cond.tokens is None else f"is {cond.tokens.shape[2]} wide"
            raise UserError(
                f"this PixArt attends to tokens of width {self.token_width}: Conditioning.tokens (B, L, {self.token_width}) {found}"
            )
        return (
            cond.tokens if self.caption_projection is None else self.caption_projection(cond.tokens)
        )


CLASSES = {"PixArtTransformer2DModel": (PixArt, PixArtConfig)}
