"""FLUX.1: a rectified flow transformer of 12 billion parameters (Black Forest Labs 2024,
github.com/black-forest-labs/flux; Kontext: Batifol et al. 2025, arXiv:2506.15742, section 3).

y = F(x, t, text, guidance): 2x2 cells of the latent are a token; 19 double blocks for text and
picture, 38 single blocks for both as one. Each block is steered by an embedding of time, pooled
text and, in models distilled from guidance ("dev"; Meng et al. 2022, arXiv:2210.03142), its
strength. Fill and control models take more channels; Kontext reads another picture beside x. Names
and config are diffusers'.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn import rope
from sfumato.nn.attention import FeedForward, PictureAttention, by_rows
from sfumato.nn.mmdit import JointAttention
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.predict.networks._flux_base import (
    OutNorm,
    Places,
    Streams,
    TimeEmbedding,
    check_numbers,
    limited,
)
from sfumato.types import Conditioning

FIXED: dict[str, Any] = {"patch_size": 1}
"""Fields of FluxTransformer2DModel that we stand for with one value only: there tokens are made
outside, here inside."""
_WAVES = 256  # sinusoidal features of time


@dataclass(frozen=True)
class FluxConfig:
    """The numbers of a FLUX.1 transformer, with diffusers' names and defaults (which are those of
    "schnell").

    in_channels, out_channels: of a token, four times the latent's; out_channels None: as
    in_channels. in_channels counts what `Conditioning.concat` joins: 384 for fill (16 + 16 + 64
    channels), 128 for depth and canny. joint_attention_dim, pooled_projection_dim: widths of text
    tokens (T5) and of the pooled text (CLIP). guidance_embeds: whether the strength of guidance is
    embedded. axes_dims_rope: numbers of a head turned by picture, row and column.
    """

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
        widths = (
            "in_channels",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "pooled_projection_dim",
        )
        layers = (("num_layers", 0), ("num_single_layers", 0))
        check_numbers(
            self,
            self.attention_head_dim,
            self.axes_dims_rope,
            3,
            *((name, 1) for name in widths),
            *layers,
        )
        for name in ("in_channels", "out_channels"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % 4):
                raise UserError(
                    f"config field {name}={value!r}: expected a multiple of 4, as a token is 2x2 cells of the latent"
                )

    @property
    def width(self) -> int:
        """Numbers of a token inside the network."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FluxConfig":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot
        honour, is refused.
        """
        return read_config(cls, values, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' FluxTransformer2DModel reads."""
        return {"_class_name": "FluxTransformer2DModel", **asdict(self), **FIXED}


class DoubleBlock(nn.Module):
    """Attention of both streams to both, and a feed-forward layer for each: picture (B, N, D), text
    (B, L, D) -> the same.
    """

    streams = 2  # it takes and gives two streams of tokens

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        width = heads * head_width
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(width, heads)
        self.ff, self.ff_context = FeedForward(width, "gelu"), FeedForward(width, "gelu")

    def forward(
        self,
        picture: Float[Tensor, "B N D"],
        text: Float[Tensor, "B L D"],
        time: Float[Tensor, "B D"],
        turn: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        shift, scale, gate, *feed = self.norm1(time)
        text_shift, text_scale, text_gate, *text_feed = self.norm1_context(time)

        # attention
        seen, read = self.attn(
            modulated(picture, scale, shift),
            modulated(text, text_scale, text_shift),
            mask,
            turn,
            count,
        )
        picture, text = gated(picture, gate, seen), gated(text, text_gate, read)

        # feed-forward
        return _fed(self.ff, picture, feed), limited(_fed(self.ff_context, text, text_feed))


def _fed(ff: nn.Module, x: Float[Tensor, "B N D"], steer: list[Tensor]) -> Float[Tensor, "B N D"]:
    """x and, gated, the feed-forward layer of its norm."""

    def fed(rows: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return gated(rows, gate, ff(modulated(rows, scale, shift)))

    return by_rows(fed, [x], *steer)


class SelfAttention(PictureAttention):
    """Tokens attend to all tokens, without a map behind: (B, S, D) -> (B, S, D)."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (batch_invariant.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_width), RMSNorm(head_width)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        turn: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        # (B, S, H, d)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.find(
            rope.rotate(self.norm_q(q), turn), rope.rotate(self.norm_k(k), turn), v, mask, count
        )


class SingleBlock(nn.Module):
    """Attention and a feed-forward layer side by side, with one map back for both: (B, S, D) -> (B,
    S, D).
    """

    streams = 1  # it takes and gives one stream of tokens

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
        time: Float[Tensor, "B D"],
        turn: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        shift, scale, gate = self.norm(time)
        y = modulated(x, scale, shift)
        return limited(by_rows(self._out, [x, y, self.attn(y, turn, mask, count)], gate))

    def _out(self, x: Tensor, y: Tensor, seen: Tensor, gate: Tensor) -> Tensor:
        inner = batch_invariant.gelu(self.proj_mlp(y), tanh=True)
        return gated(x, gate, self.proj_out(torch.cat([seen, inner], dim=-1)))


class FluxTransformer(Streams):
    """FLUX.1: see the module's docstring. Its latents are (B, 16, h, w), of any sides. With
    `references`, one picture (Kontext).
    """

    max_reference_images: ClassVar[float] = 1
    config: FluxConfig

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        width, heads, head_width = (
            config.width,
            config.num_attention_heads,
            config.attention_head_dim,
        )
        self.places = Places(config.axes_dims_rope, theta=10000.0, apart=1, line=False)
        self.time_text_embed = TimeEmbedding(
            width, _WAVES, config.pooled_projection_dim, config.guidance_embeds
        )
        self.context_embedder = batch_invariant.Linear(config.joint_attention_dim, width)
        self.x_embedder = batch_invariant.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(heads, head_width) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(heads, head_width) for _ in range(config.num_single_layers)
        )
        self.norm_out = OutNorm(width)
        self.proj_out = batch_invariant.Linear(width, config.out_channels or config.in_channels)

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """x noisy latent, timestep in 0..1000, conditioning -> y, the network's target."""
        if len(cond.references or ()) > 1:
            raise UserError(
                f"FLUX.1 reads one reference picture, got {len(cond.references or ())}: put them side by side in one"
            )
        return super().forward(x, timestep, cond)

    def embedding(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time, guidance and pooled text as one embedding."""
        return self.time_text_embed(timestep, vector, dtype)

    @classmethod
    def shape_fields(cls, config: Any, channels: int, side: int) -> dict[str, Any]:
        """A token is 2 x 2 cells; no field says the side."""
        return {"in_channels": 4 * channels, "out_channels": 4 * channels}

    @property
    def sample_size(self) -> int:
        """Cells of a picture of 1024 pixels, which the published models draw; no config says it."""
        return 128

    @property
    def vector_width(self) -> int:
        """The width of the pooled text that `Conditioning.vector` begins with."""
        return self.config.pooled_projection_dim

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token."""
        return 2


CLASSES = {"FluxTransformer2DModel": (FluxTransformer, FluxConfig)}
