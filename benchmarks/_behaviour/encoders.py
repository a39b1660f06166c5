"""Small random text encoders and tokenizers: CLIP, T5, BERT, and FLUX.2's language models."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
SENTENCES = [
    "a cat sat on the mat",
    "a red dog runs",
    "two cats and three dogs, 3 Fälle!",
    "the quick brown fox jumps over the lazy dog",
]
MISTRAL_MARKS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
]
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]"
    "{{ m.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def randomised(build: Callable[[], Any], seed: int, size: float = 0.1) -> Any:
    """A network with random numbers added to all weights.

    Norms start at 1 and 0, where many faults would not show.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(size * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def byte_letters() -> list[str]:
    """All letters that stand for a byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_vocabulary() -> dict[str, int]:
    """Every byte inside a word and at its end, a few merges, begin and end.

    Id 0 is "!", the padding of SD 2.
    """
    letters = byte_letters()
    letters.insert(0, letters.pop(letters.index("!")))
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in MERGES),
        BEGIN,
        END,
    ]
    return {word: i for i, word in enumerate(words)}


def clip_tokenizer(pad: str = END) -> Any:
    """CLIP's tokenizer with a small vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=clip_vocabulary(), merges=[*MERGES], model_max_length=77, pad_token=pad
    )


def clip(projected: bool, seed: int, **fields: Any) -> Any:
    """A CLIP text encoder with heads of 64 channels, as all published ones have."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(clip_vocabulary())
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    sizes |= {
        "projection_dim": 64,
        "vocab_size": size,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    } | fields
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomised(lambda: kind(CLIPTextConfig(**sizes)), seed)


@cache
def sentencepiece() -> bytes:
    """A SentencePiece model with T5's special tokens, of a fixed text."""
    from sentencepiece import SentencePieceTrainer

    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=file, vocab_size=60,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return file.getvalue()


def t5_tokenizer(folder: Path) -> Any:
    """T5's tokenizer, from a folder that is written here."""
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(sentencepiece())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 100,
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return T5Tokenizer.from_pretrained(folder)


def t5(width: int, seed: int = 3) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=192,
        d_model=width,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return randomised(lambda: T5EncoderModel(config), seed)


def bert_tokenizer() -> Any:
    """BERT's tokenizer with a few words and all letters."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyzFHR0123456789.,:!&()"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "cat",
        "cats",
        "dog",
        "shirt",
        "red",
        "the",
        "on",
        *letters,
    ]
    words += [f"##{letter}" for letter in letters]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)


def bert() -> Any:
    """A BERT, as sentence encoders have it."""
    from transformers import BertConfig, BertModel

    numbers = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 96,
    }
    return randomised(lambda: BertModel(BertConfig(vocab_size=120, **numbers)), 6)


def bytes_tokenizer(marks: list[str]) -> Any:
    """Every byte is a token, after the marks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate([*marks, *byte_letters()])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in marks]
    )
    return tokenizer


def mistral_tokenizer() -> Any:
    """The tokenizer of FLUX.2 dev."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer(MISTRAL_MARKS), bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="<pad>",
        padding_side="left", model_max_length=4096,
    )  # fmt: skip
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def mistral() -> Any:
    """Mistral 3, the text encoder of FLUX.2 dev, which reads layers 10, 20 and 30."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "vocab_size": 280, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 31,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 10000.0,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return randomised(lambda: Mistral3ForConditionalGeneration(config), 4)


def qwen_tokenizer() -> Any:
    """The tokenizer of FLUX.2 klein."""
    from transformers import Qwen2Tokenizer

    words = json.loads(bytes_tokenizer(QWEN_MARKS).to_str())["model"]["vocab"]
    ends = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[], **ends)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_MARKS[1:]})
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def qwen() -> Any:
    """Qwen 3, the text encoder of FLUX.2 klein."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=280, hidden_size=12, intermediate_size=20, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    return randomised(lambda: Qwen3ForCausalLM(config), 5)
