"""A sentence encoder with its tokenizer: BERT's network (Devlin et al. 2019, arXiv:1810.04805)
trained so that the mean of a sentence's states tells what it means (Reimers & Gurevych 2019,
arXiv:1908.10084, section 3), small ones by distillation (MiniLM: Wang et al. 2020,
arXiv:2002.10957).

[CLS], the words in pieces (WordPiece), [SEP], padding; the states of all positions after the last
layer. Run by transformers, without the pooler, which is for other tasks.

    tokenizer/      tokenizer.json or vocab.txt; tokenizer_config.json
    text_encoder/   config.json and model.safetensors (or shards, or a variant, or pickled)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError, explained
from sfumato.predict.conditioners._bert import read_tokenizer, require_words, write_tokenizer
from sfumato.predict.conditioners._parts import (
    ANY,
    check_fields,
    fill,
    read_network,
    require_count,
    require_transformers,
    table,
)
from sfumato.predict.conditioners._reading import Encoder

CLASS = "BertModel"
WORDS = "embeddings.word_embeddings.weight"
"""By this key the prefix is found which the weights have where BERT was a part of something."""
COMPUTED = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Buffers that files of older versions have, and that follow from the config."""
HEADS = ("pooler.", "cls.")
"""What is built on top of the states, or was in training: not read."""
OLD = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
"""Names of the time before PyTorch."""
HARMLESS = {
    "gradient_checkpointing",
    "position_embedding_type",
    "directionality",
    "classifier_dropout",
    "tie_word_embeddings",
}
HARMLESS |= {
    f"pooler_{name}"
    for name in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
}
"""Fields of older configs; of `position_embedding_type` there is one kind left, which is looked
for."""
RULES = ("normalizer", "pre_tokenizer")


@dataclass(frozen=True, eq=False)
class SentenceEncoder(Encoder):
    """tokenizer: a `BertTokenizer`. model: a `BertModel` without pooler."""

    NAME = CLASS
    DECISIVE = ("num_attention_heads", "hidden_act", "layer_norm_eps")

    def __post_init__(self) -> None:
        require_words(self.tokenizer, self.model.config.vocab_size)

    @property
    def length(self) -> int:
        """Positions that it knows, the most that a prompt can have."""
        return self.model.config.max_position_embeddings

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's folder."""
        write_tokenizer(self.tokenizer, folder)


def read_sentence(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> SentenceEncoder:
    """Opens both folders, which may be one; `UserError` for what is missing, of another kind, or
    not finite. dtype None: as stored, to be streamed. variant: the weights to prefer, such as
    "fp16".
    """
    require_transformers()
    model = read_network(encoder, dtype, variant, build_sentence)
    opened = read_tokenizer(tokenizer)
    _check_rules(tokenizer, opened)
    with explained(tokenizer, ANY):
        return SentenceEncoder(opened, model)


def _check_rules(folder: Path, tokenizer: Any) -> None:
    """`UserError` where tokenizer.json reads text otherwise than the library, which goes by
    tokenizer_config.json and says nothing.
    """
    known, said = json.loads(tokenizer.backend_tokenizer.to_str()), table(folder / "tokenizer.json")
    for rule in RULES:
        if said and said.get(rule) != known[rule]:
            raise UserError(
                f"{folder}/tokenizer.json has the {rule} {said.get(rule)!r}, and tokenizer_config.json means {known[rule]!r}: expected the same "
                "(do_lower_case, strip_accents and tokenize_chinese_chars there decide)"
            )


def build_sentence(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    looked: Any,
) -> Any:
    """The encoder of a config and its weights. path, file: where they are from, for what is said
    about them. looked: looks for NaN and infinity there, and says whether it did.
    """
    import transformers

    if values.get("model_type") != "bert":
        raise UserError(
            f"{path} is of type {values.get('model_type')!r}, {values.get('architectures')}: expected bert, {CLASS}"
        )
    check_fields(
        values, set(transformers.BertConfig().to_dict()) | HARMLESS, path, "a sentence encoder"
    )
    for field, known in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if values.get(field, known) != known:
            raise UserError(
                f"{path}: {field}={values[field]!r} is not supported in a sentence encoder: expected {known!r}"
            )

    def build() -> Any:
        config = transformers.BertConfig.from_dict({**values, "chunk_size_feed_forward": 0})
        _check_config(config)
        return transformers.BertModel(config, add_pooling_layer=False)

    return fill(build, _bare(tensors), {}, lambda key: dtype, path, file, looked)


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the encoder alone, by the names of today."""
    found = [key.removesuffix(WORDS) for key in tensors if key.endswith(WORDS)]
    prefix = found[0] if len(found) == 1 else ""
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for old, new in OLD:
        bare = {
            key.replace(old, new) if key.endswith(old) else key: tensor
            for key, tensor in bare.items()
        }
    return {
        key: tensor
        for key, tensor in bare.items()
        if key not in COMPUTED and not key.startswith(HEADS)
    }


def _check_config(config: Any) -> None:
    """What transformers would build and then stumble over."""
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "type_vocab_size",
    ):
        require_count(field, getattr(config, field))
    require_count("max_position_embeddings", config.max_position_embeddings, 3)
    if not isinstance(config.layer_norm_eps, float) or not 0 < config.layer_norm_eps < 1:
        raise UserError(
            f"layer_norm_eps={config.layer_norm_eps!r}: expected a number above 0 and below 1"
        )
