"""Tiny text encoders of diffusion transformers with random weights, in diffusers' layout.

The CLIPs are those of `clip_encoders`. T5's SentencePiece model is trained here on a few lines.
The tokens of the language models are bytes. BERT ("sentence"), which no pipeline of diffusers has,
has a vocabulary of a few words and letters.
"""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from helpers import clip_encoders
from helpers.models import random_network

LINES = [
    "a cat sat on the mat",
    "a red dog runs",
    "two cats and three dogs, 3 Fälle!",
    "the quick brown fox jumps over the lazy dog",
]
PIPELINES = {
    "pixart_alpha": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd3_without_t5": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux_schnell": "FluxPipeline",
    "flux2_dev": "Flux2Pipeline",
    "flux2_klein": "Flux2KleinPipeline",
}
NETWORKS = {
    "sd3_without_t5": {"joint_attention_dim": 48},
    "flux": {"guidance_embeds": True},
    "flux_schnell": {"guidance_embeds": False},
}
"""The fields of transformer/config.json that conditioners read."""
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
MISTRAL_CHAT = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]\
{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"""
QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
QWEN_CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


@cache
def spiece() -> bytes:
    """Train a SentencePiece model with T5's special tokens, on a fixed text."""
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_writer=file, vocab_size=60, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return file.getvalue()


def write_spiece(folder: Path) -> None:
    """Write the tokenizer's folder of PixArt, which has spiece.model and no tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(spiece())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 100,
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def t5_tokenizer(folder: Path) -> Any:
    """Open the T5 tokenizer of a folder, which is written where there is none."""
    from transformers import T5Tokenizer

    if not folder.exists():
        write_spiece(folder)
    return T5Tokenizer.from_pretrained(folder)


def t5_model(width: int = 48, **settings: Any) -> Any:
    """Build a T5 encoder of this width; `settings` are further fields of its config."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=192, d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20, feed_forward_proj="gated-gelu", **settings,
    )  # fmt: skip
    return random_network(lambda: T5EncoderModel(config), 3)


def bytes_tokenizer(marks: list[str]) -> Any:
    """Build a tokenizer whose tokens are the marks, then every byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in marks]
    )
    return tokenizer


def mistral_tokenizer() -> Any:
    """Build FLUX.2 dev's tokenizer: the text part of Mistral's processor, without torchvision."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer(MISTRAL_MARKS), bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="<pad>",
        padding_side="left", model_max_length=4096,
    )  # fmt: skip
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def mistral_model() -> Any:
    """Build the language model of FLUX.2 dev."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "vocab_size": 280, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 31,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 10000.0,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return random_network(lambda: Mistral3ForConditionalGeneration(config), 4)


def qwen_tokenizer() -> Any:
    """Build the tokenizer of FLUX.2 klein."""
    from transformers import Qwen2Tokenizer

    words = json.loads(bytes_tokenizer(QWEN_MARKS).to_str())["model"]["vocab"]
    tokenizer = Qwen2Tokenizer(
        vocab=words,
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_MARKS[1:]})
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def qwen_model(tied: bool = True) -> Any:
    """Build the language model of FLUX.2 klein; tied: its head shares the embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=280, hidden_size=12, intermediate_size=20, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return random_network(lambda: Qwen3ForCausalLM(config), 5)


def bert_tokenizer(**settings: Any) -> Any:
    """Build a BERT tokenizer of a few words and all letters."""
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
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, **settings)


def bert_model(heads: bool = False, seed: int = 6, **settings: Any) -> Any:
    """Build a BERT.

    Args:
        heads: with a pooler, as transformers builds it by default.
        seed: seed of the weights.
        settings: further fields of BertConfig.
    """
    from transformers import BertConfig, BertModel

    numbers = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 96,
    }
    config = BertConfig(vocab_size=120, **(numbers | settings))
    return random_network(lambda: BertModel(config, add_pooling_layer=heads), seed)


def parts(kind: str, scratch: Path) -> dict[str, Any]:
    """Build the text parts of a kind of model, by their names in diffusers' pipelines.

    Args:
        kind: a key of `PIPELINES`, or "sentence".
        scratch: folder for the files of a tokenizer that is built from them.
    """
    if kind == "sentence":
        return {"tokenizer": bert_tokenizer(), "text_encoder": bert_model()}
    if kind.startswith("pixart"):
        return {"tokenizer": t5_tokenizer(scratch / "tokenizer"), "text_encoder": t5_model()}
    if kind == "flux2_dev":
        return {"tokenizer": mistral_tokenizer(), "text_encoder": mistral_model()}
    if kind == "flux2_klein":
        return {"tokenizer": qwen_tokenizer(), "text_encoder": qwen_model()}
    if kind.startswith("flux"):
        encoders = {
            "tokenizer": clip_encoders.tokenizer(),
            "text_encoder": clip_encoders.encoder(False, 1),
        }
        return {
            **encoders,
            "tokenizer_2": t5_tokenizer(scratch / "tokenizer_2"),
            "text_encoder_2": t5_model(),
        }
    encoders = {
        "tokenizer": clip_encoders.tokenizer(),
        "text_encoder": clip_encoders.encoder(True, 1),
    }
    encoders |= {
        "tokenizer_2": clip_encoders.tokenizer("!"),
        "text_encoder_2": clip_encoders.encoder(True, 2, hidden_act="gelu"),
    }
    if kind == "sd3_without_t5":
        return {**encoders, "tokenizer_3": None, "text_encoder_3": None}
    return {
        **encoders,
        "tokenizer_3": t5_tokenizer(scratch / "tokenizer_3"),
        "text_encoder_3": t5_model(),
    }


def write(folder: Path, kind: str) -> Path:
    """Write a folder of these parts as transformers saves them, with a model_index.json.

    PixArt's tokenizer is a lone spiece.model.
    """
    index: dict[str, Any] = {"_class_name": PIPELINES.get(kind, "LatentDiffusion")}
    for name, part in parts(kind, folder).items():
        if part is not None and not (kind.startswith("pixart") and name == "tokenizer"):
            part.save_pretrained(folder / name)
        index[name] = [None, None] if part is None else ["transformers", type(part).__name__]
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    if kind in NETWORKS:
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps(NETWORKS[kind]))
    return folder
