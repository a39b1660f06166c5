"""The text transformer of Latent Diffusion, which was trained with its U-Net.

Rombach et al. 2022, arXiv:2112.10752, section 4.3.1, appendix E.2.1.

    x = E[token] + P[position]
    x += A(norm(x)),  x += W2 gelu(W1 norm(x))      in each layer
    norm(x)                                         at the end

A(x): attention of every position to all, padding too (Vaswani et al. 2017, arXiv:1706.03762), whose
q, k and v have no bias. Names and config are diffusers' LDMBertModel.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.validate import positive_int

_FIXED: dict[str, Any] = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "pad_token_id": 0,
    "model_type": "ldmbert",
}
_IGNORED_FIELDS = set(
    "dropout attention_dropout activation_dropout encoder_layerdrop classifier_dropout init_std "
    "use_cache num_hidden_layers architectures torch_dtype dtype transformers_version return_dict "
    "output_hidden_states output_attentions chunk_size_feed_forward is_encoder_decoder id2label "
    "label2id problem_type".split()
)
"""Fields of configs, transformers' own among them, that change no state in inference."""


@dataclass(frozen=True)
class LDMBertConfig:
    """The numbers of the transformer, with diffusers' names and defaults.

    Attributes:
        vocab_size: Rows of the table of tokens.
        max_position_embeddings: Positions of a text.
        encoder_layers: Number of layers.
        encoder_ffn_dim: Inner width of the feed-forward layers.
        encoder_attention_heads: Heads of attention.
        head_dim: Width of a head.
        d_model: Width of a position's state.
    """

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    d_model: int = 1280

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            positive_int(name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LDMBertConfig":
        """Read an LDMBertModel's config; `UserError` for unknown fields and unsupported values."""
        kept = {k: v for k, v in values.items() if k not in _IGNORED_FIELDS}
        return read_config(cls, kept, _FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' LDMBertModel reads."""
        return {"architectures": ["LDMBertModel"], **_FIXED, **asdict(self)}


class _Attention(nn.Module):
    def __init__(self, config: LDMBertConfig):
        super().__init__()
        width, inner = config.d_model, config.encoder_attention_heads * config.head_dim
        self.heads = config.encoder_attention_heads
        self.k_proj, self.v_proj, self.q_proj = (
            batch_invariant.Linear(width, inner, bias=False) for _ in range(3)
        )
        self.out_proj = batch_invariant.Linear(inner, width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.out_proj(
            batch_invariant.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads)
        )


class _Layer(nn.Module):
    def __init__(self, config: LDMBertConfig):
        super().__init__()
        self.self_attn = _Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = batch_invariant.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = batch_invariant.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(batch_invariant.gelu(self.fc1(self.final_layer_norm(x))))


class _Encoder(nn.Module):
    def __init__(self, config: LDMBertConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        x = self.embed_tokens(tokens) + self.embed_positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class LDMBert(nn.Module):
    """Token ids (B, L) -> states (B, L, d_model).

    `to_logits` is kept because the files have it: no state depends on it.
    """

    def __init__(self, config: LDMBertConfig):
        super().__init__()
        self.config = config
        self.model = _Encoder(config)
        self.to_logits = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Encode token ids.

        Raises:
            UserError: For more tokens than positions.
        """
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise UserError(
                f"{tokens.shape[1]} tokens: this text transformer has "
                f"{self.config.max_position_embeddings} positions"
            )
        return self.model(tokens)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.to_logits.weight.device
