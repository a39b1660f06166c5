"""Conditioners of single files in the original layouts: parts of a file -> what reads prompts, and
back.

CLIP's text encoders and Latent Diffusion's text transformer need a tokenizer, which such files do
not hold; a table of classes may have names; the unconditional models have nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints import bert_tokenizer
from sfumato.checkpoints.names.ldm_unet import is_plain
from sfumato.checkpoints.original import Parts, Reading
from sfumato.checkpoints.tokenizer import CONDITIONER, END, KEY, clip_tokenizer, packed
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.bert_text import BertText
from sfumato.predict.conditioners.class_embedding import ClassEmbedding
from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.text_encoders.bert import BertEncoder, build_bert
from sfumato.predict.text_encoders.clip import POSITIONS, PREFIX, ClipEncoder, build_clip


@dataclass(frozen=True)
class Source:
    """A single file: its metadata, a folder with a tokenizer if the caller gave one, the dtype
    wanted, what the caller knows of it.

    as_stored: text encoders keep the file's dtype, and are not looked at: to be streamed.
    """

    path: Path
    notes: Mapping[str, str]
    tokenizer: str | Path | None
    dtype: torch.dtype
    reading: Reading
    as_stored: bool = False

    @property
    def opened(self) -> torch.dtype | None:
        """What the weights of text encoders become (None: what they are)."""
        return None if self.as_stored else self.dtype


def has_original(network: Any, conditioner: Conditioner) -> bool:
    """Whether models of such parts were published as single files, in a layout of `original.py`."""
    if not conditioner.is_conditional:
        return is_plain(network.to_config())
    return isinstance(conditioner, ClipText | BertText | ClassEmbedding)


def to_parts(conditioner: Conditioner) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Config and tensors of each part that a conditioner has in a single file."""
    if isinstance(conditioner, ClipText):
        return {
            f"text_encoder{end}": (e.to_config(), e.tensors())
            for end, e in conditioner.encoders.items()
        }
    if isinstance(conditioner, BertText):
        model = conditioner.encoder.model
        return {"bert": (model.config.to_dict(), model.state_dict())}
    if isinstance(conditioner, ClassEmbedding):
        rows, width = conditioner.table.shape
        return {
            "class_embedder": (
                {"_class_name": "ClassEmbedder", "n_classes": rows, "embed_dim": width},
                conditioner.tensors(),
            )
        }
    return {}


def to_notes(conditioner: Conditioner) -> dict[str, str]:
    """What goes into the file's metadata, because the layout has no place for it."""
    found = {CONDITIONER: json.dumps(conditioner.to_config())}
    if isinstance(conditioner, ClipText):
        return {KEY: packed(list(conditioner.encoders.values())[-1].tokenizer), **found}
    if isinstance(conditioner, BertText):
        return {KEY: bert_tokenizer.packed(conditioner.encoder.tokenizer), **found}
    return found


def from_parts(parts: Parts, source: Source) -> Conditioner:
    """What reads prompts for a file's networks; `UserError` where nothing does."""
    known = parts.networks.keys() - {"unet", "vae"}
    if not known and is_plain(parts.networks["unet"].config):
        return Unconditional()
    if known == {"bert"}:
        return _bert(parts, source)
    if known == {"class_embedder"}:
        return _classes(parts, source)
    if not known or known - {"text_encoder", "text_encoder_2"}:
        raise UserError(
            f"{source.path} is conditioned by {' and '.join(sorted(known)) or 'nothing'}: that is not run by this version"
        )
    return _clip(parts, source)


def _bert(parts: Parts, source: Source) -> BertText:
    part, path = parts.networks["bert"], source.path
    model = build_bert(part.config, part.tensors, source.opened, path, path)
    with explained(path, (Exception,)):
        tokenizer = bert_tokenizer.bert_tokenizer(
            model.config.max_position_embeddings, source.tokenizer, source.notes
        )
        return BertText(BertEncoder(tokenizer, model))


def _classes(parts: Parts, source: Source) -> ClassEmbedding:
    with explained(source.path):
        values = json.loads(source.notes.get(CONDITIONER, "{}"))
    if source.reading.class_names:
        values |= {"class_names": list(source.reading.class_names)}
    return ClassEmbedding.from_tensors(
        parts.networks["class_embedder"].tensors, values, source.dtype, source.path
    )


def _clip(parts: Parts, source: Source) -> ClipText:
    """CLIP's text encoders, with a tokenizer from elsewhere."""
    path = source.path
    ends = [end for end in ("", "_2") if f"text_encoder{end}" in parts.networks]
    encoders: dict[str, Any] = {}
    for end in ends:
        part, projected = parts.networks[f"text_encoder{end}"], end == "_2"
        tensors = {
            key.removeprefix(PREFIX): tensor
            for key, tensor in part.tensors.items()
            if not key.endswith(POSITIONS)
        }
        model = build_clip(part.config, tensors, projected, source.opened, path, path)
        # as they were trained
        pad = END if parts.family.startswith(("sd1", "sdxl")) and not projected else "!"
        # the libraries raise anything about a vocabulary that is none
        with explained(path, (Exception,)):
            tokenizer = clip_tokenizer(
                pad, model.config.max_position_embeddings, source.tokenizer, dict(source.notes)
            )
            encoders[end] = ClipEncoder(tokenizer, model, projected)
    flags = {
        "force_zeros_for_empty_prompt": "_2" in ends,
        "requires_aesthetics_score": ends == ["_2"],
    }
    with explained(path):
        settings = ClipTextConfig.from_dict(flags | json.loads(source.notes.get(CONDITIONER, "{}")))
    return ClipText(encoders.get(""), encoders.get("_2"), settings)
