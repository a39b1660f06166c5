"""Fields of a folder that a round trip can lose: each is kept, or refused, or a sentence says so.

A folder of diffusers with one unusual field is opened, saved as a folder and as a single file, and
opened again: the same images. Folders that sfumato saved draw the same in diffusers.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors import safe_open
from torch import Tensor

import sfumato
from helpers import clip_encoders, text_encoders
from helpers.pipelines import (
    assert_same_images,
    open_pipeline,
    original_pipeline,
    pipeline_images,
    save_pipelines,
    tiny_pipeline,
    without_prompt_weights,
)
from sfumato.errors import UserError
from sfumato.predict.conditioners._chunks import cut
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.text_encoders._transformers import spell_out
from sfumato.predict.text_encoders.clip import ClipEncoder

ORIGINALS = ["SD 1", "SD 2 with v", "SDXL"]
PAD, END = "!", clip_encoders.END


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(original_pipeline, ORIGINALS, tmp_path_factory)


def changed(folder: Path, file: str, **fields: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def draw(model: Any) -> Tensor:
    return model.generate("a cat!", steps=2, height=16, width=16, seed=4, output="tensor")


# ---- fields --------------------------------------------------------------------------------------

SCHEDULER, TOKENS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
NOTE = {
    "name": "boots",
    "defaults": {
        "steps": 7, "guidance": 3.0, "size": 24,
        "tuned_timesteps": {"ddim": [[0.9, 0.5, 0.0]]},
    },
    "training_data": {"images": 12, "name": "clothing"},
}  # fmt: skip
KEPT: list[tuple[str, str, dict[str, Any]]] = [
    ("SD 1", SCHEDULER, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("SD 1", SCHEDULER, {"steps_offset": 3, "set_alpha_to_one": False}),
    ("SD 1", SCHEDULER, {"trained_betas": [0.01] * 1000}),
    ("SD 1", SCHEDULER, {"num_train_timesteps": 500, "beta_start": 0.001}),
    ("SD 1", "vae/config.json", {"scaling_factor": 0.3}),
    ("SD 1", TOKENS, {"model_max_length": 40}),
    ("SD 1", TOKENS, {"pad_token": PAD}),
    ("SD 1", TOKENS, {"bos_token": "a"}),
    ("SD 2 with v", TOKENS, {"pad_token": END}),
    ("SDXL", "tokenizer_2/tokenizer_config.json", {"pad_token": END}),
    ("SDXL", TOKENS, {"pad_token": "a"}),
    ("SDXL", "model_index.json", {"force_zeros_for_empty_prompt": False}),
    ("SD 1", "model_index.json", {"_sfumato": NOTE}),
]
"""Fields that change images and that both a folder and a single file keep."""


@pytest.fixture(scope="module")
def images(folders: dict[str, Path]) -> dict[str, Tensor]:
    return {family: draw(sfumato.load(folder)) for family, folder in folders.items()}


@pytest.mark.parametrize(("family", "file", "fields"), KEPT)
def test_fields_that_are_kept(
    family: str,
    file: str,
    fields: dict[str, Any],
    folders: dict[str, Path],
    images: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = changed(Path(shutil.copytree(folders[family], tmp_path / "model")), file, **fields)
    model = sfumato.load(folder)
    expected = draw(model)
    assert not torch.allclose(expected, images[family], atol=1e-3), "the field changes images"
    for name in ("again", "again.safetensors"):
        caplog.clear()
        model.save(tmp_path / name)
        again = sfumato.load(tmp_path / name)
        assert torch.allclose(draw(again), expected, atol=5e-5)
        assert (again.defaults, again.denoiser.process) == (model.defaults, model.denoiser.process)
        assert (again.name, again.training_data) == (model.name, model.training_data)
        # other programs do not read the notes of a single file
        warned = name != "again" and file.startswith("tokenizer")
        assert ("other programs, which take their own, draw other images" in caplog.text) == warned


@pytest.mark.parametrize("family", ORIGINALS)
def test_usual_tokenizers_are_not_noted(
    family: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sfumato.load(folders[family]).save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        note = json.loads(file.metadata()["sfumato.tokenizer"])
    assert note.keys() == {"vocab", "merges"} and not caplog.records


def test_a_damaged_note_of_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders["SD 1"], tmp_path / "model"))
    sfumato.load(changed(folder, TOKENS, pad_token=PAD)).save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["sfumato.tokenizer"])["settings"] == {"": {"pad_token": PAD}}
    tensors = load_file(tmp_path / "a.safetensors")
    for key, old, new, words in (
        (
            "sfumato.tokenizer",
            '"pad_token"',
            '"padding"',
            "settings .*: expected some of bos_token",
        ),
        ("sfumato.fields", "sample_size", "in_channels", "has other fields: it may be damaged"),
    ):
        noted = {"sfumato.fields": '{"unet": {"sample_size": 8}}'} | metadata
        noted[key] = noted[key].replace(old, new)
        save_file(tensors, tmp_path / "b.safetensors", noted)
        with pytest.raises(UserError, match=words):
            sfumato.load(tmp_path / "b.safetensors")


def test_fields_that_keys_do_not_show(folders: dict[str, Path], tmp_path: Path) -> None:
    """The default size of images, and the precision of layers in float16."""
    folder = Path(shutil.copytree(folders["SD 1"], tmp_path / "model"))
    changed(folder, "unet/config.json", sample_size=16, upcast_attention=True)
    changed(folder, "vae/config.json", force_upcast=False)
    model = sfumato.load(folder)
    assert model.sample_size == 32 != sfumato.load(folders["SD 1"]).sample_size
    for name in ("again", "again.safetensors"):
        model.save(tmp_path / name)
        again = sfumato.load(tmp_path / name)
        assert again.sample_size == 32
        again.save(tmp_path / "last")
        unet, vae = (
            json.loads((tmp_path / "last" / part / "config.json").read_text())
            for part in ("unet", "vae")
        )
        assert (unet["sample_size"], unet["upcast_attention"]) == (16, True)
        assert vae["force_upcast"] is False


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vae/config.json", {"shift_factor": 0.2}, "vae's shift_factor=0.2"),
    ("unet/config.json", {"flip_sin_to_cos": False}, "unet's flip_sin_to_cos=False"),
    ("unet/config.json", {"norm_eps": 1e-3}, "unet's norm_eps=0.001"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "text_encoder's hidden_act='relu'"),
    ("text_encoder/config.json", {"layer_norm_eps": 1e-3}, "text_encoder's layer_norm_eps=0.001"),
]


@pytest.mark.parametrize(("file", "fields", "words"), REFUSED)
def test_fields_that_a_single_file_cannot_hold(
    file: str, fields: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(Path(shutil.copytree(folders["SD 1"], tmp_path / "model")), file, **fields)
    model = sfumato.load(folder)
    with pytest.raises(UserError, match=words):
        model.save(tmp_path / "a.safetensors")
    model.save(tmp_path / "again")
    assert torch.equal(draw(sfumato.load(tmp_path / "again")), draw(model))


def test_an_edit_model_with_scaled_image_latents_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["SDXL"], tmp_path / "model"))
    changed(folder, "model_index.json", is_cosxl_edit=False)
    sfumato.load(folder)
    with pytest.raises(UserError, match="has is_cosxl_edit=true"):
        sfumato.load(changed(folder, "model_index.json", is_cosxl_edit=True))


# ---- textual inversions --------------------------------------------------------------------------


def inverted(family: str, folder: Path, build: Callable[[str], Any] = tiny_pipeline) -> Any:
    """A pipeline of diffusers with a learned word of three vectors, and one of one vector."""
    pipe = build(family)
    ends = [end for end in ("", "_2") if getattr(pipe, f"text_encoder{end}", None) is not None]
    for end in ends:
        encoder, tokenizer = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
        generator = torch.Generator().manual_seed(1)
        for token, count in (("<toy>", 3), ("<style>", 1)):
            vectors = torch.randn(count, encoder.config.hidden_size, generator=generator)
            pipe.load_textual_inversion(
                vectors, token=token, text_encoder=encoder, tokenizer=tokenizer
            )
    pipe.save_pretrained(folder)
    return pipe


PROMPTS = ["a <toy>, red", "<toy> and (<toy>) in <style>"]


@pytest.mark.parametrize("family", ["SD 1", "SDXL"])
def test_all_vectors_of_a_learned_word_are_read(family: str, tmp_path: Path) -> None:
    """As diffusers reads them, from its folder and from one that sfumato saved."""
    inverted(family, tmp_path / "model")
    options: dict[str, Any] = {"height": 16, "width": 16, "negative_prompt": ["no <toy>", "dog"]}
    sfumato.load(tmp_path / "model").save(tmp_path / "again")
    expected = pipeline_images(
        open_pipeline(tmp_path / "again"), PROMPTS, num_inference_steps=5, **options
    )
    for name in ("model", "again"):
        model = without_prompt_weights(sfumato.load(tmp_path / name))
        result = model.generate(
            PROMPTS, steps=5, sampler="ddim", spacing="leading:offset=1", output="tensor",
            guidance=5.0 if family == "SDXL" else 7.5, **options,
        )  # fmt: skip
        assert_same_images(result, expected)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    """SD 1's encoder with the words <toy> and <Big> of three vectors and <style> of one."""
    folder = tmp_path_factory.mktemp("learned")
    pipe = inverted("SD 1", folder)
    vectors = torch.randn(3, pipe.text_encoder.config.hidden_size)
    pipe.load_textual_inversion(vectors, token="<Big>")
    pipe.save_pretrained(folder)
    conditioner = ClipText.from_folder(folder)
    assert conditioner.encoder is not None
    return conditioner.encoder


def names(encoder: ClipEncoder, text: str) -> list[str]:
    tokens = encoder.tokens([(text, 1.0)])
    return encoder.tokenizer.convert_ids_to_tokens([token.id for token in tokens])


def test_tokens_of_learned_words(learned: ClipEncoder) -> None:
    toy = ["<toy>", "<toy>_1", "<toy>_2"]
    assert names(learned, "a <toy>,") == ["a</w>", *toy, ",</w>"]
    assert names(learned, "<toy><toy> <style>") == [*toy, *toy, "<style>"]
    assert names(learned, "<toy> <toy>_1 <toy>_2 cat") == [*toy, "cat</w>"], "written out"
    assert names(learned, "<toy>_1 cat") == ["<toy>_1", "cat</w>"], "one of its vectors"
    assert names(learned, "a <BIG>") == ["a</w>", "<big>", "<big>_1", "<big>_2"]
    assert names(learned, "cat") == ["cat</w>"] and names(learned, "") == []


def test_a_learned_word_is_not_cut(learned: ClipEncoder) -> None:
    """It is one word: a chunk ends before it, and its vectors have its weight."""
    tokens = learned.tokens([("a " * 74, 1.0), ("<toy>", 1.5)])
    chunks = cut(tokens, 75)
    assert [len(chunk) for chunk in chunks] == [74, 3]
    assert {token.weight for token in chunks[1]} == {1.5}
    assert [token.last for token in chunks[1]] == [False, False, True]


def test_learned_words_of_t5(tmp_path: Path) -> None:
    """The prompt of diffusers' `maybe_convert_prompt`, which FLUX.1 gives its T5."""
    tokenizer = text_encoders.t5_tokenizer(tmp_path / "tokenizer")
    tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    for prompt in ("a cat on <toy>, red", "<toy>", "a cat"):
        assert spell_out(tokenizer, prompt) == convert(prompt, tokenizer)


def test_added_tokens_have_no_place_in_a_single_file(tmp_path: Path) -> None:
    inverted("SD 1", tmp_path / "model", original_pipeline)
    model = sfumato.load(tmp_path / "model")
    with pytest.raises(UserError) as error:
        model.save(tmp_path / "a.safetensors")
    words = "tokenizer has 4 added tokens (<toy>, <toy>_1, <toy>_2, <style>), such as those of"
    assert str(error.value).startswith(words) and not (tmp_path / "a.safetensors").exists()


def test_other_words_of_the_second_tokenizer_have_no_place_either(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = sfumato.load(folders["SDXL"])
    assert isinstance(model.conditioner, ClipText) and model.conditioner.encoder is not None
    words = clip_encoders.vocabulary()
    swapped = words | {"a": words["b"], "b": words["a"]}
    tokenizer = type(model.conditioner.encoder.tokenizer)(
        vocab=swapped, merges=[*clip_encoders.MERGES], model_max_length=77, pad_token=END
    )
    encoder = replace(model.conditioner.encoder, tokenizer=tokenizer)
    conditioner = replace(model.conditioner, encoder=encoder)
    with pytest.raises(UserError, match="tokenizer has other words than the model's other"):
        replace(model, conditioner=conditioner).save(tmp_path / "a.safetensors")
