"""Tiny text encoders of diffusion transformers with random weights, in diffusers' layout; read by
the tests with runpy, because tests are no package.

The CLIPs are `_clip.py`'s. T5 reads with a SentencePiece model that is trained here on a few lines;
the language models read bytes; BERT, which no pipeline of diffusers has ("sentence"), a few words
and letters.
"""

import io
import json
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

clip: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_clip.py"))))

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
"""As much of transformer/config.json as conditioners look at."""
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
MISTRAL_CHAT = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]\
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
    """A SentencePiece model with T5's special tokens; of a fixed text, so always the same."""
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_writer=file, vocab_size=60, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return file.getvalue()


def write_spiece(folder: Path) -> None:
    """A tokenizer's folder as of the time before tokenizer.json: PixArt's."""
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
    from transformers import T5Tokenizer

    if not folder.exists():
        write_spiece(folder)
    return T5Tokenizer.from_pretrained(folder)


def drawn(build: Any, seed: int) -> Any:
    """A network of random numbers, its norms too: they start at 1 and 0, where mistakes would not
    show.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def t5_model(width: int = 48, **settings: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=192, d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, feed_forward_proj="gated-gelu", **settings,
    )  # fmt: skip
    return drawn(lambda: T5EncoderModel(config), 3)


def bytes_tokenizer(marks: list[str]) -> Any:
    """Every byte a token, after the marks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    found = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    found.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    found.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return found


def mistral_tokenizer() -> Any:
    """The part for text of Mistral's processor, which is what FLUX.2 dev has as its tokenizer; all
    of it would need torchvision.
    """
    from transformers import PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer(MISTRAL_MARKS), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left", model_max_length=4096,
    )  # fmt: skip
    found.chat_template = MISTRAL_CHAT
    return found


def mistral_model() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "vocab_size": 280, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 31,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 10000.0,
    }  # fmt: skip
    eyes = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=eyes, tie_word_embeddings=False)
    return drawn(lambda: Mistral3ForConditionalGeneration(config), 4)


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    words = json.loads(bytes_tokenizer(QWEN_MARKS).to_str())["model"]["vocab"]
    found = Qwen2Tokenizer(
        vocab=words,
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    found.add_special_tokens({"additional_special_tokens": QWEN_MARKS[1:]})
    found.chat_template = QWEN_CHAT
    return found


def qwen_model(tied: bool = True) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=280, hidden_size=12, intermediate_size=20, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return drawn(lambda: Qwen3ForCausalLM(config), 5)


def bert_tokenizer(**settings: Any) -> Any:
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
    """heads: with a pooler, as the library builds it unless told otherwise."""
    from transformers import BertConfig, BertModel

    numbers = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 96,
    }
    config = BertConfig(vocab_size=120, **(numbers | settings))
    return drawn(lambda: BertModel(config, add_pooling_layer=heads), seed)


def parts(kind: str, scratch: Path) -> dict[str, Any]:
    """The parts by the names that diffusers' pipelines have for them. scratch: where a tokenizer's
    files may be put.
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
        ours = {"tokenizer": clip.tokenizer(), "text_encoder": clip.encoder(False, 1)}
        return {
            **ours,
            "tokenizer_2": t5_tokenizer(scratch / "tokenizer_2"),
            "text_encoder_2": t5_model(),
        }
    ours = {"tokenizer": clip.tokenizer(), "text_encoder": clip.encoder(True, 1)}
    ours |= {
        "tokenizer_2": clip.tokenizer("!"),
        "text_encoder_2": clip.encoder(True, 2, hidden_act="gelu"),
    }
    if kind == "sd3_without_t5":
        return {**ours, "tokenizer_3": None, "text_encoder_3": None}
    return {
        **ours,
        "tokenizer_3": t5_tokenizer(scratch / "tokenizer_3"),
        "text_encoder_3": t5_model(),
    }


def write(folder: Path, kind: str) -> Path:
    """A model's folder with these parts as transformers writes them, and a model_index.json;
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
