"""A sentence encoder with its tokenizer, run by transformers.

It is BERT's network (Devlin et al. 2019, arXiv:1810.04805), trained so that the mean of a
sentence's states is an embedding of its meaning (Reimers & Gurevych 2019, arXiv:1908.10084, section
3); small ones are distilled (MiniLM: Wang et al. 2020, arXiv:2002.10957).

[CLS], word pieces (WordPiece), [SEP], padding; the states of all positions after the last layer,
without the pooler, which is for other tasks.

    tokenizer/      tokenizer.json or vocab.txt; tokenizer_config.json
    text_encoder/   config.json and model.safetensors (or shards, or a variant, or pickled)
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError, explained
from sfumato.predict.text_encoders._transformers import (
    ANY,
    build_network,
    check_class,
    check_counts,
    check_fields,
    load_network,
    read_optional_json,
)
from sfumato.predict.text_encoders.base import SequenceEncoder, require_transformers
from sfumato.predict.text_encoders.bert import load_tokenizer, require_wordpiece, write_vocabulary
from sfumato.validate import number_in

CLASS = "BertModel"
WORDS = "embeddings.word_embeddings.weight"
"""The key that shows the prefix of an encoder that was a part of another network."""
COMPUTED = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Buffers that files of older versions have, and that follow from the config."""
HEADS = ("pooler.", "cls.")
"""Prefixes of weights on top of the states, which are left out."""
LEGACY_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
"""Names of files from before PyTorch, and today's."""
IGNORED_FIELDS = set(
    "gradient_checkpointing position_embedding_type directionality classifier_dropout "
    "tie_word_embeddings pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
    "pooler_size_per_head pooler_type".split()
)
"""Fields of older configs; `position_embedding_type` is checked apart."""
RULES = ("normalizer", "pre_tokenizer")


@dataclass(frozen=True, eq=False)
class SentenceEncoder(SequenceEncoder):
    """A sentence encoder.

    Attributes:
        tokenizer: A `BertTokenizer`.
        model: A `BertModel` without pooler.
    """

    CONFIG_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")

    def __post_init__(self) -> None:
        require_wordpiece(self.tokenizer, self.model.config.vocab_size)

    @property
    def length(self) -> int:
        """Positions of the network, the most that a prompt can have."""
        return self.model.config.max_position_embeddings

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's folder."""
        super().write_tokenizer(folder)
        write_vocabulary(self.tokenizer, folder)


def load_sentence_encoder(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> SentenceEncoder:
    """Open a tokenizer's and a network's folder, which may be one.

    Args:
        tokenizer: The tokenizer's folder.
        encoder: The network's folder.
        dtype: Of the weights; None leaves them as stored and unread, to be streamed.
        variant: The weights to prefer, such as "fp16".

    Raises:
        UserError: For files that are missing, of another kind, or not finite.
    """
    require_transformers()
    model = load_network(encoder, dtype, variant, build_sentence_encoder)
    loaded = load_tokenizer(tokenizer)
    _check_rules(tokenizer, loaded)
    with explained(tokenizer, ANY):
        return SentenceEncoder(loaded, model)


def _check_rules(folder: Path, tokenizer: Any) -> None:
    """Raise `UserError` where tokenizer.json contradicts tokenizer_config.json.

    The library follows the latter without a warning.
    """
    used = json.loads(tokenizer.backend_tokenizer.to_str())
    stored = read_optional_json(folder / "tokenizer.json")
    for rule in RULES:
        if stored and stored.get(rule) != used[rule]:
            raise UserError(
                f"{folder}/tokenizer.json has the {rule} {stored.get(rule)!r}, and "
                f"tokenizer_config.json means {used[rule]!r}: expected the same (do_lower_case, "
                "strip_accents and tokenize_chinese_chars there decide)"
            )


def build_sentence_encoder(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    check_files: Callable[[], bool],
) -> Any:
    """The network of a config and its weights.

    Args:
        values: The config.
        tensors: Weights by the names that files have; those of heads are left out.
        dtype: Of the weights; None leaves them as stored, to be streamed.
        path: Where the config is from, for messages.
        file: Where the weights are from, for messages.
        check_files: Checks the files for NaN and infinity and returns True, or returns False where
            it cannot.

    Raises:
        UserError: For another kind of network, unknown fields, keys that do not fit and weights
            that are not finite.
    """
    import transformers

    check_class(values, path, "bert")
    check_fields(values, transformers.BertConfig, IGNORED_FIELDS, path, "a sentence encoder")
    supported = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
    for field, value in supported.items():
        if values.get(field, value) != value:
            raise UserError(
                f"{path}: {field}={values[field]!r} is not supported in a sentence encoder: "
                f"expected {value!r}"
            )

    def build() -> Any:
        config = transformers.BertConfig.from_dict({**values, "chunk_size_feed_forward": 0})
        _check_config(config)
        return transformers.BertModel(config, add_pooling_layer=False)

    return build_network(
        build, _encoder_weights(tensors), {}, lambda key: dtype, path, file, check_files
    )


def _encoder_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights by today's names."""
    prefixes = [key.removesuffix(WORDS) for key in tensors if key.endswith(WORDS)]
    prefix = prefixes[0] if len(prefixes) == 1 else ""
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for old, new in LEGACY_NAMES:
        weights = {
            key.replace(old, new) if key.endswith(old) else key: tensor
            for key, tensor in weights.items()
        }
    return {
        key: tensor
        for key, tensor in weights.items()
        if key not in COMPUTED and not key.startswith(HEADS)
    }


def _check_config(config: Any) -> None:
    """Raise `UserError` for values that transformers would build and fail on later."""
    check_counts(config, "vocab_size hidden_size intermediate_size num_hidden_layers")
    check_counts(config, "num_attention_heads type_vocab_size")
    check_counts(config, "max_position_embeddings", at_least=3)
    number_in("layer_norm_eps", config.layer_norm_eps, above=0, below=1)
