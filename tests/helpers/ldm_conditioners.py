"""Tiny conditioners of Latent Diffusion with random weights: a BERT, class embeddings."""

from pathlib import Path
from typing import Any

import torch

from helpers.models import randomised

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz(),.:0123456789",
    *(f"##{c}" for c in "abcdeort"),
    "red",
]
WORDS += ["cat", "dog", "##s", "very"]
ROWS = 5


def tokenizer(length: int = 77) -> Any:
    """Build a BERT tokenizer of `WORDS`."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=length)


def bert_config(**fields: Any) -> Any:
    """Return a small config of Latent Diffusion's BERT, with other fields where given."""
    from sfumato.predict.text_encoders.ldm_bert import LDMBertConfig

    small = {
        "vocab_size": len(WORDS),
        "encoder_layers": 2,
        "encoder_ffn_dim": 48,
        "head_dim": 4,
        "d_model": 24,
    }
    return LDMBertConfig(**{**small, **fields})


def bert_text(**fields: Any) -> Any:
    """Build the BERT conditioner; `fields` are of its config."""
    from sfumato.predict.conditioners.bert_text import BertText
    from sfumato.predict.text_encoders.bert import BertEncoder
    from sfumato.predict.text_encoders.ldm_bert import LDMBert

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertText(BertEncoder(tokenizer(), randomised(LDMBert(bert_config(**fields)), 1)))


def class_embedding(rows: int = ROWS, width: int = 24, **fields: Any) -> Any:
    """Build the class conditioner of a random table (rows, width)."""
    from sfumato.predict.conditioners.class_embedding import ClassEmbedding, ClassEmbeddingConfig

    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(2))
    return ClassEmbedding(table, ClassEmbeddingConfig(**fields))


def write(folder: Path, kind: str) -> Path:
    """Save the conditioner of a name, that of its file in the library; return the folder."""
    {"bert_text": bert_text, "class_embedding": class_embedding}[kind]().save(folder)
    return folder
