"""Transformer2DModel: the class in DiT's and PixArt's first files.

The kind of the norms decides which of the two it is:

    facebook/DiT-XL-2-256, -512        norm_type "ada_norm_zero"
    PixArt-alpha/PixArt-XL-2-*         norm_type "ada_norm_single"

Such models are saved under the names that diffusers has for them now.
"""

from typing import Any

from sfumato.errors import UserError
from sfumato.predict.networks.base import Network
from sfumato.predict.networks.dit import DiT, DiTConfig
from sfumato.predict.networks.pixart import PixArt, PixArtConfig

_KINDS = {"ada_norm_zero": DiTConfig, "ada_norm_single": PixArtConfig}


class EitherConfig:
    """A config of Transformer2DModel, which is one of two."""

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DiTConfig | PixArtConfig:
        """Read the config of a DiT or a PixArt; `UserError` for another norm_type."""
        kind = values.get("norm_type")
        if kind not in _KINDS:
            raise UserError(
                f"norm_type {kind!r} of Transformer2DModel is not supported: expected one of "
                f"{', '.join(_KINDS)}"
            )
        return _KINDS[kind].from_dict(values)


class EitherNetwork(Network):
    """Constructor of the network of an `EitherConfig`, which is one of two."""

    def __new__(cls, config: DiTConfig | PixArtConfig) -> DiT | PixArt:
        """The network of a config."""
        return DiT(config) if isinstance(config, DiTConfig) else PixArt(config)


CLASSES = {"Transformer2DModel": (EitherNetwork, EitherConfig)}
