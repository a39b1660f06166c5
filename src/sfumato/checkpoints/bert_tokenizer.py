"""BERT's tokenizer for single files, which hold weights only: the caller's, one that sfumato wrote
into the file, or one on this machine.

Latent Diffusion's text-to-image model reads text as "bert-base-uncased" does (Devlin et al. 2019,
arXiv:1810.04805).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.checkpoints.tokenizer import KEY
from sfumato.errors import UserError
from sfumato.predict.text_encoders.bert import load_tokenizer

HUB = "bert-base-uncased"
_FILES = ["vocab.txt", "tokenizer_config.json"]
_FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Settings of a `BertTokenizer` by their names in its normalizer."""


def packed(tokenizer: Any) -> str:
    """The words of a `BertTokenizer` in their order, and its settings, for the metadata of a file;
    `UserError` for one that differs more.
    """
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    rules, vocabulary = known["normalizer"] or {}, known["model"].get("vocab", {})
    if (
        known["model"].get("type") != "WordPiece"
        or rules.get("type") != "BertNormalizer"
        or set(vocabulary.values()) != {*range(len(vocabulary))}
    ):
        kind = f"{known['model'].get('type')} after {rules.get('type')}, {len(vocabulary)} words"
        raise UserError(
            f"a tokenizer of another kind ({kind}): a single file holds BERT's, whose words are numbered from 0 without gaps; save a folder instead"
        )
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    return json.dumps(
        {"wordpiece": words, **{ours: rules.get(theirs) for ours, theirs in _FLAGS.items()}}
    )


def bert_tokenizer(length: int, folder: str | Path | None, notes: Mapping[str, str]) -> Any:
    """A `BertTokenizer` from `folder`, the file's own notes, the cache of huggingface_hub, or the
    hub; `UserError` where there is none.
    """
    if folder is not None:
        return load_tokenizer(Path(folder))
    if KEY in notes:
        from transformers import BertTokenizer

        found = json.loads(notes[KEY])
        words = {word: number for number, word in enumerate(found["wordpiece"])}
        return BertTokenizer(
            vocab=words, model_max_length=length, **{flag: found[flag] for flag in _FLAGS}
        )
    for local in (True, False):
        place = _cached(local)
        if place is not None:
            return load_tokenizer(place)
    raise UserError(
        "this file has a text transformer and no tokenizer, as all files in its layout, and BERT's is not on this machine: give its folder with "
        f"vocab.txt (tokenizer=...), or be online once ({HUB})"
    )


def _cached(local: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(HUB, allow_patterns=_FILES, local_files_only=local))
    except Exception:
        # the library raises a dozen kinds, all of which mean that it is not to be had
        return None
    return found if (found / "vocab.txt").exists() else None
