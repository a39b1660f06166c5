"""The U-Net without tokens: unconditional Latent Diffusion.

Rombach et al. 2022, arXiv:2112.10752, appendix E.1, table 12.

It is the U-Net of `unet.py` with self-attention alone, in the middle too (Dhariwal & Nichol 2021,
arXiv:2105.05233, section 3). The config is diffusers' UNet2DModel, which has the same names of
weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from sfumato.errors import UserError
from sfumato.predict.networks.unet import UNet, UNetConfig

OWN_CLASS = "SfumatoUNet2DModel"
"""The class with `num_attention_heads`, a field that diffusers' UNet2DModel would ignore."""
_SHARED = (
    "sample_size in_channels out_channels flip_sin_to_cos freq_shift down_block_types "
    "mid_block_type up_block_types block_out_channels layers_per_block downsample_padding dropout "
    "norm_num_groups norm_eps resnet_time_scale_shift class_embed_type num_class_embeds "
    "time_embedding_dim attention_head_dim"
).split()
"""Fields of UNet2DModel with the meaning of UNet2DConditionModel's."""
_OWN = (
    "add_attention downsample_type upsample_type attn_norm_num_groups num_train_timesteps"
).split()


@dataclass(frozen=True)
class UNet2DConfig(UNetConfig):
    """The numbers of a U-Net without tokens, with diffusers' names and defaults.

    Attributes:
        attention_head_dim: Width of a head in every attention; None: one head.
        add_attention: Whether the middle block has attention.
        downsample_type: "conv" or "resnet", of blocks with attention; for others it is in the name
            ("DownBlock2D", "ResnetDownsampleBlock2D").
        upsample_type: As downsample_type.
        attn_norm_num_groups: Of the norm of the middle's attention; None: `norm_num_groups`, or
            with "scale_shift" no norm at all, which is not supported.
        num_train_timesteps: Kept for the file's sake.
        num_attention_heads: Number of heads in place of their width (sfumato's own field).
    """

    class_name: ClassVar[str] = "UNet2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
    }

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    attention_head_dim: int | None = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    add_attention: bool = True
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    num_train_timesteps: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attends_to_tokens:
            raise UserError(
                f"block types {self.down_block_types}, {self.mid_block_type}: a U-Net without "
                "tokens has no cross-attention"
            )
        self.check_choice("downsample_type", "conv", "resnet")
        self.check_choice("upsample_type", "conv", "resnet")
        shared = self.norm_num_groups if self.resnet_time_scale_shift == "default" else None
        groups, attends = self.attn_norm_num_groups or shared, self.attention("UNetMidBlock2D")
        if self.mid_block_type is not None and attends and groups != self.norm_num_groups:
            raise UserError(
                f"attn_norm_num_groups {self.attn_norm_num_groups} with resnet_time_scale_shift "
                f"{self.resnet_time_scale_shift!r} and norm_num_groups {self.norm_num_groups}: "
                "attention in the middle is supported with the norm of the other blocks only"
            )
        if self.num_attention_heads is not None and self.attention_head_dim is not None:
            raise UserError(
                f"attention_head_dim {self.attention_head_dim} beside num_attention_heads "
                f"{self.num_attention_heads}: set one of them to null"
            )
        self._check_heads()

    def _check_heads(self) -> None:
        """Raise `UserError` where a width does not divide into heads."""
        name = "attention_head_dim" if self.num_attention_heads is None else "num_attention_heads"
        divisor, last = getattr(self, name), len(self.block_out_channels) - 1
        for level, width in enumerate(self.block_out_channels):
            kinds = [self.down_block_types[level], self.up_block_types[last - level]]
            kinds += [self.mid_block_type or ""] if level == last else []
            attends = any(self.attention(kind) for kind in kinds)
            if attends and divisor is not None and (divisor < 1 or width % divisor):
                raise UserError(
                    f"block_out_channels {width} does not divide by {name} {divisor}: change one "
                    "of them"
                )

    def attention(self, kind: str) -> str | None:
        """As in `UNetConfig`, with self-attention in the middle block."""
        if kind == "UNetMidBlock2D":
            return "self" if self.add_attention else None
        return super().attention(kind)

    def head_width(self, level: int, position: int) -> int:
        """Width of a head, by the number of heads where that is given."""
        width = self.block_out_channels[level]
        if self.num_attention_heads:
            return width // self.num_attention_heads
        return self.attention_head_dim or width

    def steps_by_block(self, kind: str) -> bool:
        """True where blocks of a kind resample by a residual block: see the class."""
        own = {"AttnDownBlock2D": self.downsample_type, "AttnUpBlock2D": self.upsample_type}
        return own.get(kind) == "resnet" or super().steps_by_block(kind)

    @property
    def middle_resnets(self) -> int:
        """Number of residual blocks in the middle block, with attention between them or not."""
        return 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a UNet2DModel's config; `UserError` for unknown fields and unsupported values."""
        allowed = {*_SHARED, *_OWN}
        if values.get("_class_name") == OWN_CLASS:
            allowed.add("num_attention_heads")
        for name in sorted({f.name for f in fields(cls)} & values.keys() - allowed):
            raise UserError(
                f"config field {name}={values[name]!r} is not known to UNet2DModel: it might "
                "change the result, so it is refused"
            )
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' UNet2DModel reads; with `num_attention_heads` sfumato's own."""
        values = asdict(self)
        kept = {**{name: values[name] for name in (*_SHARED, *_OWN)}, **self.fixed}
        if self.num_attention_heads is None:
            return {"_class_name": self.class_name, **kept}
        return {"_class_name": OWN_CLASS, **kept, "num_attention_heads": self.num_attention_heads}


CLASSES = {"UNet2DModel": (UNet, UNet2DConfig), OWN_CLASS: (UNet, UNet2DConfig)}
