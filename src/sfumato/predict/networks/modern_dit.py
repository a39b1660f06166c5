"""A diffusion transformer to train from scratch: DiT with later improvements.

    tokens = [patches, registers, text]
    x += gate attention(norm(x)),  x += gate' feed-forward(norm(x))     in each block

Norms are modulated by time and condition (DiT; Peebles & Xie 2022, arXiv:2212.09748). QK-norm
(Dehghani et al. 2023, arXiv:2302.05442, section 3), rotary positions on rows and columns (Su et al.
2021, arXiv:2104.09864; for images Heo et al. 2024, arXiv:2403.13298), SwiGLU (Shazeer 2020,
arXiv:2002.05202), register tokens (Darcet et al. 2023, arXiv:2309.16588). A setting exchanges each
for DiT's own part. Text tokens are joined to the patches, and both attend to both, as in MMDiT
(arXiv:2403.03206), but with shared weights.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import FeedForward, ImageTokenAttention
from sfumato.nn.embeddings import PatchEmbed, TimestepEmbedding, padded, sincos_2d
from sfumato.nn.mmdit import with_image_tokens
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.nn.rope import angles, grid, rotate
from sfumato.predict.networks._patch_transformer import PatchNetwork
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH, TransformerConfig
from sfumato.types import Conditioning
from sfumato.validate import number_in, one_of


@dataclass(frozen=True)
class ModernDiTConfig(TransformerConfig):
    """The numbers of the network; width = num_attention_heads * attention_head_dim.

    Attributes:
        sample_size: The latent's side in training (cells), to which "sincos" positions are scaled.
        in_channels: Channels of the input.
        out_channels: Channels of the output; None: in_channels.
        patch_size: Latent cells along a side of a patch.
        num_layers: Number of blocks.
        num_attention_heads: Heads of attention.
        attention_head_dim: Width of a head.
        ffn: Kind of the feed-forward layers, "swiglu" or "gelu".
        ffn_ratio: Their inner width over the width. SwiGLU has three matrices where GELU has two,
            so that 8/3 costs what 4 costs there.
        positions: "rope" (distances in tokens, of any size and aspect) or "sincos" (DiT's).
        rope_theta: Base of the rotary frequencies.
        qk_norm: Whether queries and keys are normalised before a learned scale, so that attention
            logits cannot grow without bound.
        register_tokens: Tokens without a position, for global information.
        num_class_embeds: Classes, and one more for none; None: no classes.
        caption_channels: Channels of text tokens; None: no text.
    """

    class_name = "SfumatoDiT"

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
        self.check_counts("sample_size in_channels patch_size num_layers num_attention_heads")
        self.check_counts("register_tokens", at_least=0)
        one_of("ffn", self.ffn, ("swiglu", "gelu"))
        one_of("positions", self.positions, ("rope", "sincos"))
        number_in("ffn_ratio", self.ffn_ratio, above=0)
        number_in("rope_theta", self.rope_theta, above=1)
        if self.attention_head_dim < 4 or self.attention_head_dim % 4:
            raise UserError(
                f"attention_head_dim={self.attention_head_dim}: expected a multiple of 4, for "
                "pairs that are rotated by the row and by the column"
            )

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward layers, a multiple of 8."""
        return max(8, round(self.ffn_ratio * self.width / 8) * 8)


class _Attention(ImageTokenAttention):
    """Self-attention of all tokens with QK-norm, and rotary positions where tokens have one."""

    def __init__(self, config: ModernDiTConfig):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.width
        self.to_qkv = batch_invariant.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = (
            RMSNorm(config.attention_head_dim) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.to_out = batch_invariant.Linear(width, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        rope: Tensor | None,
        mask: Bool[Tensor, "B N"] | None,
        count: int,
    ) -> Float[Tensor, "B N D"]:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, H, d)
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.to_out(self.attend_heads(q, k, v, mask, count))


class _Block(nn.Module):
    """Attention and feed-forward, both modulated by c, the embedding of time and condition."""

    streams = 1  # one stream of tokens in and out

    def __init__(self, config: ModernDiTConfig):
        super().__init__()
        self.modulation = Modulation(config.width, 6)
        self.attn = _Attention(config)
        self.ff = FeedForward(config.width, config.ffn, config.inner, bias=config.ffn == "gelu")

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        c: Float[Tensor, "B D"],
        rope: Tensor | None,
        mask: Bool[Tensor, "B N"] | None,
        count: int,
    ) -> Float[Tensor, "B N D"]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(c)
        x = gated(x, gate, self.attn(modulated(x, scale, shift), rope, mask, count))
        return gated(x, gate_ff, self.ff(modulated(x, scale_ff, shift_ff)))


class ModernDiT(PatchNetwork):
    """The network: see the module's docstring. Built from a `ModernDiTConfig`.

    At the start of training its gates and its output are zero.
    """

    text_width_fields = ("caption_channels",)
    config: ModernDiTConfig

    def __init__(self, config: ModernDiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.pos_embed = PatchEmbed(config.in_channels, width, patch)
        self.time_embedding = TimestepEmbedding(SINUSOIDAL_WIDTH, width)
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
        """Initialise as DiT (appendix A).

        Xavier for matrices, N(0, 0.02) for embeddings, 0 for modulation and output.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.config.width, -1))
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        if self.config.register_tokens:
            nn.init.normal_(self.registers, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The network's target.

        Args:
            x: Noisy latent, of any sides.
            timestep: In 0..1000.
            cond: `tokens` (B, L, D) with `mask` are the text, `vector` (B, V) the class, where the
                network has these; `concat` joins x along channels.

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        size, c = x.shape[2:], self._embed(timestep, cond, x.dtype)
        x = padded(self.join_concat(x, cond), self.patch)
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch

        # patches, and behind them tokens without a position
        x = self.pos_embed(x)  # (B, N, D)
        if self.config.positions == "sincos":
            base = self.config.sample_size // self.patch
            x = x + sincos_2d(self.config.width, rows, columns, base).to(x)
        count = x.shape[1]
        others, mask = self._unpositioned(x, cond)
        x = torch.cat([x, others], dim=1)
        rope = None
        if self.config.positions == "rope":
            # a compiler's tensors cannot be cached
            compute = _rope.__wrapped__ if torch.compiler.is_compiling() else _rope
            rope = compute(self.config, others.shape[1], rows, columns, x.device)

        for block in self.transformer_blocks:
            x = block(x, c, rope, mask, count)

        shift, scale = self.norm_out(c)
        return self.unpatchify(self.proj_out(modulated(x[:, :count], scale, shift)), size)

    def _embed(
        self, timestep: Float[Tensor, " B"], cond: Conditioning, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time, class and the mean of the text tokens as one embedding."""
        c = self.time_embedding.embed(timestep, dtype)
        if self.class_embedding is not None:
            classes = self.require(cond, "vector", self.classes, "is class-conditional")
            c = c + batch_invariant.linear(classes.to(dtype), self.class_embedding.weight.T)
        if self.config.caption_channels:
            width = self.config.caption_channels
            text = self.require(cond, "tokens", width, f"reads tokens of width {width}")
            counts = (
                torch.ones_like(text[..., :1])
                if cond.mask is None
                else cond.mask[..., None].to(dtype)
            )
            mean = (self.caption_norm(text) * counts).sum(1) / counts.sum(1).clamp(min=1)
            c = c + self.caption_embedding(mean)
        return c

    def _unpositioned(
        self, x: Float[Tensor, "B N D"], cond: Conditioning
    ) -> tuple[Float[Tensor, "B M D"], Bool[Tensor, "B L"] | None]:
        """Registers and text tokens, and the mask of all tokens (None: nothing is masked)."""
        parts: list[Tensor] = []
        mask = None
        if self.config.register_tokens:
            parts.append(self.registers.to(x.dtype).expand(len(x), -1, -1))
        if self.config.caption_channels:
            parts.append(self.caption_projection(self.caption_norm(cond.tokens)))
            mask = with_image_tokens(cond.mask, x.shape[1] + self.config.register_tokens)
        return torch.cat(parts, dim=1) if parts else x[:, :0], mask

    @property
    def learned_variance(self) -> bool:
        """True where a variance follows the target: the output has twice the channels."""
        return self.config.out_channels == 2 * self.config.in_channels

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        if self.learned_variance:
            return self.config.in_channels
        return self.config.out_channels or self.config.in_channels

    @property
    def token_width(self) -> int | None:
        """Channels of `Conditioning.tokens`; None: no text."""
        return self.config.caption_channels

    @classmethod
    def class_fields(cls, count: int) -> dict[str, Any]:
        """Fields for `count` classes: a row for each, and one for no class."""
        return {"num_class_embeds": count + 1}

    @property
    def classes(self) -> int:
        """Rows of the table of classes, one of them for no class; 0: no classes."""
        return self.config.num_class_embeds or 0


@lru_cache(maxsize=32)
def _rope(
    config: ModernDiTConfig, unpositioned: int, rows: int, columns: int, device: torch.device
) -> Float[Tensor, "N d 2"]:
    """Rotations (cos, sin) of all tokens, cached: not to be changed in place.

    Rows and columns have half of a head's pairs each. Tokens without a position are at the origin.
    """
    half = config.attention_head_dim // 2
    with torch.inference_mode(False):
        positions = grid(rows, columns, device)
        origin = angles(positions.new_zeros(unpositioned, 2), (half, half), config.rope_theta)
        return torch.cat([angles(positions, (half, half), config.rope_theta), origin])


CLASSES = {"SfumatoDiT": (ModernDiT, ModernDiTConfig)}
