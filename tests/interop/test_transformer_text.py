"""Parity with diffusers' prompts for PixArt, SD 3, FLUX.1 and FLUX.2: the same tokens, masks and
vectors from the same folders, both ways.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import text_encoders
from sfumato.registry import find
from sfumato.types import Conditioning, ImageSpec

KINDS = list(text_encoders.PIPELINES)
NAMES = {"pixart": "t5_text", "sd3": "sd3_text", "flux": "flux_text", "flux2": "flux2_text"}
PROMPTS = [
    "a cat, a red dog",
    "",
    "Ein Hund & zwei Katzen: 3 Fälle!",
    "a cat, a red dog",
    "A (cat:1.3) in [IMG] brackets",
    "  a \n cat ",
]
LONG = "a cat sat on the mat " * 100
"""Longer than any of them reads: CLIP's 75 tokens, T5's 512, a language model's 512."""


def named(kind: str) -> Any:
    return find("predict.conditioners", NAMES[kind.split("_")[0]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: text_encoders.write(tmp_path_factory.mktemp("text") / kind, kind) for kind in KINDS
    }


@pytest.fixture(scope="module")
def conditioners(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: named(kind).from_folder(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """diffusers' pipelines of the same parts, which went through no file."""
    return {
        kind: pipeline(kind, text_encoders.parts(kind, tmp_path_factory.mktemp("parts") / kind))
        for kind in KINDS
    }


def empty(kind: str) -> dict[str, Any]:
    """The rest of a pipeline, which prompts do not need."""
    rest: dict[str, Any] = {"vae": None, "transformer": None, "scheduler": None}
    if kind == "sd3_without_t5":  # it asks the network for its width
        rest["transformer"] = SimpleNamespace(
            config=SimpleNamespace(sample_size=8, patch_size=2, **text_encoders.NETWORKS[kind])
        )
    return rest


def pipeline(kind: str, parts: dict[str, Any]) -> Any:
    import diffusers

    result = object.__new__(getattr(diffusers, text_encoders.PIPELINES[kind]))
    # the stand-in for a network is not a model that could be registered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(result), "register_modules", lambda self, **modules: self.__dict__.update(modules)
        )
        patch.setattr(type(result), "register_to_config", lambda self, **values: None)
        result.__init__(**parts, **empty(kind))
    return result


def diffusers_conditioning(
    pipe: Any,
    kind: str,
    prompts: list[str],
    second: list[str] | None = None,
    negative: bool = False,
) -> Conditioning:
    """Conditioning of diffusers, under the names of sfumato.

    negative: for negative prompts, where diffusers treats those apart.
    """
    with torch.no_grad():
        if kind.startswith("pixart"):
            length = 120 if kind == "pixart_alpha" else 300
            negatives = {"negative_prompt": prompts} if negative else {}
            result = pipe.encode_prompt(
                ["a"] * len(prompts) if negative else prompts,
                negative,
                device="cpu",
                max_sequence_length=length,
                **negatives,
            )
            tokens, mask = result[2:4] if negative else result[:2]
            return Conditioning(tokens, mask.bool())
        if kind.startswith("sd3"):
            negatives = {"negative_prompt": prompts} if negative else {}
            first = ["a"] * len(prompts) if negative else prompts
            tokens, no_tokens, pooled, no_pooled = pipe.encode_prompt(
                first,
                second,
                second,
                device="cpu",
                do_classifier_free_guidance=negative,
                **negatives,
            )
            return (
                Conditioning(no_tokens, vector=no_pooled)
                if negative
                else Conditioning(tokens, vector=pooled)
            )
        if kind.startswith("flux2"):
            return Conditioning(pipe.encode_prompt(prompts, device="cpu")[0])
        length = 256 if kind == "flux_schnell" else 512
        tokens, pooled, _ = pipe.encode_prompt(
            prompts, second, device="cpu", max_sequence_length=length
        )
        return Conditioning(tokens, vector=pooled)


def close(result: Conditioning, reference: Conditioning) -> None:
    for name in ("tokens", "vector"):
        a, b = getattr(result, name), getattr(reference, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype == torch.float32, name
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), name
    assert (result.mask is None) == (reference.mask is None)
    assert result.mask is None or reference.mask is None or torch.equal(result.mask, reference.mask)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_as_diffusers_reads_them(
    kind: str, conditioners: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    result = conditioners[kind](PROMPTS)
    close(result, diffusers_conditioning(pipelines[kind], kind, PROMPTS))
    assert torch.equal(result.tokens[0], result.tokens[3]) and not torch.allclose(
        result.tokens[0], result.tokens[1], atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_is_the_empty_one_as_the_negative_prompt_is_there(
    kind: str, conditioners: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    negative = kind.startswith(("pixart", "sd3"))
    close(
        conditioners[kind].null(2),
        diffusers_conditioning(pipelines[kind], kind, ["", ""], negative=negative),
    )


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_second_prompts_go_where_diffusers_sends_them(
    kind: str, conditioners: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    second = ["two dogs", "a fox", "", "mat", "a cat", "runs"]
    close(
        conditioners[kind](PROMPTS, None, second),
        diffusers_conditioning(pipelines[kind], kind, PROMPTS, second),
    )
    same = conditioners[kind](PROMPTS, None, [None] * len(PROMPTS))
    assert all(
        torch.equal(a, b)
        for a, b in zip(same.tensors, conditioners[kind](PROMPTS).tensors, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_cut_where_diffusers_cuts_it(
    kind: str, conditioners: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    cut = replace(conditioners[kind], config=replace(conditioners[kind].config, truncation="cut"))
    close(
        cut(["a cat", LONG, LONG + "and a dog"]),
        diffusers_conditioning(pipelines[kind], kind, ["a cat", LONG, LONG + "and a dog"]),
    )


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_t5_reads_the_tokens_that_clip_cuts_and_the_log_notes_it(
    kind: str,
    conditioners: dict[str, Any],
    pipelines: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompt = "a cat and a red dog " * 12 + "fox"
    with caplog.at_level(logging.INFO):
        result = conditioners[kind]([prompt])
    assert any("CLIP reads the first 75 of" in record.message for record in caplog.records)
    close(result, diffusers_conditioning(pipelines[kind], kind, [prompt]))
    shorter = conditioners[kind]([prompt.removesuffix("fox")])
    assert torch.equal(result.vector, shorter.vector) and not torch.equal(
        result.tokens, shorter.tokens
    )


@pytest.mark.parametrize("kind", ["pixart_alpha", "pixart_sigma"])
def test_pixart_takes_the_image_spec_as_in_diffusers(
    kind: str, conditioners: dict[str, Any]
) -> None:
    """added_cond_kwargs of a network for 1024 pixels: resolution (height, width) and aspect_ratio
    height / width.
    """
    height, width = 832, 1216
    reference = torch.cat(
        [
            torch.tensor([height, width]).repeat(2, 1),
            torch.tensor([float(height / width)]).repeat(2, 1),
        ],
        1,
    )
    for result in (
        conditioners[kind](["a cat", ""], ImageSpec(height, width)),
        conditioners[kind].null(2, ImageSpec(height, width)),
    ):
        assert result.vector.dtype == torch.float32 and torch.equal(result.vector, reference)
    assert conditioners[kind](["a cat"]).vector is None


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_open_in_diffusers_and_sfumato(
    kind: str, conditioners: dict[str, Any], pipelines: dict[str, Any], tmp_path: Path
) -> None:
    import diffusers

    conditioners[kind].save(tmp_path)
    index = {"_class_name": text_encoders.PIPELINES[kind], **conditioners[kind].index()}
    assert index.keys() - {"_class_name"} == text_encoders.parts(kind, tmp_path / "scratch").keys()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    rest = dict.fromkeys(
        [*empty(kind), *(name for name, entry in index.items() if entry == [None, None])]
    )
    loaded = getattr(diffusers, text_encoders.PIPELINES[kind]).from_pretrained(
        tmp_path, local_files_only=True, **rest
    )
    parts = {name: getattr(loaded, name) for name in index if name != "_class_name"}
    close(
        diffusers_conditioning(pipeline(kind, parts), kind, PROMPTS),
        diffusers_conditioning(pipelines[kind], kind, PROMPTS),
    )
    again = named(kind).from_folder(tmp_path)
    assert (
        again.config == conditioners[kind].config
        and again.identity() == conditioners[kind].identity()
        and again.index() == conditioners[kind].index()
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(again(PROMPTS).tensors, conditioners[kind](PROMPTS).tensors, strict=True)
    )
    written, kept = again.tensors(), conditioners[kind].tensors()
    assert written.keys() == kept.keys() and all(
        torch.equal(tensor, kept[key]) for key, tensor in written.items()
    )


@pytest.mark.parametrize("kind", ["pixart_alpha", "sd3", "flux", "flux2_dev", "flux2_klein"])
def test_the_conditioning_widths_of_networks(kind: str, conditioners: dict[str, Any]) -> None:
    result = conditioners[kind](["a"])
    assert result.tokens.shape[-1] == conditioners[kind].width
    assert conditioners[kind].device == torch.device("cpu")


def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def with_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole T5, whose encoder alone is read."""
    return old(tensors) | {
        "decoder.final_layer_norm.weight": torch.ones(48),
        "lm_head.weight": torch.ones(192, 48),
    }


def both_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return old(tensors) | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def other_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace("shared.", "encoder.embed_tokens."): tensor.clone()
        for key, tensor in tensors.items()
    }


def newer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mistral 3's names within transformers."""
    swaps = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    swaps |= {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    return {
        next(new + k.removeprefix(a) for a, new in swaps.items() if k.startswith(a)): t.clone()
        for k, t in tensors.items()
    }


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items() if "lm_head" not in key}


def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return old(tensors) | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("pixart_alpha", change) for change in (with_decoder, both_names, other_name)),
        *(("flux2_dev", change) for change in (newer, without_head)),
        ("flux2_klein", with_head),
    ],
)
def test_files_with_other_names_are_the_same_weights(
    kind: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    conditioners: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    assert changed.keys() != tensors.keys()
    save_file(changed, file, {"format": "pt"})
    result = named(kind).from_folder(folder)
    assert torch.equal(result(PROMPTS[:1]).tokens, conditioners[kind](PROMPTS[:1]).tokens)


def test_a_spiece_and_a_tokenizer_json_read_alike(conditioners: dict[str, Any]) -> None:
    from_spiece, from_json = (
        conditioners["pixart_alpha"].encoder.tokenizer,
        conditioners["flux"].encoder_2.tokenizer,
    )
    assert (
        conditioners["pixart_alpha"].encoder.identity()["tokenizer"]
        == conditioners["flux"].encoder_2.identity()["tokenizer"]
    )
    for prompt in [*PROMPTS, LONG]:
        assert from_spiece(prompt).input_ids == from_json(prompt).input_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_transformers_own(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    """In float16 the same weights stay in float32, and the states are the same bits."""
    from transformers import T5EncoderModel

    result = named("pixart_alpha").from_folder(folders["pixart_alpha"], dtype)
    model = T5EncoderModel.from_pretrained(folders["pixart_alpha"] / "text_encoder", dtype=dtype)
    kinds = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    assert {key: tensor.dtype for key, tensor in result.encoder.model.state_dict().items()} == kinds
    assert (torch.float32 in kinds.values()) == (dtype == torch.float16)
    ids = result.encoder.tokenizer(
        "a cat", padding="max_length", max_length=120, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    assert torch.equal(result(["a cat"]).tokens, states.float())
