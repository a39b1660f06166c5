"""DiT: a transformer over latent patches, modulated by time and class.

Peebles & Xie 2022, arXiv:2212.09748, section 3.2, figure 3.

c = MLP(sinusoidal(t)) + E[class], and in each block, with (shift, scale, gate) linear in SiLU(c),
adaLN-Zero:

    x <- x + gate attention(LN(x) (1 + scale) + shift)
    x <- x + gate' mlp(LN(x) (1 + scale') + shift')

Module names and config are diffusers' DiTTransformer2DModel. There each block holds c's layers
again (`transformer_blocks.N.norm1.emb`), 27 copies of what the paper has once. Blocks whose weights
are the same, as in every published file, share one module here, which is run once.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention, FeedForward
from sfumato.nn.embeddings import TimestepEmbedding, sinusoidal
from sfumato.nn.modulation import Modulation, gated, modulated
from sfumato.predict.networks._patch_transformer import (
    ACTIVATIONS,
    LEGACY,
    PatchConfig,
    PatchTransformer,
    zero_init,
)
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH
from sfumato.types import Conditioning

_NO_TEXT = {
    "cross_attention_dim": None,
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
"""Fields of Transformer2DModel that are PixArt's."""


@dataclass(frozen=True)
class DiTConfig(PatchConfig):
    """The numbers of a DiT, with diffusers' names and defaults.

    The defaults are DiT-XL/2's for 256 x 256 pixels. num_embeds_ada_norm counts the classes without
    the row for no class. norm_eps is of the norm before the feed-forward layer; the others have
    1e-6.
    """

    class_name = "DiTTransformer2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        "dropout": 0.0,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }
    legacy: ClassVar[Mapping[str, Any]] = LEGACY | _NO_TEXT


class _TimeClassEmbedding(nn.Module):
    """Sinusoidal features of a timestep (B, 256) and weights of classes (B, K) -> c (B, D)."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        table = nn.Embedding(classes, width)
        nn.init.normal_(table.weight, std=0.02)
        self.timestep_embedder = TimestepEmbedding(SINUSOIDAL_WIDTH, width)
        self.class_embedder = nn.ModuleDict({"embedding_table": table})

    def forward(
        self, features: Float[Tensor, "B W"], classes: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B D"]:
        table = cast("nn.Embedding", self.class_embedder["embedding_table"]).weight
        return self.timestep_embedder(features) + batch_invariant.linear(classes, table.T)


class _BlockModulation(Modulation):
    """c -> shift, scale and gate of a block's attention, and of its feed-forward layer.

    All are zero at the start of training. `emb`, the layers of c, is held and not run.
    """

    def __init__(self, width: int, embedding: _TimeClassEmbedding):
        super().__init__(width, 6)
        self.emb = embedding
        zero_init(self.linear)


class _Block(nn.Module):
    """Self-attention and a feed-forward layer, both modulated by c."""

    streams = 1  # one stream of tokens in and out

    def __init__(self, config: DiTConfig, embedding: _TimeClassEmbedding):
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.eps = config.norm_eps
        self.norm1 = _BlockModulation(width, embedding)
        self.attn1 = Attention(
            width, heads, config.attention_head_dim, qkv_bias=config.attention_bias
        )
        self.ff = FeedForward(width, ACTIVATIONS[config.activation_fn])

    def forward(self, x: Float[Tensor, "B N D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(c)  # (B, 1, D) each
        x = gated(x, gate, self.attn1(modulated(x, scale, shift)))
        return gated(x, gate_ff, self.ff(modulated(x, scale_ff, shift_ff, self.eps)))


class DiT(PatchTransformer):
    """The transformer: see the module's docstring.

    Built from a `DiTConfig`; weights are random until loaded. `Conditioning.vector` (B, classes) is
    the class, one-hot or a mixture; the last entry is no class. A new network's output is 0.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        width = config.width
        embedding = _TimeClassEmbedding(config.num_embeds_ada_norm + 1, width)
        self.transformer_blocks = nn.ModuleList(
            _Block(config, embedding) for _ in range(config.num_layers)
        )
        self.proj_out_1 = zero_init(batch_invariant.Linear(width, 2 * width))
        self.proj_out_2 = zero_init(
            batch_invariant.Linear(width, config.patch_size**2 * config.outputs)
        )

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """Fields for `count` classes, among which the row for no class is not counted."""
        return {"num_embeds_ada_norm": count}

    @property
    def classes(self) -> int:
        """Rows of the table: the classes, and one for no class."""
        return self.config.num_embeds_ada_norm + 1

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B K h w"]:
        """The network's target and, behind it, a learned variance.

        Args:
            x: Noisy latent.
            timestep: In 0..1000.
            cond: With `vector` (B, classes).

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        self.check_blocks()
        features = self.time_features(timestep).to(x.dtype)
        classes = self.require(cond, "vector", self.classes, "is class-conditional").to(x.dtype)
        embed = self._blocks()[0].norm1.emb
        c = embed(features, classes)  # (B, D)

        y = self.patchify(x, cond)  # (B, N, D)
        for block in self.transformer_blocks:
            own = block.norm1.emb if isinstance(block, _Block) else embed  # none if skipped
            y = block(y, c if own is embed else own(features, classes))

        shift, scale = self.proj_out_1(batch_invariant.silu(c))[:, None].chunk(2, dim=-1)
        return self.unpatchify(self.proj_out_2(modulated(y, scale, shift)), x.shape[2:])

    def check_blocks(self) -> None:
        """Raise `UserError` where no block is left."""
        if not self._blocks():
            raise UserError(
                "this DiT embeds time and class in its blocks: at least one of them has to stay"
            )

    def time_features(self, timestep: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """Sinusoidal features of a timestep, the input of c's first layer."""
        return sinusoidal(timestep, SINUSOIDAL_WIDTH, shift=1.0)

    def _blocks(self) -> "list[_Block]":
        return [block for block in self.transformer_blocks if isinstance(block, _Block)]

    # ---- one module for c, or one a block --------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in `nn.Module`; blocks share the layers of c where all have the same weights."""
        blocks = self._blocks()
        embed = blocks[0].norm1.emb
        shared = all(
            _same_weights(state_dict, i, list(embed.state_dict())) for i in range(1, len(blocks))
        )
        for block in blocks[1:]:
            if shared:
                block.norm1.emb = embed
            elif block.norm1.emb is embed:
                block.norm1.emb = copy.deepcopy(embed)
        return super().load_state_dict(state_dict, strict, assign)


def _same_weights(tensors: Mapping[str, Any], block: int, names: list[str]) -> bool:
    """True where a block's layers of c have the first block's weights, or lack the same ones."""
    for name in names:
        first, other = (tensors.get(f"transformer_blocks.{i}.norm1.emb.{name}") for i in (0, block))
        if first is not other and (
            first is None
            or other is None
            or first.dtype != other.dtype
            or not torch.equal(first, other)
        ):
            return False
    return True


CLASSES = {"DiTTransformer2DModel": (DiT, DiTConfig)}
