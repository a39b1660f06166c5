"""Network: (x, timestep, conditioning) -> y, the base class, and the registry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.registry import module_of, names
from sfumato.types import Conditioning
from sfumato.validate import whole_number

SINUSOIDAL_WIDTH = 256
"""Sinusoidal features of a timestep, or of a size, in most transformers."""


@dataclass(frozen=True)
class NetworkConfig:
    """The numbers of a network, read from and written to config.json.

    Attributes:
        class_name: "_class_name" of config.json.
        fixed: Fields of that class with the one value that is supported.
        legacy: Fields of older classes that are read in the same way, and not written.
    """

    class_name: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = {}
    legacy: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read config.json; `UserError` for unknown fields and unsupported values."""
        return read_config(cls, values, {**cls.legacy, **cls.fixed})

    def to_dict(self) -> dict[str, Any]:
        """The JSON of config.json."""
        return {"_class_name": self.class_name, **asdict(self), **self.fixed}

    def check_counts(self, fields: str, at_least: int = 1) -> None:
        """Raise `UserError` unless fields, named with spaces between, are whole numbers."""
        for name in fields.split():
            whole_number(name, getattr(self, name), at_least)

    def check_choice(self, field: str, *choices: str | None) -> None:
        """Raise `UserError` unless a field is one of the choices."""
        value = getattr(self, field)
        if value not in choices:
            expected = " or ".join("null" if c is None else repr(c) for c in choices)
            raise UserError(f"{field} {value!r} is not supported: expected {expected}")


class TransformerConfig(NetworkConfig):
    """The numbers of a transformer, whose width is divided among heads."""

    num_attention_heads: int
    attention_head_dim: int

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Network(nn.Module):
    """(x, timestep, conditioning) -> y, the target of the process's parameterization.

    A network is built from a frozen config with diffusers' field names and saved with `to_config`.
    Its file has a table CLASSES: {"_class_name" of config.json: (network, config)}, by which it is
    found. A network pads latents whose sides are no multiple of `patch`, and crops its output.

    Attributes:
        part: The network's folder in diffusers' layout.
        parameterization: The target of all networks of this class, by its name in
            `diffuse.parameterization`; None: the model's scheduler decides.
        config: The numbers of the network.
    """

    part: ClassVar[str] = "transformer"
    parameterization: ClassVar[str | None] = None
    config: Any

    # ---- latents ---------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return self.config.in_channels

    @property
    def in_channels(self) -> int:
        """Channels of its input: the latent's, and those that `Conditioning.concat` adds."""
        return self.config.in_channels

    @property
    def learned_variance(self) -> bool:
        """True where a variance follows the target, in as many channels again.

        Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15.
        """
        return False

    @property
    def sample_size(self) -> int:
        """The default side of its latents, in cells."""
        return getattr(self.config, "sample_size", None) or 64

    max_reference_images: ClassVar[float] = 0
    """Number of reference images that the network attends to (`Conditioning.references`)."""

    def check_size(self, height: int, width: int) -> None:
        """Raise `UserError` for latents of h x w cells that it cannot predict."""

    def check_blocks(self) -> None:
        """Raise `UserError` where too many of its layers have been replaced for it to run."""

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token; 1 for networks without tokens."""
        return 1

    # ---- conditioning ----------------------------------------------------------------------------

    @property
    def token_width(self) -> int | tuple[int, ...] | None:
        """Channels of `Conditioning.tokens`, one for all levels or one a level; None: no tokens."""
        return None

    text_width_fields: ClassVar[tuple[str, ...]] = ()
    """Config fields of the widths of text tokens and of a pooled text, if there is one.

    Empty for networks that are not conditioned on text.
    """

    @property
    def classes(self) -> int:
        """Rows of the table of classes, one of them for no class; 0: no classes."""
        return 0

    @property
    def vector_width(self) -> int | None:
        """Numbers of `Conditioning.vector`, without the guidance scale; None: not checked."""
        return None

    @property
    def guidance_embeds(self) -> bool:
        """True for guidance-distilled networks.

        The last number of `Conditioning.vector` is the guidance scale then.
        """
        return False

    @property
    def is_conditional(self) -> bool:
        """True where it is conditioned on tokens, classes or a vector."""
        return self.token_width is not None or self.classes > 0 or self.vector_width is not None

    def join_concat(
        self, x: Float[Tensor, "B C h w"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The latent with `Conditioning.concat` behind its channels.

        Raises:
            UserError: For other channels than the network's.
        """
        joined = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)
        if joined.shape[1] != self.in_channels:
            raise UserError(
                f"this {type(self).__name__} takes {self.in_channels} channels and was given "
                f"{joined.shape[1]}, {joined.shape[1] - x.shape[1]} of them by "
                "Conditioning.concat: models that also take a mask, an image or a depth map need "
                "the task that gives it"
            )
        return joined

    def require(self, cond: Conditioning, field: str, width: int, purpose: str) -> Tensor:
        """The tokens (B, L, width) or the vector (B, width) of a conditioning.

        Args:
            cond: The conditioning.
            field: "tokens" or "vector".
            width: Its last size.
            purpose: The network's use of it, for the message: "attends to a text".

        Raises:
            UserError: Where the field is missing or of another width.
        """
        value, shape, unit = cond.vector, f"(B, {width})", "has {} numbers"
        if field == "tokens":
            value, shape, unit = cond.tokens, f"(B, L, {width})", "is {} wide"
        if value is None or value.shape[-1] != width:
            state = "is missing" if value is None else unit.format(value.shape[-1])
            raise UserError(
                f"this {type(self).__name__} {purpose}: Conditioning.{field} {shape} {state}; "
                "use the conditioner of this model"
            )
        return value

    # ---- configs ---------------------------------------------------------------------------------

    @classmethod
    def shape_fields(cls, config: Any, channels: int, side: int) -> dict[str, Any]:
        """Fields that change `config` into that of a network for other latents.

        out_channels stay twice the in_channels where they are: a learned variance.

        Args:
            config: The config of a network of this class.
            channels: Channels of the latents.
            side: Cells along a side of the latents in training.
        """
        twice = config.out_channels == 2 * config.in_channels
        return {
            "sample_size": side,
            "in_channels": channels,
            "out_channels": (1 + twice) * channels,
        }

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """Fields that change a config into that of a network for `count` classes.

        Raises:
            UserError: For a network that cannot be conditioned on classes.
        """
        raise UserError(
            f"a {cls.__name__} has no classes: train it from captions (--text), or a network such "
            "as ModernDiT, DiT or SiT"
        )

    @classmethod
    def text_fields(cls, width: int | None, pooled_width: int | None) -> dict[str, Any]:
        """Fields that change a config into that of a network for another text encoder.

        Args:
            width: Channels of `Conditioning.tokens`.
            pooled_width: Numbers of `Conditioning.vector`; None: the encoder has no pooled text.

        Raises:
            UserError: For a network that cannot be conditioned on text.
        """
        if not cls.text_width_fields:
            raise UserError(
                f"a {cls.__name__} has no text: train it from classes, "
                "or a network with text tokens such as ModernDiT, PixArt or SD3"
            )
        widths = zip(cls.text_width_fields, (width, pooled_width), strict=False)
        return {field: value for field, value in widths if value is not None}

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, with diffusers' names."""
        return self.config.to_dict()


@cache
def registered() -> dict[str, tuple[type[Network], Any]]:
    """Every network of this folder and its config, by "_class_name" of config.json."""
    package = "predict.networks"
    return {
        name: entry
        for file in names(package)
        for name, entry in module_of(package, file).CLASSES.items()
    }


def network_of(config: Any) -> type[Network]:
    """The class of a config's network."""
    return registered()[config.to_dict()["_class_name"]][0]


def build(config: Any) -> Network:
    """The network of a config, with random weights."""
    return network_of(config)(config)
