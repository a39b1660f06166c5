"""DiT: a transformer over latent patches, told time and class by its norms (Peebles & Xie 2022,
arXiv:2212.09748, section 3.2, figure 3).

c = MLP(waves(t)) + E[class], and in each block, with (shift, scale, gate) linear in SiLU(c),
adaLN-Zero:

    x <- x + gate attention(LN(x) (1 + scale) + shift)
    x <- x + gate' mlp(LN(x) (1 + scale') + shift')

Module names and config are diffusers' DiTTransformer2DModel. There each block holds c's layers
again (`transformer_blocks.N.norm1.emb`), 27 copies of what the paper has once: blocks whose weights
are the same, as in every published file, share one module here, which is asked once.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention, FeedForward
from sfumato.nn.embeddings import TimestepEmbedding, sinusoidal
from sfumato.nn.modulation import Modulation, gated, modulated
from sfumato.predict.networks._patch_transformer import (
    ACTIVATIONS,
    LEGACY,
    WAVES,
    PatchConfig,
    PatchNetwork,
    zeroed,
)
from sfumato.types import Conditioning

# Fields of DiTTransformer2DModel that we stand for with one value only.
FIXED: dict[str, Any] = {
    "dropout": 0.0,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
# Fields of Transformer2DModel that are PixArt's.
_NO_TEXT = {
    "cross_attention_dim": None,
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}


@dataclass(frozen=True)
class DiTConfig(PatchConfig):
    """The numbers of a DiT, with diffusers' names and defaults, which are DiT-XL/2's for 256 x 256
    pixels.

    num_embeds_ada_norm: classes, without the one that stands for none. norm_eps: of the norm before
    the feed-forward layer; the others have 1e-6.
    """

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiTConfig":
        """Reads a diffusers config; a field that this class does not know, or a value it cannot
        honour, is refused.
        """
        return read_config(cls, values, FIXED | LEGACY | _NO_TEXT)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' DiTTransformer2DModel reads."""
        return {"_class_name": "DiTTransformer2DModel", **asdict(self), **FIXED}


class _Told(nn.Module):
    """Waves of a timestep (B, 256) and weights of classes (B, K) -> c (B, D)."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        table = nn.Embedding(classes, width)
        nn.init.normal_(table.weight, std=0.02)
        self.timestep_embedder = TimestepEmbedding(WAVES, width)
        self.class_embedder = nn.ModuleDict({"embedding_table": table})

    def forward(
        self, waves: Float[Tensor, "B W"], classes: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B D"]:
        table = cast("nn.Embedding", self.class_embedder["embedding_table"]).weight
        return self.timestep_embedder(waves) + batch_invariant.linear(classes, table.T)


class _Norm(Modulation):
    """c -> shift, scale and gate of a block's attention, and of its feed-forward layer; zero at the
    start of training.
    """

    def __init__(self, width: int, told: _Told):
        super().__init__(width, 6)
        self.emb = told
        zeroed(self.linear)


class _Block(nn.Module):
    """Attention of all patches to each other and a feed-forward layer, both steered by c."""

    streams = 1  # it takes and gives one stream of tokens

    def __init__(self, config: DiTConfig, told: _Told):
        super().__init__()
        width, heads, head_width = (
            config.width,
            config.num_attention_heads,
            config.attention_head_dim,
        )
        self.eps = config.norm_eps
        self.norm1 = _Norm(width, told)
        self.attn1 = Attention(width, heads, head_width, qkv_bias=config.attention_bias)
        self.ff = FeedForward(width, ACTIVATIONS[config.activation_fn])

    def forward(
        self, x: Float[Tensor, "B N D"], told: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B N D"]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(told)  # (B, 1, D) each
        x = gated(x, gate, self.attn1(modulated(x, scale, shift)))
        return gated(x, gate_ff, self.ff(modulated(x, scale_ff, shift_ff, self.eps)))


class DiT(PatchNetwork):
    """The transformer: see the module's docstring. Built from a `DiTConfig`; weights are random
    until loaded.

    `Conditioning.vector` (B, classes) says which class, one-hot or a mixture; the last one is none.
    A fresh network answers 0.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        width, told = config.width, _Told(config.num_embeds_ada_norm + 1, config.width)
        self.transformer_blocks = nn.ModuleList(
            _Block(config, told) for _ in range(config.num_layers)
        )
        self.proj_out_1 = zeroed(batch_invariant.Linear(width, 2 * width))
        self.proj_out_2 = zeroed(
            batch_invariant.Linear(width, config.patch_size**2 * config.outputs)
        )

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """The row for none is not counted."""
        return {"num_embeds_ada_norm": count}

    @property
    def classes(self) -> int:
        """Rows of the table: the classes, and one for none."""
        return self.config.num_embeds_ada_norm + 1

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B K h w"]:
        """x noisy latent, timestep in 0..1000, conditioning with `vector` -> y, the network's
        target and, behind it, a learned variance.
        """
        self.check_blocks()
        waves = self.waves(timestep).to(x.dtype)
        classes = self._classes(cond).to(x.dtype)
        first = self._blocks()[0].norm1.emb
        told = first(waves, classes)  # (B, D)

        y = self.tokens(x, cond)  # (B, N, D)
        for block in self.transformer_blocks:
            # one that is left out asks for nothing
            own = block.norm1.emb if isinstance(block, _Block) else first
            y = block(y, told if own is first else own(waves, classes))

        scale, shift = self._last(told)
        return self.picture(self.proj_out_2(modulated(y, scale, shift)), x.shape[2:])

    def check_blocks(self) -> None:
        """Raise `UserError` where no block is left."""
        if not self._blocks():
            raise UserError(
                "this DiT is told time and class by its blocks: at least one of them has to stay"
            )

    def waves(self, timestep: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """Sines and cosines of a timestep, as many as c's first layer takes."""
        return sinusoidal(timestep, WAVES, shift=1.0)

    def _classes(self, cond: Conditioning) -> Float[Tensor, "B K"]:
        if cond.vector is None:
            raise UserError(
                f"this DiT is class-conditional: Conditioning.vector (B, {self.classes}) is missing"
            )
        if cond.vector.shape[1] != self.classes:
            raise UserError(
                f"this DiT has {self.classes} classes, none at all being one of them: Conditioning.vector has {cond.vector.shape[1]} numbers"
            )
        return cond.vector

    def _last(
        self, told: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B 1 D"]]:
        """Scale and shift of the last norm."""
        shift, scale = self.proj_out_1(batch_invariant.silu(told))[:, None].chunk(2, dim=-1)
        return scale, shift

    def _blocks(self) -> "list[_Block]":
        return [block for block in self.transformer_blocks if isinstance(block, _Block)]

    # ---- one module for c, or one a block --------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module`'s; blocks share the layers of c where these are the same in all of them,
        and have their own where they are not.
        """
        blocks = self._blocks()
        first = blocks[0].norm1.emb
        alike = all(
            _same(state_dict, f"transformer_blocks.{i}.norm1.emb.", list(first.state_dict()))
            for i in range(1, len(blocks))
        )
        for block in blocks[1:]:
            if alike:
                block.norm1.emb = first
            elif block.norm1.emb is first:
                block.norm1.emb = copy.deepcopy(first)
        return super().load_state_dict(state_dict, strict, assign)


def _same(tensors: Mapping[str, Any], prefix: str, names: list[str]) -> bool:
    """Whether what is below a block's prefix is what the first block has; what is missing is for
    others to say.
    """
    for name in names:
        ours, theirs = (
            tensors.get(f"transformer_blocks.0.norm1.emb.{name}"),
            tensors.get(f"{prefix}{name}"),
        )
        if ours is not theirs and (
            ours is None
            or theirs is None
            or ours.dtype != theirs.dtype
            or not torch.equal(ours, theirs)
        ):
            return False
    return True


CLASSES = {"DiTTransformer2DModel": (DiT, DiTConfig)}
