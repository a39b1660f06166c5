"""T5's encoder (Raffel et al. 2019, arXiv:1910.10683; version 1.1 with gated MLPs, Shazeer 2020,
arXiv:2002.05202): transformers' T5EncoderModel <-> `text_encoders.t5xxl.transformer.*` in single
files, which has the same names.

`encoder.embed_tokens.weight` is the table of tokens once more, which some files hold and some do
not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Row, row

TIED = "encoder.embed_tokens.weight"
Config = Mapping[str, Any]


def t5_rows(config: Config) -> list[Row]:
    """The whole table for transformers' config fields, but for `TIED`."""
    return [row(name, name, *shape) for name, shape in _t5(config)]


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
