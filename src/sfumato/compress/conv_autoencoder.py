"""The two halves that KL and VQ autoencoders share: an encoder that halves the image level by
level, and a decoder that doubles it back.

Residual blocks at each resolution, halved between resolutions (factor = 2^(levels-1)),
self-attention at the lowest one and, where a config says so, after every residual block of a level
(Rombach et al. 2022, arXiv:2112.10752, appendix G.1; VQGAN, Esser et al. 2021, arXiv:2012.09841,
appendix A, table 7). Module names are diffusers'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import InParts, Posterior
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import SpatialAttention
from sfumato.nn.blocks import Downsample, ResnetBlock, Upsample

_EPS = 1e-6
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass(frozen=True)
class Levels:
    """The numbers of one half.

    widths            channels at each resolution, the image's first
    depth             residual blocks a level of the encoder; a decoder has one more
    groups            of the group norms; divides every width
    attention         for each width, whether its residual blocks are followed by self-attention
    middle_attention  whether there is self-attention between the two residual blocks at the lowest
                      resolution
    """

    widths: tuple[int, ...]
    depth: int
    groups: int
    attention: tuple[bool, ...]
    middle_attention: bool = True

    def __post_init__(self) -> None:
        if not 2 <= len(self.widths) <= 6:
            raise UserError(
                f"block_out_channels {self.widths} has {len(self.widths)} levels: 2 to 6 make factors 2 to 32"
            )
        for width in self.widths:
            if width % self.groups:
                raise UserError(
                    f"block_out_channels {width} is not a multiple of norm_num_groups {self.groups}: change one of them"
                )


@dataclass(frozen=True)
class HalvesConfig:
    """The numbers that configs of KL and VQ autoencoders share, with diffusers' names.

    `down_block_types` and `up_block_types` (from the lowest resolution on): None for levels without
    attention, otherwise diffusers' names. `sample_size` and `force_upcast` are notes that other
    tools read.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 256
    mid_block_add_attention: bool = True
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _ = self.encoder_levels, self.decoder_levels  # they refuse what does not fit

    @property
    def encoder_levels(self) -> Levels:
        """The numbers of the encoder."""
        return self._levels(
            _attention(
                "down_block_types", self.down_block_types, len(self.block_out_channels), _DOWN
            )
        )

    @property
    def decoder_levels(self) -> Levels:
        """The numbers of the decoder."""
        return self._levels(
            _attention("up_block_types", self.up_block_types, len(self.block_out_channels), _UP)[
                ::-1
            ]
        )

    def _levels(self, attention: tuple[bool, ...]) -> Levels:
        return Levels(
            self.block_out_channels,
            self.layers_per_block,
            self.norm_num_groups,
            attention,
            self.mid_block_add_attention,
        )

    @property
    def factor(self) -> int:
        """Pixels along a side for one latent cell."""
        return 2 ** (len(self.block_out_channels) - 1)

    def fields(self) -> dict[str, Any]:
        """All numbers by their names, block types spelled out as configs do."""
        plain = block_types(len(self.block_out_channels))
        return {
            **asdict(self),
            **{name: getattr(self, name) or types for name, types in plain.items()},
        }


def plain_types_left_out(values: dict[str, Any]) -> dict[str, Any]:
    """A config without the block types that say no more than that no level has attention, so that
    equal networks have equal configs.
    """
    plain = block_types(len(values.get("block_out_channels", (64,))))
    return {k: v for k, v in values.items() if k not in plain or list(v or plain[k]) != plain[k]}


def block_types(levels: int) -> dict[str, list[str]]:
    """What configs write for levels without attention."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _attention(
    field: str, types: Sequence[str] | None, levels: int, known: dict[str, bool]
) -> tuple[bool, ...]:
    if types is None:
        return (False,) * levels
    if isinstance(types, str) or len(types) != levels or any(t not in known for t in types):
        raise UserError(
            f"config field {field}={types!r} is not supported: expected {levels} names, each {' or '.join(known)}"
        )
    return tuple(known[t] for t in types)


def check_image(image: Tensor, channels: int, factor: int) -> None:
    """`UserError` for an image (B, C, H, W) of other channels, or with a side that does not divide
    into latent cells.
    """
    if image.shape[1] != channels or image.shape[2] % factor or image.shape[3] % factor:
        raise UserError(
            f"image of shape {tuple(image.shape)}: this autoencoder takes {channels} channels and sides that are multiples of {factor}"
        )


class _Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution: (B, C, h, w) -> (B, C,
    h, w).
    """

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, groups, _EPS) for _ in range(2)]
        )
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, channels, groups, _EPS)] if attention else []
        )

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        for part in self.parts():
            x = part(x)
        return x

    def parts(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class _Level(nn.Module):
    """Residual blocks at one resolution, each with attention or none, then (except at the last
    level) a step to the next one.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        groups: int,
        attention: bool,
        step: Downsample | Upsample | None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                ResnetBlock(in_channels if i == 0 else channels, channels, groups, _EPS)
                for i in range(depth)
            ]
        )
        if attention:
            self.attentions = nn.ModuleList(
                [SpatialAttention(channels, channels, groups, _EPS) for _ in range(depth)]
            )
        if step is not None:
            self.add_module(
                "downsamplers" if isinstance(step, Downsample) else "upsamplers",
                nn.ModuleList([step]),
            )
        self.attention = attention
        # a plain list: the module is registered under its own name above
        self.step = [step] if step is not None else []

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        for part in self.parts():
            x = part(x)
        return x

    def parts(self) -> list[nn.Module]:
        """In the order in which they run."""
        blocks = (
            zip(self.resnets, self.attentions, strict=True)
            if self.attention
            else ((resnet,) for resnet in self.resnets)
        )
        return [*chain.from_iterable(blocks), *self.step]


class Encoder(nn.Module):
    """image (B, in_channels, H, W) in [-1, 1] -> (B, out_channels, h, w), what the latent is made
    of.
    """

    def __init__(self, in_channels: int, out_channels: int, levels: Levels):
        super().__init__()
        widths, groups, last = levels.widths, levels.groups, len(levels.widths) - 1
        self.conv_in = batch_invariant.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)],
                w,
                levels.depth,
                groups,
                levels.attention[i],
                Downsample(w, 0) if i < last else None,
            )
            for i, w in enumerate(widths)
        )
        self.mid_block = _Middle(widths[-1], groups, levels.middle_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = batch_invariant.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(batch_invariant.silu(self.conv_norm_out(self.mid_block(x))))

    def parts(self) -> list[nn.Module]:
        """In the order in which they run; SiLU comes after the norm."""
        levels = [
            part for block in cast("Iterable[_Level]", self.down_blocks) for part in block.parts()
        ]
        return [self.conv_in, *levels, *self.mid_block.parts(), self.conv_norm_out, self.conv_out]


class Decoder(nn.Module):
    """Latent (B, in_channels, h, w) -> image (B, out_channels, H, W), about [-1, 1], not
    clamped.
    """

    def __init__(self, in_channels: int, out_channels: int, levels: Levels):
        super().__init__()
        widths, attention, groups, last = (
            levels.widths[::-1],
            levels.attention[::-1],
            levels.groups,
            len(levels.widths) - 1,
        )
        self.conv_in = batch_invariant.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups, levels.middle_attention)
        self.up_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)],
                w,
                levels.depth + 1,
                groups,
                attention[i],
                Upsample(w) if i < last else None,
            )
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = batch_invariant.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, latent: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        x = self.mid_block(self.conv_in(latent))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(batch_invariant.silu(self.conv_norm_out(x)))

    def parts(self) -> list[nn.Module]:
        """In the order in which they run; SiLU comes after the norm."""
        levels = [
            part for block in cast("Iterable[_Level]", self.up_blocks) for part in block.parts()
        ]
        return [self.conv_in, *self.mid_block.parts(), *levels, self.conv_norm_out, self.conv_out]


class Halved(InParts):
    """What KL and VQ autoencoders have in common: an encoder and a decoder, with a 1x1 convolution
    at the latent's side of each, or None.

    The halves' parts see what `to_cells` makes of a raw latent, and `to_posterior` is given what
    the encoder's side ends with.
    """

    config: Any  # with `factor`, the pixels along a side for one latent cell
    encoder: Encoder
    decoder: Decoder
    quant_conv: batch_invariant.Conv2d | None
    post_quant_conv: batch_invariant.Conv2d | None

    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        check_image(image, self.channels, self.config.factor)
        made = self.encoder(image)
        return self.to_posterior(made if self.quant_conv is None else self.quant_conv(made))

    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return self.from_cells(self.to_cells(raw))

    def from_cells(self, cells: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C H W"]:
        """What `to_cells` made -> image, not clamped."""
        return self.decoder(cells if self.post_quant_conv is None else self.post_quant_conv(cells))

    def encoder_parts(self) -> list[nn.Module]:
        return [*self.encoder.parts(), *([] if self.quant_conv is None else [self.quant_conv])]

    def decoder_parts(self) -> list[nn.Module]:
        return [
            *([] if self.post_quant_conv is None else [self.post_quant_conv]),
            *self.decoder.parts(),
        ]
