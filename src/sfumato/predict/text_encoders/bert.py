"""Latent Diffusion's text transformer with its tokenizer, in diffusers' layout.

[CLS], word pieces (WordPiece; Devlin et al. 2019, arXiv:1810.04805, section 3.2), [SEP], and
padding up to the last position, which is attended to like the rest: so it was trained.

    tokenizer/   vocab.txt or tokenizer.json; tokenizer_config.json
    bert/        config.json and model.safetensors, in diffusers' names of LDMBertModel
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import UserError, explained, quoted
from sfumato.io.atomic import hash_json, read_table
from sfumato.predict.text_encoders._transformers import (
    build_network,
    check_tokenizer,
    load_network,
    open_tokenizer,
    spell_out,
)
from sfumato.predict.text_encoders.base import Encoder, require_transformers
from sfumato.predict.text_encoders.ldm_bert import LDMBert, LDMBertConfig

CLASS = "LDMBertModel"


@dataclass(frozen=True, eq=False)
class BertEncoder(Encoder):
    """Latent Diffusion's text encoder.

    Attributes:
        tokenizer: A `BertTokenizer`.
        model: The network.
    """

    model: LDMBert

    def __post_init__(self) -> None:
        require_wordpiece(self.tokenizer, self.model.config.vocab_size)
        if self.length < 3:
            raise UserError(
                f"max_position_embeddings={self.length}: expected at least 3, for [CLS], a word "
                "and [SEP]"
            )

    @property
    def class_name(self) -> str:
        """The network's class in model_index.json and config.json."""
        return CLASS

    @property
    def length(self) -> int:
        """Positions of a prompt, with [CLS] and [SEP]."""
        return self.model.config.max_position_embeddings

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.model.config.d_model

    def token_ids(self, text: str) -> list[int]:
        """Ids of the tokens at all positions; `UserError` for a text that is too long."""
        ids = self.tokenizer(spell_out(self.tokenizer, text), verbose=False)["input_ids"]
        if len(ids) > self.length:
            raise UserError(
                f"prompt {quoted(text)} has {len(ids) - 2} tokens: expected at most "
                f"{self.length - 2}; shorten it"
            )
        return [*ids, *[self.tokenizer.pad_token_id] * (self.length - len(ids))]

    @torch.no_grad()
    def encode(self, text: str) -> Float[Tensor, "L D"]:
        """One text -> the states of all positions in float32.

        Raises:
            UserError: For a text that is too long.
        """
        # One row at a time: a prompt's bits do not depend on its neighbours.
        return self.model(torch.tensor([self.token_ids(text)], device=self.model.device))[0].float()

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the states: config and tokenizer."""
        settings = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules = [settings[key] for key in ("normalizer", "pre_tokenizer", "model")]
        return {"config": self.model.config.to_dict(), "tokenizer": hash_json(rules)}

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, as diffusers writes it."""
        return self.model.config.to_dict()

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's folder."""
        super().write_tokenizer(folder)
        write_vocabulary(self.tokenizer, folder)


def load_bert(tokenizer: Path, bert: Path, dtype: torch.dtype | None) -> BertEncoder:
    """Open a tokenizer's and a network's folder.

    Args:
        tokenizer: The tokenizer's folder.
        bert: The network's folder.
        dtype: Of the weights; None leaves them as stored and unread, to be streamed.

    Raises:
        UserError: For files that are missing, of another kind, or not finite.
    """
    loaded = load_tokenizer(tokenizer)
    config = bert / "config.json"
    kind = read_table(config).get("model_type", "ldmbert")
    if kind != "ldmbert":
        raise UserError(f"{config} is of type {kind!r}: expected ldmbert")
    model = load_network(bert, dtype, None, build_bert)
    with explained(tokenizer):
        return BertEncoder(loaded, model)


def build_bert(
    values: dict[str, Any],
    tensors: dict[str, Any],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    check_files: Callable[[], bool] | None = None,
) -> LDMBert:
    """The network of a config and its weights.

    Args:
        values: The config.
        tensors: Weights by the network's names.
        dtype: Of the weights; None leaves them as stored and unchecked, to be streamed.
        path: Where the config is from, for messages.
        file: Where the weights are from, for messages.
        check_files: Checks the files for NaN and infinity and returns True, or returns False where
            it cannot.

    Raises:
        UserError: For unknown fields, keys that do not fit and weights that are not finite.
    """
    return build_network(
        lambda: LDMBert(LDMBertConfig.from_dict(values)),
        tensors,
        {},
        lambda key: dtype,
        path,
        file,
        check_files or (lambda: dtype is None),
    )


# ---- BERT's tokenizer, which sentence encoders have too ------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """Open the `BertTokenizer` of a folder.

    Raises:
        UserError: For a tokenizer that is missing or of another kind.
    """
    require_transformers()
    expected = "BERT's tokenizer.json or vocab.txt"
    return open_tokenizer(folder, "BertTokenizer", expected, ("tokenizer.json",), ("vocab.txt",))


def require_wordpiece(tokenizer: Any, vocabulary: int) -> None:
    """Check that a tokenizer is BERT's and fits a network.

    Args:
        tokenizer: A tokenizer of transformers.
        vocabulary: Rows of the network's table of tokens.

    Raises:
        UserError: For another kind of tokenizer, and tokens beyond the vocabulary.
    """
    check_tokenizer(tokenizer, "cls sep pad", "BERT's", "text transformer", vocabulary, at_least=5)


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write vocab.txt, which older programs read, beside a `BertTokenizer`'s own files."""
    tokenizer.backend_tokenizer.model.save(str(folder))
