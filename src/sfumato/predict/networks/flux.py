"""FLUX.1: a rectified flow transformer of 12 billion parameters.

Black Forest Labs 2024, github.com/black-forest-labs/flux; Kontext: Batifol et al. 2025,
arXiv:2506.15742, section 3.

y = F(x, t, text, guidance): 2x2 cells of the latent are a token; 19 double blocks for image and
text, 38 single blocks for both as one. Each block is modulated by an embedding of time, pooled text
and, in guidance-distilled models ("dev"; Meng et al. 2022, arXiv:2210.03142), the guidance scale.
Fill and control models take more channels; Kontext attends to a reference image too. Names and
config are diffusers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import FeedForward, by_rows
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
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH
from sfumato.types import Conditioning


@dataclass(frozen=True)
class FluxConfig(FluxBaseConfig):
    """The numbers of a FLUX.1 transformer, with diffusers' names and defaults (schnell's).

    Attributes:
        in_channels: Of a token, four times the latent's, with those that `Conditioning.concat`
            joins: 384 for fill (16 + 16 + 64 channels), 128 for depth and canny.
        out_channels: Of a token; None: in_channels.
        num_layers: Number of double blocks.
        num_single_layers: Number of single blocks.
        attention_head_dim: Width of a head.
        num_attention_heads: Heads of attention.
        joint_attention_dim: Channels of text tokens (T5).
        pooled_projection_dim: Channels of the pooled text (CLIP).
        guidance_embeds: Whether the guidance scale is embedded.
        axes_dims_rope: Channels of a head for the rotary positions of image, row and column.
    """

    class_name = "FluxTransformer2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {"patch_size": 1}  # patches are made in the network here

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        self.check_counts("in_channels attention_head_dim num_attention_heads")
        self.check_counts("joint_attention_dim pooled_projection_dim")
        self.check_counts("num_layers num_single_layers", at_least=0)
        self.check_rope(3)
        for name in ("in_channels", "out_channels"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % 4):
                raise UserError(
                    f"config field {name}={value!r}: expected a multiple of 4, as a token is 2x2 "
                    "cells of the latent"
                )


class DoubleBlock(_flux_base.DoubleBlock):
    """A double block with its own modulation: img (B, N, D), txt (B, L, D) -> the same."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        width = heads * head_width
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(width, heads)
        self.ff, self.ff_context = FeedForward(width, "gelu"), FeedForward(width, "gelu")

    def modulation(self, c: Float[Tensor, "B D"]) -> tuple[ModulationParams, ModulationParams]:
        """Two shifts, scales and gates for each stream, linear in SiLU(c)."""
        return self.norm1(c), self.norm1_context(c)


class SelfAttention(RotaryAttention):
    """Self-attention without an output projection: (B, S, D) -> (B, S, D)."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (batch_invariant.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_width), RMSNorm(head_width)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """Attend among all tokens, of which the first `count` are an image's."""
        return self.attend((self.to_q(x), self.to_k(x), self.to_v(x)), rope, mask, count)


class SingleBlock(nn.Module):
    """Attention and a feed-forward layer side by side: (B, S, D) -> (B, S, D).

    Both have one output projection.
    """

    streams = 1  # one stream of tokens in and out

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        width = heads * head_width
        self.norm = Modulation(width, 3)
        self.proj_mlp = batch_invariant.Linear(width, 4 * width)
        self.proj_out = batch_invariant.Linear(5 * width, width)
        self.attn = SelfAttention(heads, head_width)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        c: Float[Tensor, "B D"],
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """All tokens after the block; the first `count` are an image's."""
        shift, scale, gate = self.norm(c)
        y = modulated(x, scale, shift)
        return clamp_fp16(by_rows(self._out, [x, y, self.attn(y, rope, mask, count)], gate))

    def _out(self, x: Tensor, y: Tensor, attn: Tensor, gate: Tensor) -> Tensor:
        mlp = batch_invariant.gelu(self.proj_mlp(y), tanh=True)
        return gated(x, gate, self.proj_out(torch.cat([attn, mlp], dim=-1)))


class FluxTransformer(FluxBase):
    """FLUX.1: see the module's docstring.

    Its latents are (B, 16, h, w), of any sides; `references` hold one at most (Kontext).
    """

    max_reference_images: ClassVar[float] = 1
    text_width_fields = ("joint_attention_dim", "pooled_projection_dim")
    config: FluxConfig

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        width, outputs = config.width, config.out_channels or config.in_channels
        heads, head_width = config.num_attention_heads, config.attention_head_dim
        self.positions = RopePositions(
            config.axes_dims_rope, theta=10000.0, image_step=1, text_axis=False
        )
        self.time_text_embed = TimeEmbedding(
            width, SINUSOIDAL_WIDTH, config.pooled_projection_dim, config.guidance_embeds
        )
        self.context_embedder = batch_invariant.Linear(config.joint_attention_dim, width)
        self.x_embedder = batch_invariant.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(heads, head_width) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(heads, head_width) for _ in range(config.num_single_layers)
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = batch_invariant.Linear(width, outputs)

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The network's target. Arguments and errors as in `FluxBase.forward`."""
        if len(cond.references or ()) > 1:
            raise UserError(
                f"FLUX.1 takes one reference image, got {len(cond.references or ())}: put them "
                "side by side in one"
            )
        return super().forward(x, timestep, cond)

    def embedding(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time, guidance scale and pooled text as one embedding."""
        return self.time_text_embed(timestep, vector, dtype)

    @classmethod
    def shape_fields(cls, config: Any, channels: int, side: int) -> dict[str, Any]:
        """Fields for other latents: a token is 2 x 2 cells, and no field is the side."""
        return {"in_channels": 4 * channels, "out_channels": 4 * channels}

    @property
    def sample_size(self) -> int:
        """128 cells, of 1024 pixels: the size of the published models, which no config has."""
        return 128

    @property
    def vector_width(self) -> int:
        """Channels of the pooled text, the first numbers of `Conditioning.vector`."""
        return self.config.pooled_projection_dim

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token."""
        return 2


CLASSES = {"FluxTransformer2DModel": (FluxTransformer, FluxConfig)}
