"""T5's encoder inside single files, which has transformers' own names (T5EncoderModel).

Raffel et al. 2019, arXiv:1910.10683; version 1.1 with gated MLPs, Shazeer 2020, arXiv:2002.05202.
`encoder.embed_tokens.weight` is the table of tokens once more, which some files hold.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import Config, Tower
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors, load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, weight
from sfumato.errors import explained
from sfumato.predict.text_encoders.t5 import (
    CLASS,
    EMBED,
    SPIECE,
    T5Encoder,
    build_t5,
    load_tokenizer,
)


@dataclass(frozen=True)
class T5Tower(Tower):
    """T5's encoder, version 1.1."""

    decisive = (
        "feed_forward_proj",
        "layer_norm_epsilon",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    )
    tokenizer_class = "T5TokenizerFast"
    eight_bits = True

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """transformers' fields of T5EncoderModel."""
        first = "encoder.block.0.layer"
        inner = shapes.size(f"{first}.0.SelfAttention.q.weight", 0, 2)
        buckets, heads = (
            shapes.size(f"{first}.0.SelfAttention.relative_attention_bias.weight", axis, 2)
            for axis in (0, 1)
        )
        return {
            "architectures": [CLASS],
            "model_type": "t5",
            "d_model": shapes.size("encoder.final_layer_norm.weight"),
            "d_kv": inner // max(heads, 1),
            "d_ff": shapes.size(f"{first}.1.DenseReluDense.wi_0.weight", 0, 2),
            "num_heads": heads,
            "num_layers": shapes.count("encoder.block."),
            "vocab_size": shapes.size("shared.weight", 0, 2),
            "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": 1e-6,
            "is_encoder_decoder": False,
            "use_cache": False,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """transformers' names, but for the table of tokens once more."""
        return [weight(name, name, *shape) for name, shape in _t5(config)]

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """The table of tokens once more, and a scale that other towers have."""
        return {self.prefix + EMBED, f"{self.prefix.removesuffix('transformer.')}logit_scale"}

    def named(self, tensors: LazyTensors) -> dict[str, LazyTensor]:
        """Without the table of tokens once more."""
        return {key: lazy for key, lazy in tensors.items() if key != EMBED}

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> T5Encoder:
        """The encoder with the tokenizer of a folder."""
        assert tokenizer is not None, "T5's is in no package"
        opened, path = load_tokenizer(tokenizer), raw.path
        model = build_t5(
            component.config,
            load_tensors(component.tensors),
            options.opened,
            path,
            path,
            lambda: options.opened is None,
        )
        spiece = (tokenizer / SPIECE).read_bytes() if (tokenizer / SPIECE).exists() else None
        with explained(path):
            return T5Encoder(opened, model, spiece)


def _t5(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, forward = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    yield "shared.weight", (config["vocab_size"], width)
    for k in range(config["num_layers"]):
        layers = f"encoder.block.{k}.layer"
        for a in "qkv":
            yield f"{layers}.0.SelfAttention.{a}.weight", (inner, width)
        yield f"{layers}.0.SelfAttention.o.weight", (width, inner)
        if k == 0:
            buckets = config.get("relative_attention_num_buckets", 32)
            yield (
                f"{layers}.0.SelfAttention.relative_attention_bias.weight",
                (buckets, config["num_heads"]),
            )
        yield f"{layers}.0.layer_norm.weight", (width,)
        for name in ("wi_0", "wi_1"):
            yield f"{layers}.1.DenseReluDense.{name}.weight", (forward, width)
        yield f"{layers}.1.DenseReluDense.wo.weight", (width, forward)
        yield f"{layers}.1.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)
