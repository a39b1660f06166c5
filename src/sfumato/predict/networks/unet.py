"""U-Net with cross-attention: the network of Stable Diffusion.

Rombach et al. 2022, arXiv:2112.10752, section 3.3, appendix E.2.

y = U(x, t, conditioning): residual blocks with a time embedding at each resolution, transformer
blocks that attend to tokens, skips from the way down to the way up. Module names and config are
diffusers' UNet2DConditionModel.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import SpatialAttention, SpatialTransformer
from sfumato.nn.blocks import Downsample, ResnetBlock, Upsample
from sfumato.nn.embeddings import TimestepEmbedding, guidance_features, sinusoidal
from sfumato.predict.networks.base import Network, NetworkConfig
from sfumato.types import Conditioning

_KINDS = (
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnUpBlock2D",
    "DownBlock2D",
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
    "UpBlock2D",
)

FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
"""Fields of UNet2DConditionModel of which one value is supported."""


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The numbers of a U-Net, with diffusers' names and defaults.

    attention_head_dim is, as in diffusers, the number of heads of cross-attention blocks and the
    width of a head of self-attention blocks ("AttnDownBlock2D"). Of several numbers, one a level,
    the k-th is also for the k-th self-attention block on the way up: there diffusers does not
    reverse them as it does for everything else.

    only_cross_attention (one value, or one a level): the first attention of blocks is to the tokens
    as well (the x4 upscaler), but for the middle block. mid_block_only_cross_attention is kept for
    the file's sake: in diffusers it belongs to other kinds of middle block.

    addition_embed_type "text_time" (SDXL): `Conditioning.vector` is a pooled text and after it
    numbers such as sizes in pixels, each of which becomes `addition_time_embed_dim` sinusoidal
    features; together they are `projection_class_embeddings_input_dim` wide.

    time_cond_proj_dim (latent consistency models): the last number of `Conditioning.vector` is the
    guidance scale, whose `guidance_features` of this width join the timestep's.

    upcast_attention is kept for the file's sake: attention sums in float32 in every dtype, as
    torch's fused kernels do.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[Mapping[str, Any]] = FIXED

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    only_cross_attention: bool | tuple[bool, ...] = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        n = len(self.block_out_channels)
        if len(self.down_block_types) != n or len(self.up_block_types) != n:
            raise UserError(
                f"a U-Net of {n} block_out_channels needs {n} down_block_types and {n} "
                f"up_block_types, got {len(self.down_block_types)} and {len(self.up_block_types)}"
            )
        for kind in (*self.down_block_types, *self.up_block_types):
            if kind not in _KINDS:
                raise UserError(
                    f"block type {kind!r} is not supported: expected one of {', '.join(_KINDS)}"
                )
        self.check_choice("mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
        self.check_choice("resnet_time_scale_shift", "default", "scale_shift")
        projections = ("projection", "simple_projection")
        self.check_choice("class_embed_type", None, "timestep", "identity", *projections)
        self.check_choice("addition_embed_type", None, "text_time")
        width = self.projection_class_embeddings_input_dim
        if self.addition_embed_type and not (self.addition_time_embed_dim and width):
            raise UserError(
                "addition_embed_type 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim: set both"
            )
        if self.class_embed_type in projections and not width:
            raise UserError(
                f"class_embed_type {self.class_embed_type!r} needs "
                "projection_class_embeddings_input_dim: set it"
            )
        if self.addition_embed_type and (self.class_embed_type or self.num_class_embeds):
            raise UserError(
                "class embeddings beside addition_embed_type are not supported: both would be read "
                "from one vector"
            )
        if self.time_cond_proj_dim is not None:
            self.check_counts("time_cond_proj_dim", at_least=4)
        only = self.only_cross_attention
        if not isinstance(only, bool) and len(only) != n:
            raise UserError(
                f"only_cross_attention {only}: expected one value, or one for each of {n} levels"
            )
        self.check_counts("norm_num_groups")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels {width} is not a multiple of norm_num_groups "
                    f"{self.norm_num_groups}: change one of them"
                )

    def at(self, field: str, level: int) -> Any:
        """The value at a level of a field with one value for all levels or one a level."""
        value = getattr(self, field)
        return value[level] if isinstance(value, tuple) else value

    def attention(self, kind: str) -> str | None:
        """The attention in blocks of a kind: "cross" (to tokens), "self" (in the map) or None."""
        if "CrossAttn" in kind:
            return "cross"
        return "self" if "Attn" in kind else None

    def head_width(self, level: int, position: int) -> int:
        """Width of a head of self-attention. position: of the block on its way, down or up."""
        return self.at("attention_head_dim", position)

    def steps_by_block(self, kind: str) -> bool:
        """True where blocks of a kind resample by a residual block, not by a convolution."""
        return kind.startswith("Resnet")

    @property
    def time_width(self) -> int:
        """Channels of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def middle_resnets(self) -> int:
        """Number of residual blocks in the middle block, if there is one."""
        return 1 if self.mid_block_type == "UNetMidBlock2D" else 2

    @property
    def attends_to_tokens(self) -> bool:
        """True where any block has cross-attention, which needs `Conditioning.tokens`."""
        kinds = (*self.down_block_types, *self.up_block_types, self.mid_block_type or "")
        return any("CrossAttn" in kind for kind in kinds)


class _Block(nn.Module):
    """Residual blocks at one resolution, each with its attention.

    Every output on the way down is a skip of the way up. `position` counts the blocks on the way
    up, from the lowest resolution.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        kind: str,
        widths: list[tuple[int, int]],
        step: str | None,
        position: int | None = None,
    ):
        super().__init__()
        channels, heads = config.block_out_channels[level], config.at("attention_head_dim", level)
        groups, eps = config.norm_num_groups, config.norm_eps
        time = config.time_width, config.resnet_time_scale_shift == "scale_shift", config.dropout
        self.resnets = nn.ModuleList(ResnetBlock(i, o, groups, eps, *time) for i, o in widths)
        self.kind = config.attention(kind)
        count = len(widths) if step != "middle" else len(widths) - 1
        if self.kind == "cross":
            depth = config.at("transformer_layers_per_block", level)
            context = config.at("cross_attention_dim", level)
            only = step != "middle" and config.at("only_cross_attention", level)
            linear = config.use_linear_projection
            self.attentions = nn.ModuleList(
                SpatialTransformer(
                    channels, heads, channels // heads, depth, context, groups, linear, only
                )
                for _ in range(count)
            )
        elif self.kind == "self":
            head_width = config.head_width(level, level if position is None else position)
            self.attentions = nn.ModuleList(
                SpatialAttention(channels, head_width, groups, eps) for _ in range(count)
            )
        resamplers: list[nn.Module] = []
        if step in ("down", "up"):
            if config.steps_by_block(kind):
                resamplers.append(ResnetBlock(channels, channels, groups, eps, *time, step))
            elif step == "down":
                resamplers.append(Downsample(channels, config.downsample_padding))
            else:
                resamplers.append(Upsample(channels))
        self.downsamplers = nn.ModuleList(resamplers if step == "down" else ())
        self.upsamplers = nn.ModuleList(resamplers if step == "up" else ())

    def attend(
        self, i: int, x: Float[Tensor, "B C H W"], cond: Conditioning
    ) -> Float[Tensor, "B C H W"]:
        """The i-th attention of this block, if it has any."""
        if self.kind == "cross":
            return self.attentions[i](x, cond.tokens, cond.mask)
        return self.attentions[i](x) if self.kind == "self" else x

    def downsample(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B C h w"]:
        """The map at half the size."""
        (step,) = self.downsamplers
        return step(x, time) if isinstance(step, ResnetBlock) else step(x)

    def upsample(
        self, x: Float[Tensor, "B C h w"], time: Float[Tensor, "B T"], size: torch.Size
    ) -> Float[Tensor, "B C H W"]:
        """The map at the next level's size; unchanged where there is no next level."""
        for step in self.upsamplers:
            x = step(x, time, size) if isinstance(step, ResnetBlock) else step(x, size)
        return x


def _add_residuals(skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Skips with a ControlNet's residuals (Zhang et al. 2023, arXiv:2302.05543).

    One a skip, and the last for the middle.
    """
    expected, shapes = [s.shape for s in skips], [r.shape for r in residuals]
    if expected != shapes:
        raise UserError(
            f"residuals of shapes {[*map(tuple, shapes)]} do not fit this U-Net: expected "
            f"{[*map(tuple, expected)]}"
        )
    return [s + r for s, r in zip(skips, residuals, strict=True)]


class UNet(Network):
    """The U-Net: see the module's docstring.

    Built from a `UNetConfig`; weights are random until loaded. `forward` runs the way down, the
    middle and the way up: `shallow_down`, `deep` and `shallow_up`.
    """

    part = "unet"
    text_width_fields = ("cross_attention_dim",)
    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, time_width = config.block_out_channels, config.time_width
        last = len(widths) - 1
        self.conv_in = batch_invariant.Conv2d(config.in_channels, widths[0], 3, padding=1)
        cond_width = config.time_cond_proj_dim
        self.time_embedding = TimestepEmbedding(widths[0], time_width, cond_width=cond_width)
        vector_width = config.projection_class_embeddings_input_dim or 0
        if config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(vector_width, time_width)
        elif config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(widths[0], time_width)
        elif config.class_embed_type == "simple_projection":
            self.class_embedding = batch_invariant.Linear(vector_width, time_width)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_width)
        else:
            self.class_embedding = None
        if config.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(vector_width, time_width)

        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(config.down_block_types):
            width, count = widths[level], config.at("layers_per_block", level)
            pairs = [(width if i else skips[-1], width) for i in range(count)]
            step = "down" if level < last else None
            self.down_blocks.append(_Block(config, level, kind, pairs, step))
            skips += [width] * (count + (level < last))

        self.mid_block, below = None, widths[-1]
        if config.mid_block_type is not None:
            pairs = [(below, below)] * config.middle_resnets
            self.mid_block = _Block(config, last, config.mid_block_type, pairs, "middle")

        self.up_blocks = nn.ModuleList()
        for position, kind in enumerate(config.up_block_types):
            level = last - position
            pairs = []
            for _ in range(config.at("layers_per_block", level) + 1):
                pairs.append((below + skips.pop(), widths[level]))
                below = widths[level]
            step = "up" if level > 0 else None
            self.up_blocks.append(_Block(config, level, kind, pairs, step, position))
        self.conv_norm_out = batch_invariant.GroupNorm(
            config.norm_num_groups, widths[0], config.norm_eps
        )
        self.conv_out = batch_invariant.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def embed(
        self, timestep: Float[Tensor, " B"], cond: Conditioning, dtype: torch.dtype
    ) -> Float[Tensor, "B T"]:
        """The activated embedding of time and vector, an input of all residual blocks."""
        return batch_invariant.silu(self._embedding(timestep, cond, dtype))

    def _embedding(
        self, timestep: Float[Tensor, " B"], cond: Conditioning, dtype: torch.dtype
    ) -> Float[Tensor, "B T"]:
        """Time and `Conditioning.vector` as one embedding.

        The vector holds class weights, features, or a pooled text and sizes; behind these the
        guidance scale.
        """
        c, vector, guidance = self.config, cond.vector, None
        if c.time_cond_proj_dim is not None:
            if vector is None:
                raise UserError(
                    "this U-Net is guidance-distilled: Conditioning.vector (B, V), whose last "
                    "number is the guidance scale, is missing"
                )
            guidance = guidance_features(vector[:, -1], c.time_cond_proj_dim).to(dtype)
            vector = vector[:, :-1]
        width = c.block_out_channels[0]
        time = self.time_embedding(self._sinusoidal(timestep, width).to(dtype), guidance)
        if self.class_embedding is None and c.addition_embed_type is None:
            return time
        if vector is None:
            kind = "conditioned on a pooled text and sizes"
            kind = "class-conditional" if c.addition_embed_type is None else kind
            raise UserError(f"this U-Net is {kind}: Conditioning.vector (B, V) is missing")
        if c.addition_embed_type is not None:
            return time + self.add_embedding(self._text_and_sizes(vector).to(dtype))
        table = cast("nn.Module", self.class_embedding)
        if isinstance(table, nn.Embedding):
            return time + batch_invariant.linear(vector.to(dtype), table.weight.to(dtype).T)
        if c.class_embed_type == "timestep":
            return time + table(self._sinusoidal(vector[:, 0], width).to(dtype))
        return time + table(vector.to(dtype))

    def _sinusoidal(self, numbers: Float[Tensor, " B"], width: int) -> Float[Tensor, "B D"]:
        return sinusoidal(numbers, width, self.config.flip_sin_to_cos, self.config.freq_shift)

    def _text_and_sizes(self, vector: Float[Tensor, "B V"]) -> Float[Tensor, "B P"]:
        """(text, n numbers) -> (text, n * A features), where n follows from P = V - n + n A.

        SDXL (Podell et al. 2023, arXiv:2307.01952, section 2.2).
        """
        total = self.config.projection_class_embeddings_input_dim or 0
        each = self.config.addition_time_embed_dim or 0
        count, rest = divmod(total - vector.shape[1], each - 1)
        if rest or not 0 <= count <= vector.shape[1]:
            raise UserError(
                f"a conditioning vector of {vector.shape[1]} numbers: with features of width "
                f"{each} for sizes they cannot be made {total}; use the text encoders and settings "
                "of this model"
            )
        text, numbers = vector.split([vector.shape[1] - count, count], dim=1)
        sizes = self._sinusoidal(numbers.flatten(), each).unflatten(0, numbers.shape).flatten(1)
        return torch.cat([text, sizes], dim=1)

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The network's target and, behind it, a learned variance.

        Args:
            x: Noisy latent.
            timestep: In 0..1000.
            cond: `tokens` with `mask`, `vector` and `concat`, where the network has these;
                `residuals` are a ControlNet's.

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        skips, time = self.shallow_down(x, timestep, cond, 1)
        return self.shallow_up(self.deep(skips[-1], time, cond, 1), skips, time, cond)

    # A pass in three parts, split at the `count`-th skip: the part below can be cached, as in
    # wrappers/feature_cache.py.

    def shallow_down(
        self,
        x: Float[Tensor, "B C h w"],
        timestep: Float[Tensor, " B"],
        cond: Conditioning,
        count: int,
    ) -> tuple[list[Tensor], Float[Tensor, "B T"]]:
        """The way down to the `count`-th skip (the first is conv_in's).

        Returns:
            Those skips, and the activated time embedding.
        """
        x = self.join_concat(x, cond)
        if self.config.attends_to_tokens and cond.tokens is None:
            raise UserError(
                f"this U-Net attends to tokens of width {self.config.cross_attention_dim}: "
                "Conditioning.tokens (B, L, D) is missing"
            )
        if not 1 <= count <= len(self._way_up()):
            raise UserError(
                f"{count} skips: expected from 1 to {len(self._way_up())}, which is how many this "
                "U-Net has"
            )
        time = self.embed(timestep, cond, x.dtype)
        return self._descend(self.conv_in(x), self._way_down()[: count - 1], time, cond), time

    def deep(
        self,
        x: Float[Tensor, "B E k l"],
        time: Float[Tensor, "B T"],
        cond: Conditioning,
        count: int,
    ) -> Float[Tensor, "B G k l"]:
        """From the `count`-th skip x down, through the middle, and up to where it is taken."""
        _, *skips = reached = self._descend(x, self._way_down()[count - 1 :], time, cond)
        low = reached[-1]
        if self.mid_block is not None:
            low = self.mid_block.resnets[0](low, time)
            for i, resnet in enumerate(self.mid_block.resnets[1:]):
                low = resnet(self.mid_block.attend(i, low, cond), time)
        if cond.residuals:
            *skips, low = _add_residuals([*skips, low], cond.residuals[count:])
        return self._ascend(low, skips, self._way_up()[:-count], time, cond, x.shape[2:])

    def shallow_up(
        self,
        x: Float[Tensor, "B G k l"],
        skips: list[Tensor],
        time: Float[Tensor, "B T"],
        cond: Conditioning,
    ) -> Float[Tensor, "B D h w"]:
        """The rest of the way up, from the outputs of `deep` and `shallow_down`."""
        if cond.residuals:
            skips = _add_residuals(skips, cond.residuals[: len(skips)])
        x = self._ascend(x, skips, self._way_up()[-len(skips) :], time, cond, skips[0].shape[2:])
        return self.conv_out(batch_invariant.silu(self.conv_norm_out(x)))

    def _way_down(self) -> list[tuple[_Block, int | None]]:
        """The source of each skip after conv_in's.

        (block, index of its residual block), or (block, None) for its downsampler.
        """
        steps: list[tuple[_Block, int | None]] = []
        for block in cast("Iterable[_Block]", self.down_blocks):
            steps += [(block, i) for i in range(len(block.resnets))]
            steps += [(block, None) for _ in block.downsamplers]
        return steps

    def _way_up(self) -> list[tuple[_Block, int]]:
        """The target of each skip, the last skip first: (block, index of its residual block)."""
        return [
            (block, i)
            for block in cast("Iterable[_Block]", self.up_blocks)
            for i in range(len(block.resnets))
        ]

    def _descend(
        self, x: Tensor, steps: list[tuple[_Block, int | None]], time: Tensor, cond: Conditioning
    ) -> list[Tensor]:
        """The input and the output of each step in turn."""
        skips = [x]
        for block, i in steps:
            if i is None:
                x = block.downsample(x, time)
            else:
                x = block.attend(i, block.resnets[i](x, time), cond)
            skips.append(x)
        return skips

    def _ascend(
        self,
        x: Tensor,
        skips: list[Tensor],
        steps: list[tuple[_Block, int]],
        time: Tensor,
        cond: Conditioning,
        size: torch.Size,
    ) -> Tensor:
        """Apply steps that take the skips, the last skip first. size: of the skip after those."""
        left = list(skips)
        for block, i in steps:
            x = block.attend(i, block.resnets[i](torch.cat([x, left.pop()], dim=1), time), cond)
            if i == len(block.resnets) - 1:
                x = block.upsample(x, time, left[-1].shape[2:] if left else size)
        return x

    @property
    def learned_variance(self) -> bool:
        """True where a variance follows the target: the output has twice the channels."""
        return self.config.out_channels == 2 * self.config.in_channels

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return self.config.in_channels if self.learned_variance else self.config.out_channels

    @property
    def token_width(self) -> int | tuple[int, ...] | None:
        """Channels of `Conditioning.tokens`, one for all levels or one a level; None: no tokens."""
        return self.config.cross_attention_dim if self.config.attends_to_tokens else None

    @property
    def guidance_embeds(self) -> bool:
        """True for latent consistency models with a guidance scale."""
        return self.config.time_cond_proj_dim is not None

    @property
    def is_conditional(self) -> bool:
        """True where it is conditioned on tokens, classes or a vector."""
        return super().is_conditional or self.config.class_embed_type is not None

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """Fields for `count` classes: a row for each, and one for no class."""
        return {"num_class_embeds": count + 1}

    @property
    def classes(self) -> int:
        """Rows of the table of classes, one of them for no class; 0: no classes."""
        return (self.config.num_class_embeds or 0) if self.config.class_embed_type is None else 0


CLASSES = {"UNet2DConditionModel": (UNet, UNetConfig)}
