"""What every network tells the rest of the house about itself, and how the folder finds it."""

from functools import cache
from typing import Any, ClassVar

from torch import nn

from sfumato.errors import UserError
from sfumato.registry import module_of, names


class Network(nn.Module):
    """(x, timestep, conditioning) -> y: a network is built from a frozen config with diffusers'
    field names and saved with `to_config`.

    A file of this folder has a table CLASSES: {"_class_name" of config.json: (network, config)}, by
    which it is found. Latents whose sides are no multiple of `patch` are the network's own affair:
    it fills them up and cuts the answer.
    """

    part: ClassVar[str] = "transformer"
    """The network's folder in diffusers' layout."""

    parameterization: ClassVar[str | None] = None
    """What all networks of this class answer, by the name that `diffuse.parameterization` has for
    it; None: the model's scheduler tells."""

    config: Any

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return self.config.in_channels

    @property
    def in_channels(self) -> int:
        """Channels that it takes: the latent's, and those that `Conditioning.concat` adds."""
        return self.config.in_channels

    @property
    def learned_variance(self) -> bool:
        """Whether a variance comes behind what it predicts, in as many channels again (Nichol &
        Dhariwal 2021, arXiv:2102.09672, eq. 15).
        """
        return False

    @property
    def sample_size(self) -> int:
        """The side of the latents that it draws if nobody says otherwise, in cells."""
        return getattr(self.config, "sample_size", None) or 64

    @property
    def token_width(self) -> int | tuple[int, ...] | None:
        """The width of the tokens that it attends to; None: it attends to none."""
        return None

    @property
    def classes(self) -> int:
        """How many classes it was trained with, none at all being one of them; 0: it is told no
        class.
        """
        return 0

    @property
    def vector_width(self) -> int | None:
        """The width of the vector that it must be given, without the number of `guidance_embeds`;
        None: that is not checked.
        """
        return None

    @property
    def guidance_embeds(self) -> bool:
        """Whether it is told how strongly to follow the condition, as the last number of
        `Conditioning.vector`.
        """
        return False

    @property
    def is_conditional(self) -> bool:
        """Whether it is conditioned on anything."""
        return self.token_width is not None or self.classes > 0 or self.vector_width is not None

    max_reference_images: ClassVar[float] = 0
    """Number of reference images that it can read beside x (`Conditioning.references`)."""

    def check_size(self, height: int, width: int) -> None:
        """Raise `UserError` for latents of h x w cells that it cannot predict."""

    def check_blocks(self) -> None:
        """Raise `UserError` where too many of its layers have been replaced for it to run."""

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token; 1 for networks without tokens."""
        return 1

    @classmethod
    def shape_fields(cls, config: Any, channels: int, side: int) -> dict[str, Any]:
        """What becomes of `config` for a network that is to be trained on latents of so many
        channels and cells a side.

        out_channels stay twice the in_channels where they are: a learned variance.
        """
        twice = config.out_channels == 2 * config.in_channels
        return {
            "sample_size": side,
            "in_channels": channels,
            "out_channels": (1 + twice) * channels,
        }

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """The same, of one that is to be told which of `count` classes; `UserError` for a network
        that no class can be told.
        """
        raise UserError(
            f"a {cls.__name__} is told no class: train it from captions (--text), or a network such as ModernDiT, DiT or SiT"
        )

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, with diffusers' names."""
        return self.config.to_dict()


@cache
def registered() -> dict[str, tuple[type[Any], Any]]:
    """Every network of this folder and its config, by the "_class_name" of config.json."""
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
