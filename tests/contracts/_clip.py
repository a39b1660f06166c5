"""Tiny CLIP text encoders with random weights, in diffusers' layout; read by the tests with runpy,
because tests are no package.
"""

import json
from pathlib import Path
from typing import Any

import torch

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
KINDS = {  # which encoders a model has, and what its model_index.json says besides
    "sd1": (("",), {}),
    "sd2": (("",), {}),
    "sdxl": (("", "_2"), {"force_zeros_for_empty_prompt": True}),
    "sdxl_text": (("", "_2"), {"force_zeros_for_empty_prompt": False}),
    "refiner": (("_2",), {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": True}),
}


def vocabulary() -> dict[str, int]:
    """Every byte alone, inside a word and at its end; what is merged; begin and end last, as in
    CLIP's own.
    """
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
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=vocabulary(), merges=[*MERGES], model_max_length=length, pad_token=pad
    )


def encoder(
    projected: bool, seed: int, layers: int = 3, end: int | None = 2, **settings: Any
) -> Any:
    """end: the config's end token; 2 is what old configs say wrongly, None is the right one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(vocabulary())
    width = 24 if projected else 16
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2, projection_dim=10,
        bos_token_id=size - 2, eos_token_id=size - 1 if end is None else end, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
        with torch.no_grad():  # norms start at 1 and 0, where mistakes would not show
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def parts(kind: str) -> dict[str, Any]:
    """The parts by the names that diffusers' pipelines have for them."""
    ends, _ = KINDS[kind]
    found: dict[str, Any] = {}
    for end in ends:
        found[f"tokenizer{end}"] = tokenizer("!" if end or kind == "sd2" else END)
        settings: dict[str, Any] = {
            "sd1": {},
            "sd2": {"layers": 2, "hidden_act": "gelu", "end": None},
        }.get(kind, {})
        found[f"text_encoder{end}"] = encoder(bool(end), len(end), **settings)
    return found


def write(folder: Path, kind: str) -> Path:
    """A model's folder with these parts as transformers writes them, and the rest of a
    model_index.json.
    """
    ends, flags = KINDS[kind]
    for name, part in parts(kind).items():
        part.save_pretrained(folder / name)
    names = {
        f"{what}{end}": end in ends
        for what in ("text_encoder", "tokenizer")
        for end in ("", "_2")[: 1 if kind in ("sd1", "sd2") else 2]
    }
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    entries = {
        name: ["transformers", classes.get(name, "CLIPTokenizer")] if there else [None, None]
        for name, there in names.items()
    }
    (folder / "model_index.json").write_text(json.dumps({**entries, **flags}))
    return folder
