"""FLUX.2: the transformer of [dev] (32 billion parameters) and [klein] (4 and 9 billion).

Black Forest Labs 2025, github.com/black-forest-labs/flux2.

y = F(x, t, text, guidance): FLUX.1's two kinds of blocks, with one modulation for all blocks of a
kind, no biases, SwiGLU (Shazeer 2020, arXiv:2002.05202) and one input projection in a single block.
The latent is the autoencoder's, which packs 2x2 cells itself (see compress/kl_flux2.py): one of its
cells is a token. Names and config are diffusers'.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Branch, PictureAttention, by_rows
from sfumato.nn.mmdit import JointAttention
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.nn.rope import rotate
from sfumato.predict.networks._flux_base import (
    FluxBase,
    ModulationParams,
    OutNorm,
    RopePositions,
    TimeEmbedding,
    check_numbers,
    clamp_fp16,
)

FIXED: dict[str, Any] = {"patch_size": 1}
"""Fields of Flux2Transformer2DModel of which one value is supported."""


@dataclass(frozen=True)
class Flux2Config:
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
        widths = (
            "in_channels",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "timestep_guidance_channels",
        )
        layers = (("num_layers", 0), ("num_single_layers", 0))
        check_numbers(
            self,
            self.attention_head_dim,
            self.axes_dims_rope,
            4,
            *((name, 1) for name in widths),
            *layers,
        )
        if self.out_channels is not None and self.out_channels < 1:
            raise UserError(
                f"config field out_channels={self.out_channels!r}: expected a number of at least 1"
            )
        if self.timestep_guidance_channels % 2:
            raise UserError(
                f"config field timestep_guidance_channels={self.timestep_guidance_channels}: expected an even number"
            )
        for name in ("mlp_ratio", "rope_theta", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"config field {name}={getattr(self, name)!r}: expected a number above 0"
                )

    @property
    def width(self) -> int:
        """Channels of a token inside the network."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward layers."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Flux2Config":
        """Read a diffusers config; `UserError` for unknown fields and unsupported values."""
        return read_config(cls, values, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' Flux2Transformer2DModel reads."""
        return {"_class_name": "Flux2Transformer2DModel", **asdict(self), **FIXED}


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
        return self.linear_out(_swiglu(self.linear_in(x)))


class DoubleBlock(nn.Module):
    """Joint attention of both streams, and a feed-forward layer for each.

    img (B, N, D), txt (B, L, D) -> the same.
    """

    streams = 2  # two streams of tokens in and out

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.eps = config.eps
        self.attn = JointAttention(
            config.width, config.num_attention_heads, bias=False, eps=config.eps
        )
        self.ff, self.ff_context = (
            FeedForward(config.width, config.inner),
            FeedForward(config.width, config.inner),
        )

    def forward(
        self,
        img: Float[Tensor, "B N D"],
        txt: Float[Tensor, "B L D"],
        modulation: tuple[ModulationParams, ModulationParams],
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        (img_shift, img_scale, img_gate, *img_mlp), (txt_shift, txt_scale, txt_gate, *txt_mlp) = (
            modulation
        )

        # attention
        eps = self.eps
        attn_img, attn_txt = self.attn(
            modulated(img, img_scale, img_shift, eps),
            modulated(txt, txt_scale, txt_shift, eps),
            mask,
            rope,
            count,
        )
        img, txt = gated(img, img_gate, attn_img), gated(txt, txt_gate, attn_txt)

        # feed-forward
        return self._mlp(self.ff, img, img_mlp), clamp_fp16(
            self._mlp(self.ff_context, txt, txt_mlp)
        )

    def _mlp(
        self, ff: nn.Module, x: Float[Tensor, "B N D"], modulation: list[Tensor]
    ) -> Float[Tensor, "B N D"]:
        """x + gate ff(LN(x) (1 + scale) + shift). modulation: shift, scale and gate."""

        def mlp(rows: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
            return gated(rows, gate, ff(modulated(rows, scale, shift, self.eps)))

        return by_rows(mlp, [x], *modulation)


class ParallelAttention(PictureAttention):
    """Attention and SwiGLU side by side: (B, S, D) -> (B, S, D).

    Both have one input and one output projection.
    """

    def __init__(self, config: Flux2Config):
        super().__init__()
        width, inner, eps = config.width, config.inner, config.eps
        self.heads, self.parts = config.num_attention_heads, [width, width, width, 2 * inner]
        self.to_qkv_mlp_proj = batch_invariant.Linear(width, 3 * width + 2 * inner, bias=False)
        self.norm_q, self.norm_k = (
            RMSNorm(config.attention_head_dim, eps),
            RMSNorm(config.attention_head_dim, eps),
        )
        self.to_out = batch_invariant.Linear(width + inner, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        q, k, v, mlp = self.to_qkv_mlp_proj(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))  # (B, S, H, d)
        attn = self.find(rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope), v, mask, count)
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
        shift, scale, gate = modulation
        return clamp_fp16(
            gated(x, gate, self.attn(modulated(x, scale, shift, self.eps), rope, mask, count))
        )


class Flux2Transformer(FluxBase):
    """FLUX.2: see the module's docstring.

    Its latents are (B, 128, h, w), of any sides; any number of `references`.
    """

    max_reference_images: ClassVar[float] = math.inf
    config: Flux2Config

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.config = config
        width = config.width
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
        self.norm_out = OutNorm(width, bias=False, eps=config.eps)
        self.proj_out = batch_invariant.Linear(
            width, config.out_channels or config.in_channels, bias=False
        )

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
