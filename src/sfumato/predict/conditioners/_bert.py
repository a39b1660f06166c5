"""Latent Diffusion's text transformer with its tokenizer, read from and written to folders in
diffusers' layout.

[CLS], the words in pieces (WordPiece; Devlin et al. 2019, arXiv:1810.04805, section 3.2), [SEP],
and padding up to the last position, which is attended to like the rest: so it was trained.

    tokenizer/   vocab.txt or tokenizer.json; tokenizer_config.json
    bert/        config.json and model.safetensors, in diffusers' names of LDMBertModel
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import NumericalError, UserError, explained
from sfumato.io.atomic import hash_json, read_table, write_json, write_tensors
from sfumato.io.safetensors import (
    check_keys,
    find_weights,
    not_finite,
    read_weights,
    require_finite,
)
from sfumato.predict.conditioners._ldm_bert import LDMBert, LDMBertConfig
from sfumato.predict.conditioners._prompt import shown

STEM, PICKLED = "model", "pytorch_model"


@dataclass(frozen=True, eq=False)
class BertEncoder:
    """tokenizer: a `BertTokenizer`. model: the network."""

    tokenizer: Any
    model: LDMBert

    def __post_init__(self) -> None:
        require_words(self.tokenizer, self.model.config.vocab_size)
        if self.length < 3:
            raise UserError(
                f"max_position_embeddings={self.length}: expected at least 3, for [CLS], a word and [SEP]"
            )

    @property
    def length(self) -> int:
        """Positions of a prompt, with [CLS] and [SEP]."""
        return self.model.config.max_position_embeddings

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.model.config.d_model

    @torch.no_grad()
    def encode(self, text: str) -> Float[Tensor, "L D"]:
        """The states of all positions, float32; `UserError` for a text that does not fit. One row
        at a time: its bits have no neighbours.
        """
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > self.length:
            raise UserError(
                f"prompt {shown(text)} has {len(ids) - 2} tokens: expected at most {self.length - 2}; shorten it"
            )
        ids += [self.tokenizer.pad_token_id] * (self.length - len(ids))
        return self.model(torch.tensor([ids], device=self.model.device))[0].float()

    def identity(self) -> dict[str, Any]:
        """What decides its states besides the weights, as JSON: its numbers, and a hash over how it
        reads text.
        """
        known = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return {
            "config": self.model.config.to_dict(),
            "tokenizer": hash_json([known[k] for k in ("normalizer", "pre_tokenizer", "model")]),
        }

    def save(self, tokenizer: Path, bert: Path, dtype: torch.dtype | None = None) -> None:
        """Writes both folders; the weights in `dtype`, by default their own. `NumericalError` for
        weights that are not finite in it.
        """
        tensors = {
            key: tensor if dtype is None else tensor.to(dtype)
            for key, tensor in self.model.state_dict().items()
        }
        for key in not_finite(tensors):
            raise NumericalError(
                f"weight {key} of {bert.name} is NaN or infinite in {tensors[key].dtype}: nothing was written"
            )
        bert.mkdir(parents=True, exist_ok=True)
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_json(bert / "config.json", {**self.model.config.to_dict(), "torch_dtype": stored})
        write_tensors(bert / f"{STEM}.safetensors", tensors)
        write_tokenizer(self.tokenizer, tokenizer)


def read_encoder(tokenizer: Path, bert: Path, dtype: torch.dtype | None) -> BertEncoder:
    """Opens both folders; `UserError` for what is missing, of another kind, or not finite. dtype
    None: as stored, to be streamed.
    """
    opened = read_tokenizer(tokenizer)
    config = bert / "config.json"
    values = read_table(config)
    if values.get("model_type", "ldmbert") != "ldmbert":
        raise UserError(f"{config} is of type {values.get('model_type')!r}: expected ldmbert")
    files = find_weights(bert, STEM, None, PICKLED)
    model = build_bert(
        values, read_weights(files), dtype, config, files[0] if len(files) == 1 else bert
    )
    with explained(tokenizer):
        return BertEncoder(opened, model)


def read_tokenizer(folder: Path) -> Any:
    """The `BertTokenizer` of a folder; `UserError` where there is none."""
    try:
        from transformers import BertTokenizer
    except ImportError as error:
        raise UserError(
            "text prompts need the package transformers: run `pip install 'sfumato[text]'`"
        ) from error
    # Without its files the library makes a tokenizer of five tokens, and says nothing.
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{folder} has no tokenizer: expected BERT's tokenizer.json or vocab.txt")
    config = folder / "tokenizer_config.json"
    name = (
        str(read_table(config).get("tokenizer_class", "BertTokenizer"))
        if config.exists()
        else "BertTokenizer"
    )
    if name.removesuffix("Fast") != "BertTokenizer":
        raise UserError(f"{config} is of class {name!r}: expected BertTokenizer")
    with explained(folder):
        return BertTokenizer.from_pretrained(folder, local_files_only=True)


def require_words(tokenizer: Any, vocabulary: int) -> None:
    """`UserError` for a tokenizer that is not BERT's, or has tokens that a text transformer of so
    many does not know.
    """
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    if None in special or len(tokenizer) < 5:
        raise UserError(
            f"tokenizer has {len(tokenizer)} tokens, [CLS], [SEP] and [PAD] are {special}: expected BERT's; copy its files again"
        )
    if max(len(tokenizer) - 1, *special) >= vocabulary:
        raise UserError(
            f"tokenizer has {len(tokenizer)} tokens, text transformer {vocabulary}: use parts of one model"
        )


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a `BertTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.txt, which older programs read


def build_bert(
    values: dict[str, Any], found: dict[str, Any], dtype: torch.dtype | None, path: Path, file: Path
) -> LDMBert:
    """The network of a config and its weights. path, file: where they are from, for what is said
    about them.
    """
    with explained(path), torch.device("meta"):
        model = LDMBert(LDMBertConfig.from_dict(values))
    check_keys(model.state_dict(), found, file)
    if dtype is not None:  # else they are looked at when they are used
        require_finite(found, file)
    model.load_state_dict(
        {k: (v if dtype is None else v.to(dtype)).contiguous() for k, v in found.items()},
        assign=True,
    )
    return model.eval().requires_grad_(False)
