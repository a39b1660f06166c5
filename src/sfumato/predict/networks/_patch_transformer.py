"""Base of DiT and PixArt: a latent as patches with sine positions, and back.

tokens = W patch + positions (Peebles & Xie 2022, arXiv:2212.09748, section 3.2). Positions are
scaled so that a map of any size and aspect covers the positions of the training map (diffusers'
PatchEmbed).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.embeddings import PatchEmbed, padded, sincos_2d, unpatched
from sfumato.predict.networks.base import Network, TransformerConfig
from sfumato.types import Conditioning
from sfumato.validate import flag, number_in, whole_number

ACTIVATIONS = {"gelu-approximate": "gelu", "geglu": "geglu"}
"""diffusers' `activation_fn` -> the kind of nn.attention.FeedForward."""

LEGACY: dict[str, Any] = {
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "double_self_attention": False,
    "use_linear_projection": False,
    "attention_type": "default",
    "positional_embeddings": None,
    "num_positional_embeddings": None,
}
"""Fields of Transformer2DModel, the class in the first files of DiT and PixArt."""


@dataclass(frozen=True)
class PatchConfig(TransformerConfig):
    """The numbers of a transformer over patches, with diffusers' names.

    Attributes:
        num_attention_heads: Heads of attention.
        attention_head_dim: Width of a head.
        in_channels: Channels of the latents.
        out_channels: With those of a learned variance, which follow the others (Nichol & Dhariwal
            2021, arXiv:2102.09672); None: in_channels.
        num_layers: Number of blocks.
        norm_num_groups: Kept for the file's sake: there is no group norm.
        attention_bias: Whether queries, keys and values have a bias.
        sample_size: Cells along a side of the latents of training.
        patch_size: Cells along a side of a patch.
        activation_fn: One of `ACTIVATIONS`.
        num_embeds_ada_norm: Number of classes.
        upcast_attention: Kept for the file's sake: attention sums in float32 in every dtype.
        norm_eps: Added to variances in norms.
    """

    legacy: ClassVar[Mapping[str, Any]] = LEGACY

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self.check_counts("num_attention_heads attention_head_dim in_channels num_layers")
        self.check_counts("patch_size num_embeds_ada_norm")
        whole_number("sample_size", self.sample_size, self.patch_size)
        flag("attention_bias", self.attention_bias)
        if self.out_channels is not None:
            whole_number("out_channels", self.out_channels, self.in_channels)
        if self.width % 4:
            raise UserError(
                f"num_attention_heads * attention_head_dim is {self.width}: expected a multiple of "
                "4, for sine positions"
            )
        self.check_choice("activation_fn", *ACTIVATIONS)
        number_in("norm_eps", self.norm_eps, above=0, below=1, hint="1e-6 is usual")

    @property
    def outputs(self) -> int:
        """Channels of the network's output."""
        return self.out_channels or self.in_channels

    @property
    def position_scale(self) -> float:
        """The divisor of positions: the size of training over that for which they were made."""
        return 1.0


def zero_init(linear: nn.Linear) -> nn.Linear:
    """The same layer with weights of 0, so that its output is 0 at the start of training."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class PatchNetwork(Network):
    """A network whose tokens are patches of the latent, of `config.patch_size` cells a side."""

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token."""
        return self.config.patch_size

    def unpatchify(self, y: Float[Tensor, "B N E"], size: torch.Size) -> Float[Tensor, "B K h w"]:
        """Tokens of patch * patch * K channels as a map of `size` (h, w)."""
        height, width = size
        return unpatched(y, -(-height // self.patch), self.patch)[:, :, :height, :width]


class PatchTransformer(PatchNetwork):
    """A transformer over patches: `patchify` on the way in, `unpatchify` on the way out."""

    config: PatchConfig

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config = config
        self.pos_embed = PatchEmbed(config.in_channels, config.width, config.patch_size)

    @property
    def learned_variance(self) -> bool:
        """True where a variance follows the target, in as many channels again."""
        return self.config.out_channels == 2 * self.config.in_channels

    def patchify(self, x: Float[Tensor, "B C h w"], cond: Conditioning) -> Float[Tensor, "B N D"]:
        """A latent as tokens with their positions.

        Raises:
            UserError: For other channels than the network's, and fields of `cond` that it does not
                use.
        """
        for field in ("concat", "residuals", "image_tokens", "references"):
            if getattr(cond, field) is not None:
                raise UserError(
                    f"this {type(self).__name__} has no use for Conditioning.{field}: leave it "
                    "out, or take a model that uses it"
                )
        c, x = self.config, self.join_concat(x, cond)
        rows, columns = (-(-side // c.patch_size) for side in x.shape[2:])
        positions = _positions(
            c.width, rows, columns, c.sample_size // c.patch_size, c.position_scale, x.device
        )
        # positions first: the sum has its first term's layout in memory, which is token by token
        return (positions + self.pos_embed(padded(x, c.patch_size))).to(x.dtype)


@lru_cache(maxsize=16)
def _positions(
    width: int, rows: int, columns: int, base: int, scale: float, device: torch.device
) -> Float[Tensor, "N D"]:
    """`sincos_2d` on a device, cached: not to be changed in place."""
    with torch.inference_mode(False):
        return sincos_2d(width, rows, columns, base, scale).to(device)
