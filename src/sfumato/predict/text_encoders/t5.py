"""The encoder half of T5 with its tokenizer, run by transformers.

Raffel et al. 2020, arXiv:1910.10683, section 2.1. Word pieces (SentencePiece), the end token,
padding; the states of all positions after the final norm. Positions enter as a bias of the
attention that depends on their distance, so any length will do. PixArt, SD 3 and FLUX.1 take T5
version 1.1 XXL, 4096 wide.

    tokenizer/      tokenizer.json or spiece.model; tokenizer_config.json
    text_encoder/   config.json and model.safetensors (or shards, or a variant)

In float16 the sums of the feed-forward layers overflow: as in transformers, their second matrix
(`wo`) stays in float32 there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError, explained
from sfumato.io.atomic import atomic_file
from sfumato.io.signatures import another_kind
from sfumato.predict.text_encoders._transformers import (
    ANY,
    build_network,
    check_class,
    check_counts,
    check_fields,
    check_tokenizer,
    load_network,
    open_tokenizer,
    without_heads,
)
from sfumato.predict.text_encoders.base import SequenceEncoder, require_transformers
from sfumato.validate import number_in, whole_number

CLASS = "T5EncoderModel"
SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
"""One table of tokens under two names; files have either, or both."""
SPIECE = "spiece.model"
IGNORED_FIELDS = {"n_positions", "bos_token_id"}
"""Fields of configs that change nothing in the encoder."""


@dataclass(frozen=True, eq=False)
class T5Encoder(SequenceEncoder):
    """T5's encoder.

    Attributes:
        tokenizer: A `T5Tokenizer`.
        model: A `T5EncoderModel`.
        spiece: The bytes of spiece.model, which older programs read, if the folder had it.
    """

    CONFIG_FIELDS = (
        *("num_heads", "feed_forward_proj", "dense_act_fn", "is_gated_act", "layer_norm_epsilon"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )
    spiece: bytes | None = None

    def __post_init__(self) -> None:
        size = self.model.config.vocab_size
        check_tokenizer(self.tokenizer, "eos pad", "T5's", "text encoder", size)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the names that files have, the table of tokens once; not copies."""
        return {key: tensor for key, tensor in self.model.state_dict().items() if key != EMBED}

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's folder."""
        super().write_tokenizer(folder)
        if self.spiece is not None:
            with atomic_file(folder / SPIECE) as temporary:
                temporary.write_bytes(self.spiece)


def load_t5(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> T5Encoder:
    """Open a tokenizer's and a network's folder.

    Args:
        tokenizer: The tokenizer's folder.
        encoder: The network's folder.
        dtype: Of the weights; None leaves them as stored and unread, to be streamed.
        variant: The weights to prefer, such as "fp16".

    Raises:
        UserError: For files that are missing, of another kind, or not finite.
    """
    require_transformers()
    loaded, model = load_tokenizer(tokenizer), load_network(encoder, dtype, variant, build_t5)
    spiece = (tokenizer / SPIECE).read_bytes() if (tokenizer / SPIECE).exists() else None
    with explained(tokenizer, ANY):
        return T5Encoder(loaded, model, spiece)


def load_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder; `UserError` for one that is missing or of another kind."""
    if not (folder / "tokenizer.json").exists() and (folder / SPIECE).exists():
        _require_sentencepiece(folder)
    expected = f"T5's tokenizer.json or {SPIECE}"
    return open_tokenizer(folder, "T5Tokenizer", expected, ("tokenizer.json",), (SPIECE,))


def _require_sentencepiece(folder: Path) -> None:
    """Raise `UserError` without the packages that read spiece.model.

    transformers would take it for a file of another kind.
    """
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece

        sentencepiece.SentencePieceProcessor(model_file=str(folder / SPIECE))
    except ImportError as error:
        raise UserError(
            f"{folder}/{SPIECE} needs the packages sentencepiece and protobuf: run `pip install "
            "'sfumato[text]'`"
        ) from error
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{folder}/{SPIECE} is not a SentencePiece model: "
            f"{another_kind(folder / SPIECE, 'tokenizer') or 'copy or download it again'}"
        ) from error


def build_t5(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    check_files: Callable[[], bool] = lambda: False,
) -> Any:
    """The network of a config and its weights.

    Args:
        values: The config, of T5's encoder or of both halves.
        tensors: Weights by the names that files have; those of a decoder are left out.
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

    check_class(values, path, "t5", CLASS, "T5ForConditionalGeneration", "T5Model")
    check_fields(values, transformers.T5Config, IGNORED_FIELDS, path, "a T5 text encoder")

    def build() -> Any:
        config = transformers.T5Config.from_dict(values)
        _check_config(config)
        return transformers.T5EncoderModel(config)

    weights = without_heads(tensors, ("decoder.", "lm_head."), file)
    embed = weights.pop(EMBED, None)
    if SHARED not in weights and embed is not None:
        weights[SHARED] = embed

    def dtype_of(key: str) -> torch.dtype | None:
        overflows = dtype == torch.float16 and key.endswith(".DenseReluDense.wo.weight")
        return torch.float32 if overflows else dtype

    return build_network(build, weights, {EMBED: SHARED}, dtype_of, path, file, check_files)


def _check_config(config: Any) -> None:
    """Raise `UserError` for values that transformers would build and fail on later."""
    check_counts(config, "vocab_size d_model d_kv d_ff num_layers num_heads")
    check_counts(config, "relative_attention_num_buckets", at_least=4)
    least = config.relative_attention_num_buckets // 4 + 1
    whole_number("relative_attention_max_distance", config.relative_attention_max_distance, least)
    number_in("layer_norm_epsilon", config.layer_norm_epsilon, above=0, below=1)
    gate, _, act = config.feed_forward_proj.rpartition("-")
    activation = "gelu_new" if config.feed_forward_proj == "gated-gelu" else act
    if (config.dense_act_fn, config.is_gated_act) != (activation, gate == "gated"):
        raise UserError(
            f"feed_forward_proj={config.feed_forward_proj!r} with dense_act_fn="
            f"{config.dense_act_fn!r}, is_gated_act={config.is_gated_act!r}: expected "
            f"{activation!r}, {gate == 'gated'}"
        )
