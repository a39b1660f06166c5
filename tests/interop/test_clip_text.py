"""Parity with diffusers' prompts: the same tokens, embeddings and numbers from the same folders,
for Stable Diffusion 1, 2, XL and its refiner.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import clip_encoders
from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig
from sfumato.types import ImageSpec

PROMPTS = [
    "a cat, a red dog",
    "",
    "Ein Hund & zwei Katzen: 3 Fälle!",
    "a cat, a red dog",
    "x" * 75,
    "<|endoftext|> cat",
    "  a \n cat ",
]
BOTH = ("sdxl", "sdxl_text")
PICTURE = ImageSpec(
    64, 48, original_size=(100, 90), crop=(5, 7), target_size=(64, 50), aesthetic_score=6.5
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: clip_encoders.write(tmp_path_factory.mktemp("clip") / kind, kind)
        for kind in clip_encoders.KINDS
    }


@pytest.fixture(scope="module")
def conditioners(folders: dict[str, Path]) -> dict[str, ClipText]:
    """Brackets are text in diffusers."""
    return {kind: plain(ClipText.from_folder(folder)) for kind, folder in folders.items()}


def plain(conditioner: ClipText, **settings: Any) -> ClipText:
    return replace(conditioner, config=replace(conditioner.config, weighting="none", **settings))


def pipeline(kind: str, folder: Path | None = None) -> Any:
    """diffusers' pipeline of the same parts, or of those in a folder; without the networks that
    prompts do not need.
    """
    import diffusers

    name = {
        "sd1": "StableDiffusionPipeline",
        "sd2": "StableDiffusionPipeline",
        "refiner": "StableDiffusionXLImg2ImgPipeline",
    }
    cls = getattr(diffusers, name.get(kind, "StableDiffusionXLPipeline"))
    rest: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    if kind in ("sd1", "sd2"):
        rest |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    else:
        rest |= {"add_watermarker": False}
    if folder is not None:
        return cls.from_pretrained(folder, local_files_only=True, **rest)
    parts = clip_encoders.parts(kind)
    if kind == "refiner":
        parts |= {"tokenizer": None, "text_encoder": None}
    return cls(**parts, **clip_encoders.KINDS[kind][1], **rest)


def close(result: Tensor | None, reference: Tensor) -> None:
    assert (
        result is not None
        and result.shape == reference.shape
        and result.dtype == reference.dtype == torch.float32
    )
    assert float((result - reference).abs().max()) <= 1e-6 * float(reference.abs().max())


def ask(pipe: Any, prompt: Any, negative: Any = None, **more: Any) -> Any:
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
            **more,
        )


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_one_encoder(kind: str, conditioners: dict[str, ClipText]) -> None:
    negative = ["ugly"] * (len(PROMPTS) - 1) + ["a dog"]
    reference = ask(pipeline(kind), PROMPTS, negative)
    for prompts, tokens in zip((PROMPTS, negative), reference, strict=True):
        result = conditioners[kind](prompts)
        close(result.tokens, tokens)
        assert result.mask is None and result.vector is None
    # no negative prompt is an empty one
    close(conditioners[kind].null(2).tokens, ask(pipeline(kind), ["a", "b"])[1])


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_clip_skip(kind: str, skip: int, conditioners: dict[str, ClipText]) -> None:
    pipe = pipeline(kind)
    # diffusers 0.42 looks for the norm where transformers 4 had it
    pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    reference = ask(pipe, PROMPTS, clip_skip=skip)[0]
    close(plain(conditioners[kind], clip_skip=skip)(PROMPTS).tokens, reference)
    if skip:
        assert not torch.allclose(reference, conditioners[kind](PROMPTS).tokens, atol=1e-3)


@pytest.mark.parametrize("kind", [*BOTH, "refiner"])
@pytest.mark.parametrize("skip", [None, 0, 1])
def test_two_encoders_and_the_refiner(
    kind: str, skip: int | None, conditioners: dict[str, ClipText]
) -> None:
    reference = ask(pipeline(kind), PROMPTS, ["ugly, red"] * len(PROMPTS), clip_skip=skip)
    result = plain(conditioners[kind], clip_skip=skip)(PROMPTS, PICTURE)
    close(result.tokens, reference[0])
    assert result.vector is not None
    close(result.vector[:, :10], reference[2])
    # diffusers has no clip_skip for negative prompts
    negative = conditioners[kind](["ugly, red"] * len(PROMPTS), PICTURE)
    assert negative.vector is not None
    close(negative.tokens, reference[1])
    close(negative.vector[:, :10], reference[3])


@pytest.mark.parametrize("kind", [*BOTH, "refiner"])
def test_no_prompt_is_zeros_by_the_models_config_and_an_empty_prompt_is_text(
    kind: str, conditioners: dict[str, ClipText]
) -> None:
    for negative, prompt in ((None, None), ("", "")):
        _, tokens, _, pooled = ask(pipeline(kind), "a cat", negative)
        result = conditioners[kind]([prompt], PICTURE)
        assert result.vector is not None
        torch.testing.assert_close(result.tokens, tokens, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.vector[:, :10], pooled, rtol=1e-6, atol=1e-6)
        assert (not tokens.any()) == (negative is None and kind != "sdxl_text")


def network(numbers: int) -> Any:
    """Provide the fields of a U-Net from which diffusers counts the conditioning numbers."""
    widths = SimpleNamespace(in_features=4 * numbers + 10)
    return SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=4),
        add_embedding=SimpleNamespace(linear_1=widths),
    )


@pytest.mark.parametrize(
    "picture",
    [
        PICTURE,
        ImageSpec(64, 48),
        ImageSpec(64, 64, negative_original_size=(32, 33), negative_target_size=(64, 63)),
    ],
)
def test_sizes_and_crops(picture: ImageSpec, conditioners: dict[str, ClipText]) -> None:
    import diffusers

    pipe = SimpleNamespace(unet=network(6))
    method: Any = diffusers.StableDiffusionXLPipeline._get_add_time_ids
    numbers = [
        picture.original_size or picture.size,
        picture.crop,
        picture.target_size or picture.size,
    ]
    reference = method(pipe, *numbers, dtype=torch.float32, text_encoder_projection_dim=10)
    result = conditioners["sdxl"](["a", "b"], picture).vector
    assert result is not None and torch.equal(result[:, 10:], reference.expand(2, -1))
    numbers = [
        picture.negative_original_size or numbers[0],
        picture.crop,
        picture.negative_target_size or numbers[2],
    ]
    reference = method(pipe, *numbers, dtype=torch.float32, text_encoder_projection_dim=10)
    result = conditioners["sdxl"].null(1, picture.negative).vector
    assert (
        result is not None and torch.equal(result[:, 10:], reference) and not result[:, :10].any()
    )


def test_the_refiners_score(conditioners: dict[str, ClipText]) -> None:
    import diffusers

    pipe = SimpleNamespace(unet=network(5), config=SimpleNamespace(requires_aesthetics_score=True))
    sizes = [PICTURE.original_size, PICTURE.crop, PICTURE.target_size]
    scores = [PICTURE.aesthetic_score, PICTURE.negative_aesthetic_score]
    method: Any = diffusers.StableDiffusionXLImg2ImgPipeline._get_add_time_ids
    reference = method(
        pipe, *sizes, *scores, *sizes, dtype=torch.float32, text_encoder_projection_dim=10
    )
    for picture, numbers in zip((PICTURE, PICTURE.negative), reference, strict=True):
        result = conditioners["refiner"](["a"], picture).vector
        assert result is not None and torch.equal(result[:, 10:], numbers)


@pytest.mark.parametrize("kind", clip_encoders.KINDS)
def test_saved_folders_open_in_diffusers_and_sfumato(
    kind: str, conditioners: dict[str, ClipText], tmp_path: Path
) -> None:
    conditioners[kind].save(tmp_path)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": type(pipeline(kind)).__name__, **conditioners[kind].index()})
    )
    before, after = (
        ask(pipe, PROMPTS, PROMPTS) for pipe in (pipeline(kind), pipeline(kind, tmp_path))
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = ClipText.from_folder(tmp_path)
    assert (
        again.config == conditioners[kind].config
        and again.identity() == conditioners[kind].identity()
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again(PROMPTS, PICTURE).tensors,
            conditioners[kind](PROMPTS, PICTURE).tensors,
            strict=True,
        )
    )
    assert again.tensors().keys() == conditioners[kind].tensors().keys()
    assert all(
        torch.equal(tensor, conditioners[kind].tensors()[key])
        for key, tensor in again.tensors().items()
    )


def test_folders_of_older_versions_open(
    folders: dict[str, Path], conditioners: dict[str, ClipText], tmp_path: Path
) -> None:
    """vocab.json and merges.txt without tokenizer.json, "text_model." before the keys, position_ids
    among them, and a .bin.
    """
    from safetensors.torch import load_file

    vocabulary = {
        "vocab.json": json.dumps(clip_encoders.vocabulary()),
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(m) for m in clip_encoders.MERGES),
    }
    (tmp_path / "tokenizer").mkdir()
    for name, text in vocabulary.items():
        (tmp_path / "tokenizer" / name).write_text(text)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": clip_encoders.END,
        "do_lower_case": True,
    }
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text_encoder").mkdir()
    config = json.loads((folders["sd1"] / "text_encoder" / "config.json").read_text())
    (tmp_path / "text_encoder" / "config.json").write_text(
        json.dumps(
            config
            | {
                "transformers_version": "4.22.0.dev0",
                "torch_dtype": "float32",
                "dropout": 0.0,
                "_name_or_path": "openai/clip-vit-large-patch14",
            }
        )
    )
    tensors = {
        "text_model." + k: v
        for k, v in load_file(folders["sd1"] / "text_encoder" / "model.safetensors").items()
    }
    torch.save(
        {**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]},
        tmp_path / "text_encoder" / "pytorch_model.bin",
    )
    result = plain(ClipText.from_folder(tmp_path))
    assert torch.equal(result(PROMPTS).tensors[0], conditioners["sd1"](PROMPTS).tensors[0])
    assert result.identity() == conditioners["sd1"].identity() and result.config == ClipTextConfig(
        weighting="none"
    )


def test_the_real_tokenizers_rules_are_transformers_own(conditioners: dict[str, ClipText]) -> None:
    """Begin, words, end, padding: by hand here, by a template in transformers."""
    encoder = conditioners["sd2"].encoder
    assert encoder is not None and encoder.tokenizer.pad_token_id == 0
    for prompt in PROMPTS:
        reference = encoder.tokenizer(prompt).input_ids
        assert [token.id for token in encoder.tokens([(prompt, 1.0)])] == reference[1:-1]
