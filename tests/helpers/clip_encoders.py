"""Tiny CLIP text encoders with random weights, in diffusers' layout."""

import json
from pathlib import Path
from typing import Any

from helpers.models import random_network

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
KINDS = {  # suffixes of a model's encoders, and further fields of its model_index.json
    "sd1": (("",), {}),
    "sd2": (("",), {}),
    "sdxl": (("", "_2"), {"force_zeros_for_empty_prompt": True}),
    "sdxl_text": (("", "_2"), {"force_zeros_for_empty_prompt": False}),
    "refiner": (("_2",), {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": True}),
}


def vocabulary() -> dict[str, int]:
    """Return CLIP's kind of vocabulary: bytes inside and ending a word, merges, begin, end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    # id 0, the padding of SD 2 and of SDXL's second encoder
    letters.insert(0, letters.pop(letters.index("!")))
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in MERGES),
        BEGIN,
        END,
    ]
    return {word: i for i, word in enumerate(words)}


def tokenizer(pad: str = END, length: int = 77) -> Any:
    """Build a tokenizer of this vocabulary, with a padding token and a largest length."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=vocabulary(), merges=[*MERGES], model_max_length=length, pad_token=pad
    )


def encoder(
    projected: bool, seed: int, layers: int = 3, end: int | None = 2, **settings: Any
) -> Any:
    """Build a text encoder with random weights.

    Args:
        projected: with a text projection, as the second encoder of SDXL.
        seed: seed of the weights.
        layers: number of hidden layers.
        end: the config's end token: 2, wrong, as in old configs; None for the right one.
        settings: further fields of CLIPTextConfig.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(vocabulary())
    width = 24 if projected else 16
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, projection_dim=10,
        bos_token_id=size - 2, eos_token_id=size - 1 if end is None else end, **settings,
    )  # fmt: skip
    return random_network(
        lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed
    )


def wide_encoder(kind: Any, **fields: Any) -> Any:
    """Build a text encoder with heads 64 wide, which single files take for granted.

    Args:
        kind: CLIPTextModel or CLIPTextModelWithProjection.
        fields: fields of CLIPTextConfig besides the smallest possible.
    """
    from transformers import CLIPTextConfig

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 64,
    }
    words = {"vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 2}
    return kind(CLIPTextConfig(**sizes | words | fields))


def parts(kind: str) -> dict[str, Any]:
    """Build the tokenizers and encoders of a kind of model, by diffusers' names for them."""
    ends, _ = KINDS[kind]
    components: dict[str, Any] = {}
    for end in ends:
        components[f"tokenizer{end}"] = tokenizer("!" if end or kind == "sd2" else END)
        settings: dict[str, Any] = {
            "sd1": {},
            "sd2": {"layers": 2, "hidden_act": "gelu", "end": None},
        }.get(kind, {})
        components[f"text_encoder{end}"] = encoder(bool(end), len(end), **settings)
    return components


def write(folder: Path, kind: str) -> Path:
    """Write a folder of these parts as transformers saves them, with a model_index.json."""
    ends, flags = KINDS[kind]
    for name, part in parts(kind).items():
        part.save_pretrained(folder / name)
    names = {
        f"{part}{end}": end in ends
        for part in ("text_encoder", "tokenizer")
        for end in ("", "_2")[: 1 if kind in ("sd1", "sd2") else 2]
    }
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    entries = {
        name: ["transformers", classes.get(name, "CLIPTokenizer")] if present else [None, None]
        for name, present in names.items()
    }
    (folder / "model_index.json").write_text(json.dumps({**entries, **flags}))
    return folder
