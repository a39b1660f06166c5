"""FLUX.2: the transformer of [dev] (32 billion parameters) and [klein] (4 and 9 billion).

Black Forest Labs 2025, github.com/black-forest-labs/flux2.

y = F(x, t, text, guidance): FLUX.1's two kinds of blocks, with one modulation for all blocks of a
kind, no biases, SwiGLU (Shazeer 2020, arXiv:2002.05202) and one input projection in a single block.
The latent is the autoencoder's, which packs 2x2 cells itself (see compress/kl_flux2.py): one of its
cells is a token. Names and config are diffusers'.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Branch
from sfumato.nn.embeddings import TimeEmbedding
from sfumato.nn.mmdit import JointAttention
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.predict.networks import _flux_base
from sfumato.predict.networks._flux_base import (
    FluxBase,
    FluxBaseConfig,
    ModulationParams,
    RopePositions,
    RotaryAttention,
    clamp_fp16,
)
from sfumato.validate import number_in, whole_number


@dataclass(frozen=True)
class Flux2Config(FluxBaseConfig):
    """The numbers of a FLUX.2 transformer, with diffusers' names and defaults (dev's).

    Attributes:
        in_channels: Of the packed latent.
        out_channels: Of the packed latent; None: in_channels.
        num_layers: Number of double blocks.
        num_single_layers: Number of single blocks.
        attention_head_dim: Width of a head.
        num_attention_heads: Heads of attention.
        joint_attention_dim: Channels of text tokens (three layers of a language model).
        timestep_guidance_channels: Sinusoidal features of time and guidance scale.
        mlp_ratio: Inner width of the feed-forward layers, over the width.
        axes_dims_rope: Channels of a head for the rotary positions of image, row, column and text.
        rope_theta: Base of the rotary frequencies.
        eps: Added to variances in norms.
        guidance_embeds: Whether the guidance scale is embedded ("dev"); klein is guided by a second
            pass ("base") or not at all.
    """

    class_name = "Flux2Transformer2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {"patch_size": 1}

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        self.check_counts("in_channels attention_head_dim num_attention_heads joint_attention_dim")
        self.check_counts("timestep_guidance_channels")
        self.check_counts("num_layers num_single_layers", at_least=0)
        self.check_rope(4)
        if self.out_channels is not None:
            whole_number("out_channels", self.out_channels, at_least=1)
        if self.timestep_guidance_channels % 2:
            raise UserError(
                f"timestep_guidance_channels={self.timestep_guidance_channels}: expected an even "
                "number"
            )
        for name in ("mlp_ratio", "rope_theta", "eps"):
            number_in(name, getattr(self, name), above=0)

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward layers."""
        return int(self.width * self.mlp_ratio)


def _swiglu(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
    """silu(a) b, of the halves a and b of the last axis."""
    gate, value = x.chunk(2, dim=-1)
    return batch_invariant.silu(gate) * value


class FeedForward(Branch):
    """SwiGLU and an output projection, without biases: (..., D) -> (..., D)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.linear_in = batch_invariant.Linear(width, 2 * inner, bias=False)
        self.linear_out = batch_invariant.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Apply both projections."""
        return self.linear_out(_swiglu(self.linear_in(x)))


class DoubleBlock(_flux_base.DoubleBlock):
    """A double block with shared modulation: img (B, N, D), txt (B, L, D) -> the same."""

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.eps = config.eps
        self.attn = JointAttention(
            config.width, config.num_attention_heads, bias=False, eps=config.eps
        )
        self.ff, self.ff_context = (FeedForward(config.width, config.inner) for _ in range(2))


class ParallelAttention(RotaryAttention):
    """Attention and SwiGLU side by side: (B, S, D) -> (B, S, D).

    Both have one input and one output projection.
    """

    def __init__(self, config: Flux2Config):
        super().__init__()
        width, inner, eps = config.width, config.inner, config.eps
        self.heads, self.parts = config.num_attention_heads, [width, width, width, 2 * inner]
        self.to_qkv_mlp_proj = batch_invariant.Linear(width, 3 * width + 2 * inner, bias=False)
        self.norm_q, self.norm_k = (RMSNorm(config.attention_head_dim, eps) for _ in range(2))
        self.to_out = batch_invariant.Linear(width + inner, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """Attend among all tokens, of which the first `count` are an image's."""
        *qkv, mlp = self.to_qkv_mlp_proj(x).split(self.parts, dim=-1)
        attn = self.attend(qkv, rope, mask, count)
        return self.to_out(torch.cat([attn, _swiglu(mlp)], dim=-1))


class SingleBlock(nn.Module):
    """Parallel attention, pre-normed and gated: (B, S, D) -> (B, S, D)."""

    streams = 1  # one stream of tokens in and out

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        modulation: ModulationParams,
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """All tokens after the block; the first `count` are an image's."""
        shift, scale, gate = modulation
        return clamp_fp16(
            gated(x, gate, self.attn(modulated(x, scale, shift, self.eps), rope, mask, count))
        )


class Flux2Transformer(FluxBase):
    """FLUX.2: see the module's docstring.

    Its latents are (B, 128, h, w), of any sides; any number of `references`.
    """

    max_reference_images: ClassVar[float] = math.inf
    text_width_fields = ("joint_attention_dim",)
    config: Flux2Config

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.config, self.eps = config, config.eps
        width, outputs = config.width, config.out_channels or config.in_channels
        self.positions = RopePositions(
            config.axes_dims_rope, config.rope_theta, image_step=10, text_axis=True
        )
        self.time_guidance_embed = TimeEmbedding(
            width, config.timestep_guidance_channels, 0, config.guidance_embeds, bias=False
        )
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.x_embedder = batch_invariant.Linear(config.in_channels, width, bias=False)
        self.context_embedder = batch_invariant.Linear(
            config.joint_attention_dim, width, bias=False
        )
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(config) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = Modulation(width, 2, bias=False)
        self.proj_out = batch_invariant.Linear(width, outputs, bias=False)

    @classmethod
    def shape_fields(cls, config: Any, channels: int, side: int) -> dict[str, Any]:
        """Fields for other latents: a token is a cell, and no field is the side."""
        return {"in_channels": channels, "out_channels": channels}

    def modulation(
        self, c: Float[Tensor, "B D"]
    ) -> tuple[tuple[ModulationParams, ModulationParams], ModulationParams]:
        """The modulation of every double block, for img and txt, and of every single block."""
        double = self.double_stream_modulation_img(c), self.double_stream_modulation_txt(c)
        return double, self.single_stream_modulation(c)

    def embedding(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time and guidance scale as one embedding."""
        return self.time_guidance_embed(timestep, vector, dtype)


CLASSES = {"Flux2Transformer2DModel": (Flux2Transformer, Flux2Config)}
