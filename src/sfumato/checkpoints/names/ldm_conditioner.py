"""The conditioners of Latent Diffusion's own checkpoints (Rombach et al. 2022, arXiv:2112.10752,
appendix E): a BERT-like text transformer trained with the model, and a table of ImageNet classes.

The transformer is diffusers' LDMBertModel; theirs numbers attention and feed-forward as separate
layers, 2k and 2k + 1.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Row, pair, row

Config = Mapping[str, Any]


def bert_rows(config: Config) -> list[Row]:
    """LDMBertModel <-> `cond_stage_model.transformer.*`, without the prefix."""
    return list(_bert(config))


def _bert(config: Config) -> Iterator[Row]:
    width, inner, heads = (
        config["d_model"],
        config["encoder_ffn_dim"],
        config["encoder_attention_heads"] * config["head_dim"],
    )
    yield row("token_emb.weight", "model.embed_tokens.weight", config["vocab_size"], width)
    yield row(
        "pos_emb.emb.weight",
        "model.embed_positions.weight",
        config["max_position_embeddings"],
        width,
    )
    for k in range(config["encoder_layers"]):
        attention, forward, ours = (
            f"attn_layers.layers.{2 * k}",
            f"attn_layers.layers.{2 * k + 1}",
            f"model.layers.{k}",
        )
        yield from pair(f"{attention}.0", f"{ours}.self_attn_layer_norm", width)
        for a in ("q", "k", "v"):
            yield row(
                f"{attention}.1.to_{a}.weight", f"{ours}.self_attn.{a}_proj.weight", heads, width
            )
        yield from pair(f"{attention}.1.to_out", f"{ours}.self_attn.out_proj", width, heads)
        yield from pair(f"{forward}.0", f"{ours}.final_layer_norm", width)
        yield from pair(f"{forward}.1.net.0.0", f"{ours}.fc1", inner, width)
        yield from pair(f"{forward}.1.net.2", f"{ours}.fc2", width, inner)
    yield from pair("norm", "model.layer_norm", width)
    yield from pair("to_logits", "to_logits", config["vocab_size"], width)


def class_rows(config: Config) -> list[Row]:
    """`cond_stage_model.embedding.weight` (classes, width), one token a class; ours has the same
    name.
    """
    return [row("embedding.weight", "embedding.weight", config["n_classes"], config["embed_dim"])]
