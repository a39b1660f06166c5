"""Parity with transformers' BertModel and its tokenizer.

Folders that sfumato writes open in transformers.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import text_encoders
from sfumato.predict.conditioners.sentence_text import SentenceText, SentenceTextConfig

PROMPTS = ["a red shirt", "", "Two CATS, on the dog!", "a red shirt", "naïve 中 §", "  a \n cat "]
LONG = "the red cat " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers and sentence-transformers save: all side by side, with a pooler."""
    result = tmp_path_factory.mktemp("encoder")
    text_encoders.bert_model(heads=True).save_pretrained(result)
    text_encoders.bert_tokenizer().save_pretrained(result)
    return result


@pytest.fixture(scope="module")
def conditioner(folder: Path) -> SentenceText:
    return SentenceText.from_encoder(folder)


def transformers_states(
    folder: Path,
    prompts: list[str],
    masked: bool = True,
    tokenizer: Path | None = None,
    **load: Any,
) -> tuple[Tensor, Tensor]:
    """All rows in one pass; states and mask."""
    from transformers import BertModel, BertTokenizer

    opened, model = (
        BertTokenizer.from_pretrained(tokenizer or folder),
        BertModel.from_pretrained(folder, **load),
    )
    read = opened(
        prompts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(
            read.input_ids, attention_mask=read.attention_mask if masked else None
        ).last_hidden_state
    return states.float(), read.attention_mask.bool()


@pytest.mark.parametrize("masked", [True, False])
def test_states_and_mask_are_transformers_own(
    masked: bool, folder: Path, conditioner: SentenceText
) -> None:
    result = replace(conditioner, config=SentenceTextConfig(mask_padding=masked))(PROMPTS)
    states, mask = transformers_states(folder, PROMPTS, masked)
    assert result.tokens.dtype == torch.float32 and result.tokens.shape == (6, 64, 24) == (
        len(PROMPTS),
        64,
        conditioner.width,
    )
    assert float((result.tokens - states).abs().max()) <= 1e-6 * float(states.abs().max())
    assert result.vector is None and (
        torch.equal(result.mask, mask) if masked else result.mask is None
    )
    assert torch.equal(result.tokens[0], result.tokens[3]) and not torch.allclose(
        result.tokens[0], result.tokens[1], atol=1e-3
    )


def test_a_long_prompt_is_cut_where_transformers_cuts_it(
    folder: Path, conditioner: SentenceText
) -> None:
    result = replace(conditioner, config=SentenceTextConfig(truncation="cut"))([LONG])
    states, mask = transformers_states(folder, [LONG])
    assert mask.all() and torch.equal(result.mask, mask)
    assert float((result.tokens - states).abs().max()) <= 1e-6 * float(states.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_transformers_own(dtype: torch.dtype, folder: Path) -> None:
    """The same numbers in the same order, so the same bits."""
    result = SentenceText.from_encoder(folder, dtype=dtype)
    assert result.encoder.model.dtype == dtype
    assert torch.equal(
        result(["a cat"]).tokens, transformers_states(folder, ["a cat"], dtype=dtype)[0]
    )


def test_saved_folders_open_in_transformers(conditioner: SentenceText, tmp_path: Path) -> None:
    import transformers

    conditioner.save(tmp_path)
    for part, (library, name) in conditioner.index().items():
        assert library == "transformers" and getattr(transformers, name).from_pretrained(
            tmp_path / part
        )
    states, mask = transformers_states(
        tmp_path / "text_encoder",
        PROMPTS,
        tokenizer=tmp_path / "tokenizer",
        add_pooling_layer=False,
    )
    result = conditioner(PROMPTS)
    assert torch.equal(result.mask, mask) and float(
        (result.tokens - states).abs().max()
    ) <= 1e-6 * float(states.abs().max())


def test_a_model_that_keeps_case_keeps_it(tmp_path: Path) -> None:
    text_encoders.bert_model().save_pretrained(tmp_path)
    text_encoders.bert_tokenizer(do_lower_case=False, strip_accents=False).save_pretrained(tmp_path)
    cased = SentenceText.from_encoder(tmp_path)
    assert not torch.allclose(*cased(["Red FHR", "red fhr"]).tokens, atol=1e-3)
    assert (
        float((cased(PROMPTS).tokens - transformers_states(tmp_path, PROMPTS)[0]).abs().max())
        <= 1e-5
    )
    cased.save(tmp_path / "model")
    again = SentenceText.from_folder(tmp_path / "model")
    assert again.identity() == cased.identity() and torch.equal(
        again(PROMPTS).tokens, cased(PROMPTS).tokens
    )
