"""Base of the KL and VQ autoencoders: a convolutional encoder and decoder.

Residual blocks at each resolution, halved between resolutions (factor = 2^(levels-1)),
self-attention at the lowest one and, where a config has it, after every residual block of a level
(Rombach et al. 2022, arXiv:2112.10752, appendix G.1; VQGAN, Esser et al. 2021, arXiv:2012.09841,
appendix A, table 7). Module names are diffusers'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import Posterior, SequentialAutoencoder
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import SpatialAttention
from sfumato.nn.blocks import Downsample, ResnetBlock, Upsample
from sfumato.validate import positive_int

_EPS = 1e-6
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass(frozen=True)
class Levels:
    """The numbers of an encoder or a decoder.

    Attributes:
        widths: Channels at each resolution, the image's first.
        depth: Residual blocks a level of the encoder; a decoder has one more.
        groups: Groups of the norms; divides every width.
        attention: For each width, whether its residual blocks are followed by self-attention.
        middle_attention: Whether there is self-attention between the two residual blocks at the
            lowest resolution.
    """

    widths: tuple[int, ...]
    depth: int
    groups: int
    attention: tuple[bool, ...]
    middle_attention: bool = True

    def __post_init__(self) -> None:
        if not 2 <= len(self.widths) <= 6:
            raise UserError(
                f"block_out_channels {self.widths} has {len(self.widths)} levels: 2 to 6 make "
                "factors 2 to 32"
            )
        positive_int("norm_num_groups", self.groups)
        for width in self.widths:
            if width % self.groups:
                raise UserError(
                    f"block_out_channels {width} is not a multiple of norm_num_groups "
                    f"{self.groups}: change one of them"
                )


class LevelFields:
    """Fields that configs of convolutional autoencoders share, and levels made of them."""

    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool

    def levels(self, widths: tuple[int, ...], attention: tuple[bool, ...]) -> Levels:
        """The numbers of an encoder or a decoder of these widths."""
        depth, groups = self.layers_per_block, self.norm_num_groups
        return Levels(widths, depth, groups, attention, self.mid_block_add_attention)


@dataclass(frozen=True)
class ConvAutoencoderConfig(LevelFields):
    """The numbers that configs of KL and VQ autoencoders share, with diffusers' names.

    `sample_size` and `force_upcast` are notes that other tools read.

    Attributes:
        in_channels: Channels of the image.
        out_channels: Channels of the decoded image.
        block_out_channels: Channels at each resolution, the image's first.
        layers_per_block: Residual blocks a level of the encoder; the decoder has one more.
        latent_channels: Channels of the latent.
        norm_num_groups: Groups of the norms.
        sample_size: Pixels along a side in training.
        mid_block_add_attention: Whether there is self-attention at the lowest resolution.
        down_block_types: diffusers' names of the encoder's levels; None: no level has attention.
        up_block_types: Those of the decoder, from the lowest resolution on.
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
        _ = self.encoder_levels, self.decoder_levels  # they refuse values that do not fit

    @property
    def encoder_levels(self) -> Levels:
        """The numbers of the encoder."""
        widths = self.block_out_channels
        attention = _attention("down_block_types", self.down_block_types, len(widths), _DOWN)
        return self.levels(widths, attention)

    @property
    def decoder_levels(self) -> Levels:
        """The numbers of the decoder."""
        widths = self.block_out_channels
        attention = _attention("up_block_types", self.up_block_types, len(widths), _UP)
        return self.levels(widths, attention[::-1])

    @property
    def factor(self) -> int:
        """Pixels along a side for one latent cell."""
        return 2 ** (len(self.block_out_channels) - 1)

    def fields(self) -> dict[str, Any]:
        """All numbers by their names, with block types spelled out as in files."""
        plain = block_types(len(self.block_out_channels))
        return asdict(self) | {name: getattr(self, name) or plain[name] for name in plain}


def without_plain_types(values: dict[str, Any]) -> dict[str, Any]:
    """A config without block types that mean no attention: equal networks have equal configs."""
    plain = block_types(len(values.get("block_out_channels", (64,))))
    return {k: v for k, v in values.items() if k not in plain or list(v or plain[k]) != plain[k]}


def block_types(levels: int) -> dict[str, list[str]]:
    """The block types of levels without attention, in files."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _attention(
    field: str, types: Sequence[str] | None, levels: int, kinds: dict[str, bool]
) -> tuple[bool, ...]:
    if types is None:
        return (False,) * levels
    if isinstance(types, str) or len(types) != levels or any(t not in kinds for t in types):
        raise UserError(
            f"config field {field}={types!r} is not supported: expected {levels} names, each "
            f"{' or '.join(kinds)}"
        )
    return tuple(kinds[t] for t in types)


def check_image(image: Tensor, channels: int, factor: int) -> None:
    """Raise `UserError` for an image of other channels, or with sides that are no whole cells.

    Args:
        image: (B, C, H, W).
        channels: Channels of the autoencoder.
        factor: Pixels along a side for one latent cell.
    """
    if image.shape[1] != channels or image.shape[2] % factor or image.shape[3] % factor:
        raise UserError(
            f"image of shape {tuple(image.shape)}: this autoencoder takes {channels} channels and "
            f"sides that are multiples of {factor}"
        )


class _Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, groups, _EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, channels, groups, _EPS)] if attention else []
        )

    def parts(self) -> list[nn.Module]:
        """The layers in the order in which they run."""
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class _Level(nn.Module):
    """Residual blocks at one resolution, and a step to the next one.

    Each block has attention behind it, or none. The last level has no step.
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
            ResnetBlock(channels if i else in_channels, channels, groups, _EPS)
            for i in range(depth)
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(channels, channels, groups, _EPS)
            for _ in range(depth if attention else 0)
        )
        self.downsamplers = nn.ModuleList([step] if isinstance(step, Downsample) else [])
        self.upsamplers = nn.ModuleList([step] if isinstance(step, Upsample) else [])

    def parts(self) -> list[nn.Module]:
        """The layers in the order in which they run."""
        blocks = [
            part
            for i, resnet in enumerate(self.resnets)
            for part in (resnet, *self.attentions[i : i + 1])
        ]
        return [*blocks, *self.downsamplers, *self.upsamplers]


class _Half(nn.Module):
    """An encoder or a decoder: layers in a row, with SiLU behind the last norm."""

    conv_in: nn.Module
    mid_block: _Middle
    conv_norm_out: nn.GroupNorm
    conv_out: batch_invariant.Conv2d

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        *parts, norm, conv_out = self.parts()
        for part in parts:
            x = part(x)
        return conv_out(batch_invariant.silu(norm(x)))

    def parts(self) -> list[nn.Module]:
        """The layers in the order in which they run; SiLU comes after the norm."""
        raise NotImplementedError


def _parts(levels: nn.ModuleList) -> list[nn.Module]:
    return [part for level in cast("Iterable[_Level]", levels) for part in level.parts()]


class Encoder(_Half):
    """Image (B, in_channels, H, W) in [-1, 1] -> (B, out_channels, h, w), of the latent."""

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

    def parts(self) -> list[nn.Module]:
        """The layers in the order in which they run; SiLU comes after the norm."""
        levels, middle = _parts(self.down_blocks), self.mid_block.parts()
        return [self.conv_in, *levels, *middle, self.conv_norm_out, self.conv_out]


class Decoder(_Half):
    """Latent (B, in_channels, h, w) -> image (B, out_channels, H, W), not clamped to [-1, 1]."""

    def __init__(self, in_channels: int, out_channels: int, levels: Levels):
        super().__init__()
        widths, attention = levels.widths[::-1], levels.attention[::-1]
        groups, last = levels.groups, len(levels.widths) - 1
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

    def parts(self) -> list[nn.Module]:
        """The layers in the order in which they run; SiLU comes after the norm."""
        levels, middle = _parts(self.up_blocks), self.mid_block.parts()
        return [self.conv_in, *middle, *levels, self.conv_norm_out, self.conv_out]


class ConvAutoencoder(SequentialAutoencoder):
    """Base of KL and VQ autoencoders.

    Encoder and decoder have a 1x1 convolution at the latent's side each, or None. The decoder takes
    the latent of `to_cells`, and `to_posterior` takes the encoder's output.
    """

    encoder: Encoder
    decoder: Decoder
    quant_conv: batch_invariant.Conv2d | None
    post_quant_conv: batch_invariant.Conv2d | None

    def posterior(self, image: Float[Tensor, "B C H W"]) -> Posterior:
        """The distribution of raw latents; `UserError` for an image that does not fit."""
        check_image(image, self.channels, self.config.factor)
        encoded = self.encoder(image)
        return self.to_posterior(encoded if self.quant_conv is None else self.quant_conv(encoded))

    def reconstruct(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The image of a raw latent, not clamped."""
        return self.from_cells(self.to_cells(raw))

    def from_cells(self, cells: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C H W"]:
        """The image, not clamped, of the output of `to_cells`."""
        return self.decoder(cells if self.post_quant_conv is None else self.post_quant_conv(cells))

    def encoder_parts(self) -> list[nn.Module]:
        """The encoder's layers, with its 1x1 convolution."""
        return [*self.encoder.parts(), *([] if self.quant_conv is None else [self.quant_conv])]

    def decoder_parts(self) -> list[nn.Module]:
        """The decoder's layers, with its 1x1 convolution."""
        first = [] if self.post_quant_conv is None else [self.post_quant_conv]
        return [*first, *self.decoder.parts()]
