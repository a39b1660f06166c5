"""The text transformer of Latent Diffusion's own text-to-image model.

Rombach et al. 2022, arXiv:2112.10752, appendix E: a BERT-like transformer trained with the model,
diffusers' LDMBertModel. The original numbers attention and feed-forward as separate layers, 2k and
2k + 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import Config, Tower
from sfumato.checkpoints.lazy_tensor import load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import bert_tokenizer
from sfumato.checkpoints.weight_map import WeightMap, linear, weight
from sfumato.errors import explained
from sfumato.predict.text_encoders.bert import BertEncoder, build_bert


class BertTower(Tower):
    """Latent Diffusion's text transformer."""

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields of LDMBertConfig."""
        return {
            "architectures": ["LDMBertModel"],
            "model_type": "ldmbert",
            "d_model": shapes.size("norm.weight"),
            "encoder_layers": shapes.count("attn_layers.layers.") // 2,
            # x-transformers' default, with heads of one eighth of the inner width
            "encoder_attention_heads": 8,
            "head_dim": shapes.size("attn_layers.layers.0.1.to_q.weight", 0, 2) // 8,
            "encoder_ffn_dim": shapes.size("attn_layers.layers.1.1.net.0.0.bias"),
            "vocab_size": shapes.size("token_emb.weight", 0, 2),
            "max_position_embeddings": shapes.size("pos_emb.emb.weight", 0, 2),
            "activation_function": "gelu",
            "scale_embedding": False,
            "pad_token_id": 0,
        }

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """diffusers' names."""
        return list(_bert(config))

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> BertEncoder:
        """The encoder with BERT's tokenizer."""
        path = raw.path
        model = build_bert(
            component.config, load_tensors(component.tensors), options.opened, path, path
        )
        with explained(path, (Exception,)):
            opened = bert_tokenizer(
                model.config.max_position_embeddings, options.tokenizer, raw.metadata
            )
            return BertEncoder(opened, model)


def _bert(config: Config) -> Iterator[WeightMap]:
    width, inner, heads = (
        config["d_model"],
        config["encoder_ffn_dim"],
        config["encoder_attention_heads"] * config["head_dim"],
    )
    yield weight("token_emb.weight", "model.embed_tokens.weight", config["vocab_size"], width)
    yield weight(
        "pos_emb.emb.weight",
        "model.embed_positions.weight",
        config["max_position_embeddings"],
        width,
    )
    for k in range(config["encoder_layers"]):
        attention, forward, target = (
            f"attn_layers.layers.{2 * k}",
            f"attn_layers.layers.{2 * k + 1}",
            f"model.layers.{k}",
        )
        yield from linear(f"{attention}.0", f"{target}.self_attn_layer_norm", width)
        for a in ("q", "k", "v"):
            yield weight(
                f"{attention}.1.to_{a}.weight", f"{target}.self_attn.{a}_proj.weight", heads, width
            )
        yield from linear(f"{attention}.1.to_out", f"{target}.self_attn.out_proj", width, heads)
        yield from linear(f"{forward}.0", f"{target}.final_layer_norm", width)
        yield from linear(f"{forward}.1.net.0.0", f"{target}.fc1", inner, width)
        yield from linear(f"{forward}.1.net.2", f"{target}.fc2", width, inner)
    yield from linear("norm", "model.layer_norm", width)
    yield from linear("to_logits", "to_logits", config["vocab_size"], width)
