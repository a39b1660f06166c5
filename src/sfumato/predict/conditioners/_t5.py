"""The encoder half of T5 with its tokenizer (Raffel et al. 2020, arXiv:1910.10683, section 2.1),
read from and written to folders in diffusers' layout, run by transformers.

Words in pieces (SentencePiece), the end token, padding; the states of all positions after the final
norm. Positions are told by a bias of the attention that depends on their distance, so that any
length will do. PixArt, SD 3 and FLUX.1 read T5 version 1.1 XXL, 4096 wide.

    tokenizer/      tokenizer.json or spiece.model; tokenizer_config.json
    text_encoder/   config.json and model.safetensors (or shards, or a variant)

In float16 the sums of the feed-forward layers overflow: as in transformers, their second matrix
(`wo`) stays in float32 there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError, explained
from sfumato.io.atomic import atomic_file
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

CLASS = "T5EncoderModel"
SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
"""One table of tokens under two names; files have either, or both."""
SPIECE = "spiece.model"
HARMLESS = {"decoder_start_token_id", "tie_word_embeddings", "n_positions", "bos_token_id"}
"""Fields of configs that change nothing in the encoder."""


@dataclass(frozen=True, eq=False)
class T5Encoder(Encoder):
    """tokenizer: a `T5Tokenizer`. model: a `T5EncoderModel`. spiece: the bytes of spiece.model,
    which older programs read, if the folder had it.
    """

    NAME = CLASS
    DECISIVE = (
        *("num_heads", "feed_forward_proj", "dense_act_fn", "is_gated_act", "layer_norm_epsilon"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )
    spiece: bytes | None = None

    def __post_init__(self) -> None:
        special = [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]
        if None in special or len(self.tokenizer) < 4:
            raise UserError(
                f"tokenizer has {len(self.tokenizer)} tokens, end and padding are {special}: expected T5's; copy its files again"
            )
        if max(len(self.tokenizer) - 1, *special) >= self.model.config.vocab_size:
            raise UserError(
                f"tokenizer has {len(self.tokenizer)} tokens, text encoder {self.model.config.vocab_size}: use parts of one model"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by the names that files have. Not copies."""
        return {key: tensor for key, tensor in self.model.state_dict().items() if key != EMBED}

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        if self.spiece is not None:
            with atomic_file(folder / SPIECE) as temporary:
                temporary.write_bytes(self.spiece)


def read_t5(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> T5Encoder:
    """Opens both folders; `UserError` for what is missing, of another kind, or not finite. variant:
    the weights to prefer, such as "fp16".
    """
    require_transformers()
    opened, model = read_tokenizer(tokenizer), read_network(encoder, dtype, variant, build_t5)
    spiece = (tokenizer / SPIECE).read_bytes() if (tokenizer / SPIECE).exists() else None
    with explained(tokenizer, ANY):
        return T5Encoder(opened, model, spiece)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; `UserError` for one that is missing or of another kind."""
    from transformers import T5Tokenizer

    # Without its files the library makes a tokenizer of a few tokens, and says nothing.
    if not (folder / "tokenizer.json").exists():
        if not (folder / SPIECE).exists():
            raise UserError(f"{folder} has no tokenizer: expected T5's tokenizer.json or {SPIECE}")
        _require_sentencepiece(folder)
    config = folder / "tokenizer_config.json"
    name = str(table(config).get("tokenizer_class", "T5Tokenizer"))
    if name.removesuffix("Fast") != "T5Tokenizer":
        raise UserError(f"{config} is of class {name!r}: expected T5Tokenizer")
    with explained(folder, ANY):
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def _require_sentencepiece(folder: Path) -> None:
    """`UserError` without the packages that read spiece.model: transformers would take the file for
    one of another kind.
    """
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece

        sentencepiece.SentencePieceProcessor(model_file=str(folder / SPIECE))
    except ImportError as error:
        raise UserError(
            f"{folder}/{SPIECE} needs the packages sentencepiece and protobuf: run `pip install 'sfumato[text]'`"
        ) from error
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{folder}/{SPIECE} is not a SentencePiece model: copy or download it again"
        ) from error


def build_t5(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    looked: Any = lambda: False,
) -> Any:
    """The encoder of a config and its weights. path, file: where they are from, for what is said
    about them. looked: looks for NaN and infinity there, and says whether it did.
    """
    import transformers

    built_as = values.get("architectures") or [CLASS]
    if values.get("model_type") != "t5" or built_as not in (
        [CLASS],
        ["T5ForConditionalGeneration"],
    ):
        raise UserError(
            f"{path} is of type {values.get('model_type')!r}, {built_as}: expected t5, {CLASS}"
        )
    check_fields(
        values, set(transformers.T5Config().to_dict()) | HARMLESS, path, "a T5 text encoder"
    )

    def build() -> Any:
        config = transformers.T5Config.from_dict(values)
        _check_config(config)
        return transformers.T5EncoderModel(config)

    ours = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(("decoder.", "lm_head.")) and key != EMBED
    }
    if SHARED not in ours and EMBED in tensors:
        ours[SHARED] = tensors[EMBED]
    return fill(
        build,
        ours,
        {EMBED: SHARED},
        lambda key: torch.float32 if _is_wide(key, dtype) else dtype,
        path,
        file,
        looked,
    )


def _is_wide(key: str, dtype: torch.dtype | None) -> bool:
    """Whether a weight stays in float32."""
    return dtype == torch.float16 and key.endswith(".DenseReluDense.wo.weight")


def _check_config(config: Any) -> None:
    """What transformers would build and then stumble over."""
    for field in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
        require_count(field, getattr(config, field))
    require_count("relative_attention_num_buckets", config.relative_attention_num_buckets, 4)
    require_count(
        "relative_attention_max_distance",
        config.relative_attention_max_distance,
        config.relative_attention_num_buckets // 4 + 1,
    )
    if not isinstance(config.layer_norm_epsilon, float) or not 0 < config.layer_norm_epsilon < 1:
        raise UserError(
            f"layer_norm_epsilon={config.layer_norm_epsilon!r}: expected a number above 0 and below 1"
        )
    gate, _, act = config.feed_forward_proj.rpartition("-")
    follows = "gelu_new" if config.feed_forward_proj == "gated-gelu" else act
    if (config.dense_act_fn, config.is_gated_act) != (follows, gate == "gated"):
        raise UserError(
            f"feed_forward_proj={config.feed_forward_proj!r} with dense_act_fn={config.dense_act_fn!r}, is_gated_act={config.is_gated_act!r}: "
            f"expected {follows!r}, {gate == 'gated'}"
        )
