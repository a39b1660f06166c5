"""FLUX.2: the transformer of FLUX.2 [dev] (32 billion parameters) and [klein] (4 and 9 billion)
(Black Forest Labs 2025, github.com/black-forest-labs/flux2).

y = F(x, t, text, guidance): FLUX.1's two kinds of blocks, with one steering for all blocks of a
kind, no biases, SwiGLU (Shazeer 2020, arXiv:2002.05202) and one matrix for all that a single block
reads. The latent is the autoencoder's, which packs 2x2 cells itself (see compress/kl_flux2.py): one
of its cells is a token. Names and config are diffusers'.
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
from sfumato.nn import rope
from sfumato.nn.attention import PictureAttention, by_rows
from sfumato.nn.mmdit import JointAttention
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.predict.networks._flux_base import (
    OutNorm,
    Places,
    Steer,
    Streams,
    TimeEmbedding,
    check_numbers,
    limited,
)

FIXED: dict[str, Any] = {"patch_size": 1}
"""Fields of Flux2Transformer2DModel that we stand for with one value only."""


@dataclass(frozen=True)
class Flux2Config:
    """The numbers of a FLUX.2 transformer, with diffusers' names and defaults (which are those of
    "dev").

    in_channels, out_channels: of the packed latent; out_channels None: as in_channels.
    joint_attention_dim: the width of text tokens (three layers of a language model).
    timestep_guidance_channels: sinusoidal features of time and guidance. mlp_ratio: the
    feed-forward layers' inner width in widths. axes_dims_rope: numbers of a head turned by picture,
    row, column and place in the text. guidance_embeds: whether the strength of guidance is embedded
    ("dev"); klein is guided by a second pass ("base") or not at all.
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
        """Numbers of a token inside the network."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        """The inner width of feed-forward layers."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Flux2Config":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot
        honour, is refused.
        """
        return read_config(cls, values, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' Flux2Transformer2DModel reads."""
        return {"_class_name": "Flux2Transformer2DModel", **asdict(self), **FIXED}


def _swiglu(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
    """silu(a) b of the halves a and b."""
    gate, value = x.chunk(2, dim=-1)
    return batch_invariant.silu(gate) * value


class FeedForward(nn.Module):
    """SwiGLU and a map back, without biases: (..., D) -> (..., D)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.linear_in = batch_invariant.Linear(width, 2 * inner, bias=False)
        self.linear_out = batch_invariant.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.linear_out(_swiglu(self.linear_in(x)))


class DoubleBlock(nn.Module):
    """Attention of both streams to both, and a feed-forward layer for each: picture (B, N, D), text
    (B, L, D) -> the same.
    """

    streams = 2  # it takes and gives two streams of tokens

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
        picture: Float[Tensor, "B N D"],
        text: Float[Tensor, "B L D"],
        steer: tuple[Steer, Steer],
        turn: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        (shift, scale, gate, *feed), (text_shift, text_scale, text_gate, *text_feed) = steer

        # attention
        eps = self.eps
        seen, read = self.attn(
            modulated(picture, scale, shift, eps),
            modulated(text, text_scale, text_shift, eps),
            mask,
            turn,
            count,
        )
        picture, text = gated(picture, gate, seen), gated(text, text_gate, read)

        # feed-forward
        return self._fed(self.ff, picture, feed), limited(
            self._fed(self.ff_context, text, text_feed)
        )

    def _fed(
        self, ff: nn.Module, x: Float[Tensor, "B N D"], steer: list[Tensor]
    ) -> Float[Tensor, "B N D"]:
        """x and, gated, the feed-forward layer of its norm."""

        def fed(rows: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
            return gated(rows, gate, ff(modulated(rows, scale, shift, self.eps)))

        return by_rows(fed, [x], *steer)


class ParallelAttention(PictureAttention):
    """Attention and SwiGLU side by side: one matrix makes queries, keys, values and the inner
    numbers, one maps both back: (B, S, D) -> (B, S, D).
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
        turn: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        q, k, v, inner = self.to_qkv_mlp_proj(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))  # (B, S, H, d)
        seen = self.find(
            rope.rotate(self.norm_q(q), turn), rope.rotate(self.norm_k(k), turn), v, mask, count
        )
        return self.to_out(torch.cat([seen, _swiglu(inner)], dim=-1))


class SingleBlock(nn.Module):
    """Parallel attention, pre-normed and gated: (B, S, D) -> (B, S, D)."""

    streams = 1  # it takes and gives one stream of tokens

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        steer: Steer,
        turn: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        shift, scale, gate = steer
        return limited(
            gated(x, gate, self.attn(modulated(x, scale, shift, self.eps), turn, mask, count))
        )


class Flux2Transformer(Streams):
    """FLUX.2: see the module's docstring. Its latents are (B, 128, h, w), of any sides; any number
    of `references`.
    """

    max_reference_images: ClassVar[float] = math.inf
    config: Flux2Config

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.config = config
        width = config.width
        self.places = Places(config.axes_dims_rope, config.rope_theta, apart=10, line=True)
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
        """A token is a cell; no field says the side."""
        return {"in_channels": channels, "out_channels": channels}

    def steering(self, time: Float[Tensor, "B D"]) -> tuple[tuple[Steer, Steer], Steer]:
        """What every double block, and every single block, is steered by."""
        doubles = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        return doubles, self.single_stream_modulation(time)

    def embedding(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time and guidance as one embedding."""
        return self.time_guidance_embed(timestep, vector, dtype)


CLASSES = {"Flux2Transformer2DModel": (Flux2Transformer, Flux2Config)}
