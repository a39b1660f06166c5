"""A diffusion transformer to train from scratch: DiT (Peebles & Xie 2022, arXiv:2212.09748) with
the parts that have proven themselves since.

    tokens = [patches, registers, words];  each block: x += gate * attention(norm(x)), x += gate *
                                           feed-forward(norm(x)), norms steered by time

QK-norm (Dehghani et al. 2023, arXiv:2302.05442, section 3), rotary places on rows and columns (Su
et al. 2021, arXiv:2104.09864; for pictures Heo et al. 2024, arXiv:2403.13298), SwiGLU (Shazeer
2020, arXiv:2002.05202), register tokens (Darcet et al. 2023, arXiv:2309.16588). Each can be
exchanged for DiT's own part by a setting. Words are joined to the patches and attend to them in
turn, as in MMDiT (arXiv:2403.03206), but with shared weights.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError, unknown
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import FeedForward, PictureAttention
from sfumato.nn.embeddings import (
    PatchEmbed,
    TimestepEmbedding,
    padded,
    sincos_2d,
    sinusoidal,
    unpatched,
)
from sfumato.nn.mmdit import with_picture
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.nn.rope import angles, grid, rotate
from sfumato.predict.networks.base import Network
from sfumato.types import Conditioning

CLASS_NAME = "SfumatoDiT"
_WAVES = 256  # sinusoidal features of the time, as in DiT


@dataclass(frozen=True)
class ModernDiTConfig:
    """The numbers of the network; width = num_attention_heads * attention_head_dim.

    sample_size            the latent's side in training (cells); "sincos" places are stretched to
                           it
    ffn, ffn_ratio         "swiglu" or "gelu", and the feed-forward's inner width over the width;
                           SwiGLU has three matrices where GELU has two, so that 8/3 costs what 4
                           costs there
    positions, rope_theta  "rope" (distances in tokens, of any size and aspect) or "sincos" (DiT's)
    qk_norm                queries and keys have length 1 before a learned scale: attention cannot
                           grow without bound
    register_tokens        tokens of no place, for what belongs to the whole picture
    num_class_embeds       classes, and one more for none; None: it is told no class
    caption_channels       the width of text tokens; None: it reads none
    """

    sample_size: int = 32
    in_channels: int = 4
    out_channels: int | None = None
    patch_size: int = 2
    num_layers: int = 12
    num_attention_heads: int = 6
    attention_head_dim: int = 64
    ffn: str = "swiglu"
    ffn_ratio: float = 8 / 3
    positions: str = "rope"
    rope_theta: float = 100.0
    qk_norm: bool = True
    register_tokens: int = 4
    num_class_embeds: int | None = None
    caption_channels: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "sample_size",
            "in_channels",
            "patch_size",
            "num_layers",
            "num_attention_heads",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(
                    f"{name}={getattr(self, name)!r}: expected a whole number of at least 1"
                )
        if self.ffn not in ("swiglu", "gelu"):
            raise unknown("ffn", self.ffn, ("swiglu", "gelu"))
        if self.positions not in ("rope", "sincos"):
            raise unknown("positions", self.positions, ("rope", "sincos"))
        if self.attention_head_dim < 4 or self.attention_head_dim % 4:
            raise UserError(
                f"attention_head_dim={self.attention_head_dim}: expected a multiple of 4, for pairs that turn with rows and with columns"
            )
        if self.register_tokens < 0 or not self.ffn_ratio > 0 or not self.rope_theta > 1:
            raise UserError(
                f"register_tokens={self.register_tokens}, ffn_ratio={self.ffn_ratio}, rope_theta={self.rope_theta}: expected at least 0, "
                "above 0 and above 1"
            )

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        """The feed-forward's width between, a multiple of 8."""
        return max(8, round(self.ffn_ratio * self.width / 8) * 8)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModernDiTConfig":
        """Reads config.json; a field that this class does not know is refused."""
        return read_config(cls, values, {})

    def to_dict(self) -> dict[str, Any]:
        """The JSON of config.json, which only sfumato reads."""
        return {"_class_name": CLASS_NAME, **asdict(self)}


class _Attention(PictureAttention):
    """Self-attention of all tokens; queries and keys are normed, and turned where they have a
    place.
    """

    def __init__(self, config: ModernDiTConfig):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.width
        self.to_qkv = batch_invariant.Linear(width, 3 * width, bias=False)
        self.norm_q = RMSNorm(config.attention_head_dim) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(config.attention_head_dim) if config.qk_norm else nn.Identity()
        self.to_out = batch_invariant.Linear(width, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        turn: Tensor | None,
        mask: Bool[Tensor, "B N"] | None,
        count: int,
    ) -> Float[Tensor, "B N D"]:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, H, d)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return self.to_out(self.find(q, k, v, mask, count))


class _Block(nn.Module):
    """Attention and feed-forward, both steered and gated by the embedding of time and condition."""

    streams = 1  # it takes and gives one stream of tokens

    def __init__(self, config: ModernDiTConfig):
        super().__init__()
        self.modulation = Modulation(config.width, 6)
        self.attn = _Attention(config)
        self.ff = FeedForward(config.width, config.ffn, config.inner, bias=config.ffn == "gelu")

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        embedding: Float[Tensor, "B D"],
        turn: Tensor | None,
        mask: Bool[Tensor, "B N"] | None,
        count: int,
    ) -> Float[Tensor, "B N D"]:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)
        x = gated(x, gate_1, self.attn(modulated(x, scale_1, shift_1), turn, mask, count))
        return gated(x, gate_2, self.ff(modulated(x, scale_2, shift_2)))


class ModernDiT(Network):
    """The network: see the module's docstring. Built from a `ModernDiTConfig`; begins as the
    identity, its gates and its answer are zero.
    """

    config: ModernDiTConfig

    def __init__(self, config: ModernDiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.pos_embed = PatchEmbed(config.in_channels, width, patch)
        self.time_embedding = TimestepEmbedding(_WAVES, width)
        self.class_embedding = (
            nn.Embedding(config.num_class_embeds, width) if config.num_class_embeds else None
        )
        if config.caption_channels:
            self.caption_norm = RMSNorm(config.caption_channels)
            self.caption_projection = batch_invariant.Linear(config.caption_channels, width)
            self.caption_embedding = TimestepEmbedding(config.caption_channels, width)
        if config.register_tokens:
            self.registers = nn.Parameter(torch.empty(config.register_tokens, width))
        self.transformer_blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm_out = Modulation(width, 2)
        self.proj_out = batch_invariant.Linear(
            width, patch * patch * (config.out_channels or config.in_channels)
        )
        self._initialise()

    def _initialise(self) -> None:
        """As DiT (appendix A): Xavier for matrices, a normal of 0.02 for embeddings, zero for what
        steers, gates and answers.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.config.width, -1))
        for table in (
            self.class_embedding.weight if self.class_embedding else None,
            getattr(self, "registers", None),
        ):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """x noisy latent, timestep in 0..1000, conditioning -> y, the network's target."""
        size, patch = x.shape[2:], self.config.patch_size
        x = padded(self._joined(x, cond), patch)
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        embedding = self._embed(timestep, cond, x.dtype)

        # Patches, and behind them what has no place.
        x = self.pos_embed(x)  # (B, N, D)
        if self.config.positions == "sincos":
            x = x + sincos_2d(
                self.config.width, rows, columns, self.config.sample_size // patch
            ).to(x)
        count = x.shape[1]
        others, mask = self._placeless(x, cond)
        x = torch.cat([x, others], dim=1)
        # what a compiler looks at is no tensor to remember
        make = _turns.__wrapped__ if torch.compiler.is_compiling() else _turns
        turn = (
            make(self.config, others.shape[1], rows, columns, x.device)
            if self.config.positions == "rope"
            else None
        )

        for block in self.transformer_blocks:
            x = block(x, embedding, turn, mask, count)

        shift, scale = self.norm_out(embedding)
        y = self.proj_out(modulated(x[:, :count], scale, shift))
        return unpatched(y, rows, patch)[:, :, : size[0], : size[1]]

    def _joined(self, x: Tensor, cond: Conditioning) -> Tensor:
        """The latent, and what joins it along channels."""
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)
        if x.shape[1] != self.config.in_channels:
            joined = 0 if cond.concat is None else cond.concat.shape[1]
            raise UserError(
                f"this network takes {self.config.in_channels} channels and was given {x.shape[1]}, {joined} of them by Conditioning.concat"
            )
        return x

    def _embed(
        self, timestep: Float[Tensor, " B"], cond: Conditioning, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time, class and the mean of the words, as one embedding."""
        embedding = self.time_embedding(sinusoidal(timestep, _WAVES).to(dtype))
        if self.class_embedding is not None:
            if cond.vector is None:
                raise UserError(
                    "this network is class-conditional: Conditioning.vector (B, V) is missing"
                )
            embedding = embedding + batch_invariant.linear(
                cond.vector.to(dtype), self.class_embedding.weight.T
            )
        if self.config.caption_channels:
            if cond.tokens is None:
                raise UserError(
                    f"this network reads tokens of width {self.config.caption_channels}: Conditioning.tokens (B, L, D) is missing"
                )
            counts = (
                torch.ones_like(cond.tokens[..., :1])
                if cond.mask is None
                else cond.mask[..., None].to(dtype)
            )
            mean = (self.caption_norm(cond.tokens) * counts).sum(1) / counts.sum(1).clamp(min=1)
            embedding = embedding + self.caption_embedding(mean)
        return embedding

    def _placeless(
        self, x: Float[Tensor, "B N D"], cond: Conditioning
    ) -> tuple[Float[Tensor, "B M D"], Bool[Tensor, "B L"] | None]:
        """Registers and words, and who of all tokens counts (None: all)."""
        parts = (
            [self.registers.to(x.dtype).expand(len(x), -1, -1)]
            if self.config.register_tokens
            else []
        )
        if self.config.caption_channels:
            parts.append(self.caption_projection(self.caption_norm(cond.tokens)))
        mask = cond.mask if self.config.caption_channels else None
        return torch.cat(parts, dim=1) if parts else x[:, :0], with_picture(
            mask, x.shape[1] + self.config.register_tokens
        )

    @property
    def learned_variance(self) -> bool:
        """Whether a variance comes behind what it predicts: twice as many channels as it takes."""
        return self.config.out_channels == 2 * self.config.in_channels

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return (
            self.config.in_channels
            if self.learned_variance
            else self.config.out_channels or self.config.in_channels
        )

    @property
    def token_width(self) -> int | None:
        """The width of text tokens."""
        return self.config.caption_channels

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """A row for each class, and one for none."""
        return {"num_class_embeds": count + 1}

    @property
    def classes(self) -> int:
        """Rows of the class table."""
        return self.config.num_class_embeds or 0

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token."""
        return self.config.patch_size


@lru_cache(maxsize=32)
def _turns(
    config: ModernDiTConfig, placeless: int, rows: int, columns: int, device: torch.device
) -> Float[Tensor, "N d 2"]:
    """The turns of all tokens; those without a place do not turn. Rows and columns have half of a
    head's pairs each.
    """
    half = config.attention_head_dim // 2
    with torch.inference_mode(False):
        places = grid(rows, columns, device)
        still = angles(places.new_zeros(placeless, 2), (half, half), config.rope_theta)
        return torch.cat([angles(places, (half, half), config.rope_theta), still])


CLASSES = {CLASS_NAME: (ModernDiT, ModernDiTConfig)}
