"""T5's encoder inside single files, which has transformers' own names (T5EncoderModel).

Raffel et al. 2019, arXiv:1910.10683; version 1.1 with gated MLPs, Shazeer 2020, arXiv:2002.05202.
`encoder.embed_tokens.weight` is the table of tokens once more, which some files hold.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import Config, Tower
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors, load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, weight
from sfumato.errors import explained
from sfumato.predict.text_encoders import t5

_BIAS = "SelfAttention.relative_attention_bias.weight"


class T5Tower(Tower):
    """T5's encoder, version 1.1."""

    decisive = (
        *("feed_forward_proj", "layer_norm_epsilon", "num_heads"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )
    tokenizer_class = "T5TokenizerFast"
    eight_bits = True

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in the fields of transformers' T5EncoderModel."""
        first = "encoder.block.0.layer"
        inner = shapes.size(f"{first}.0.SelfAttention.q.weight", 0, 2)
        buckets, heads = (shapes.size(f"{first}.0.{_BIAS}", axis, 2) for axis in (0, 1))
        return {
            "architectures": [t5.CLASS],
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
        """Table with transformers' names, with the table of tokens once."""
        return [weight(name, name, *shape) for name, shape in _t5(config)]

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """The table of tokens once more, and a scale that other towers have."""
        return {self.prefix + t5.EMBED, f"{self.prefix.removesuffix('transformer.')}logit_scale"}

    def named(self, tensors: LazyTensors) -> dict[str, LazyTensor]:
        """Tensors with the table of tokens once."""
        return {key: lazy for key, lazy in tensors.items() if key != t5.EMBED}

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> t5.T5Encoder:
        """The encoder with the tokenizer of a folder."""
        assert tokenizer is not None, "T5's is in no package"
        opened, path, dtype = t5.load_tokenizer(tokenizer), raw.path, options.opened
        tensors = load_tensors(component.tensors)
        model = t5.build_t5(component.config, tensors, dtype, path, path, lambda: dtype is None)
        file = tokenizer / t5.SPIECE
        spiece = file.read_bytes() if file.exists() else None
        with explained(path):
            return t5.T5Encoder(opened, model, spiece)


def _t5(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, forward = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    yield "shared.weight", (config["vocab_size"], width)
    for k in range(config["num_layers"]):
        attention, mlp = f"encoder.block.{k}.layer.0", f"encoder.block.{k}.layer.1"
        for a in "qkv":
            yield f"{attention}.SelfAttention.{a}.weight", (inner, width)
        yield f"{attention}.SelfAttention.o.weight", (width, inner)
        if k == 0:
            buckets = config.get("relative_attention_num_buckets", 32)
            yield f"{attention}.{_BIAS}", (buckets, config["num_heads"])
        yield f"{attention}.layer_norm.weight", (width,)
        yield f"{mlp}.DenseReluDense.wi_0.weight", (forward, width)
        yield f"{mlp}.DenseReluDense.wi_1.weight", (forward, width)
        yield f"{mlp}.DenseReluDense.wo.weight", (width, forward)
        yield f"{mlp}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)
