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
from sfumato.checkpoints.families._layers import listed, matrix
from sfumato.checkpoints.lazy_tensor import load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import bert_tokenizer
from sfumato.checkpoints.weight_map import WeightMap, linear
from sfumato.errors import explained
from sfumato.predict.text_encoders.bert import BertEncoder, build_bert


class BertTower(Tower):
    """Latent Diffusion's text transformer."""

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in the fields of diffusers' LDMBertConfig."""
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

    @listed
    def weight_map(self, config: Config, bare: bool = False) -> Iterator[WeightMap]:
        """Table with diffusers' names."""
        width, inner = config["d_model"], config["encoder_ffn_dim"]
        heads = config["encoder_attention_heads"] * config["head_dim"]
        tokens, positions = config["vocab_size"], config["max_position_embeddings"]
        yield matrix("token_emb", "model.embed_tokens", tokens, width)
        yield matrix("pos_emb.emb", "model.embed_positions", positions, width)
        for k in range(config["encoder_layers"]):
            attention, target = f"attn_layers.layers.{2 * k}", f"model.layers.{k}"
            forward = f"attn_layers.layers.{2 * k + 1}"
            yield from linear(f"{attention}.0", f"{target}.self_attn_layer_norm", width)
            for a in "qkv":
                yield matrix(f"{attention}.1.to_{a}", f"{target}.self_attn.{a}_proj", heads, width)
            yield from linear(f"{attention}.1.to_out", f"{target}.self_attn.out_proj", width, heads)
            yield from linear(f"{forward}.0", f"{target}.final_layer_norm", width)
            yield from linear(f"{forward}.1.net.0.0", f"{target}.fc1", inner, width)
            yield from linear(f"{forward}.1.net.2", f"{target}.fc2", width, inner)
        yield from linear("norm", "model.layer_norm", width)
        yield from linear("to_logits", "to_logits", tokens, width)

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> BertEncoder:
        """The encoder with BERT's tokenizer."""
        path, tensors = raw.path, load_tensors(component.tensors)
        model = build_bert(component.config, tensors, options.opened, path, path)
        with explained(path, (Exception,)):
            length = model.config.max_position_embeddings
            return BertEncoder(bert_tokenizer(length, options.tokenizer, raw.metadata), model)
