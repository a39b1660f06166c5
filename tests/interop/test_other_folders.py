"""Folders that diffusers and transformers open although their files disagree, or hold more than the
network: running averages, other heads, other halves, older buffers, another class in
model_index.json.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

import sfumato
from helpers import clip_encoders, text_encoders
from helpers.models import random_network
from helpers.pipelines import save_pipelines, tiny_pipeline
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.text_encoders.clip import load_clip
from sfumato.predict.text_encoders.language_model import load_language_model
from sfumato.predict.text_encoders.t5 import load_t5

PROMPT = "a cat, a red dog"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipelines(tiny_pipeline, ["SD 1"], tmp_path_factory)["SD 1"]


def changed(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- heads and halves ----------------------------------------------------------------------------


def test_a_running_average_in_the_networks_folder(sd1: Path, tmp_path: Path) -> None:
    """The folder of `EMAModel.save_pretrained`, whose config has the average's settings."""
    folder = Path(shutil.copytree(sd1, tmp_path / "model"))
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    average = EMAModel(
        unet.parameters(), model_cls=diffusers.UNet2DConditionModel, model_config=unet.config,
        use_ema_warmup=True,
    )  # fmt: skip
    average.save_pretrained(folder / "unet")
    assert "inv_gamma" in json.loads((folder / "unet" / "config.json").read_text())
    assert sfumato.load(folder).hash == sfumato.load(sd1).hash
    changed(folder / "unet" / "config.json", momentum=0.9)
    with pytest.raises(sfumato.UserError, match=r"momentum=0.9 is not known"):
        sfumato.load(folder)


def save_projected(folder: Path) -> None:
    clip_encoders.encoder(True, 1).save_pretrained(folder)


def save_without_projection(folder: Path) -> None:
    clip_encoders.encoder(False, 1).save_pretrained(folder)


def save_whole_clip(folder: Path) -> None:
    """Both halves, as the checkpoints of CLIP are published."""
    text = clip_encoders.encoder(True, 1).config.to_dict()
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 10,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    random_network(lambda: transformers.CLIPModel(config), 1).save_pretrained(folder)
    # generation settings of transformers 4, inside the text half's config
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {"num_beams": 1, "top_k": 50, "is_decoder": False}
    (folder / "config.json").write_text(json.dumps(values))


def save_with_buffers(folder: Path) -> None:
    """Position numbers, which older files hold, and names with `text_model.`."""
    save_projected(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        k if k.startswith(("text_model.", "text_proj")) else f"text_model.{k}": v
        for k, v in tensors.items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SAVES = [save_projected, save_without_projection, save_whole_clip, save_with_buffers]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("save", SAVES)
def test_clip_with_other_heads(
    save: Callable[[Path], None], projected: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The states of transformers' class of this name; a projection that is missing is refused."""
    encoder, words = tmp_path / "text_encoder", tmp_path / "tokenizer"
    save(encoder)
    clip_encoders.tokenizer().save_pretrained(words)
    if projected and save is save_without_projection:
        with pytest.raises(sfumato.UserError, match=r"1 missing \(text_projection.weight\)"):
            load_clip(words, encoder, projected, torch.float32)
        return
    with caplog.at_level(logging.WARNING, "sfumato"):
        own = load_clip(words, encoder, projected, torch.float32)
    left = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(left) == (save is save_whole_clip or not (projected or save is SAVES[1]))
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    reference = getattr(transformers, name).from_pretrained(encoder)
    ids = clip_encoders.tokenizer()(PROMPT, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = reference(ids, output_hidden_states=True)
    states, pooled = own.encode(own.tokens([(PROMPT, 1.0)]), 1, norm=False)
    assert torch.allclose(states, output.hidden_states[-1][0], atol=1e-5)
    expected = output.text_embeds if projected else output.pooler_output
    assert torch.allclose(pooled, expected[0], atol=1e-5)


def test_a_model_with_a_projected_encoder_keeps_its_own_after_saving(
    sd1: Path, tmp_path: Path
) -> None:
    """Opened as diffusers does, saved, and opened by both."""
    folder = Path(shutil.copytree(sd1, tmp_path / "model"))
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    tensors["text_projection.weight"] = torch.randn(10, 16)
    save_file(tensors, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    changed(folder / "text_encoder" / "config.json", architectures=["CLIPTextModelWithProjection"])
    model = sfumato.load(folder)
    assert model.hash == sfumato.load(sd1).hash
    model.save(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "text_encoder" / "model.safetensors")
    assert "text_projection.weight" not in stored
    saved = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(saved.text_encoder) is transformers.CLIPTextModel


def test_t5_with_its_decoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = text_encoders.t5_model().config.to_dict() | {"num_decoder_layers": 1}
    config = transformers.T5Config.from_dict(config)
    tokenizer = text_encoders.t5_tokenizer(tmp_path / "tokenizer")
    for kind in (transformers.T5ForConditionalGeneration, transformers.T5Model):
        folder = tmp_path / kind.__name__
        random_network(lambda kind=kind: kind(config), 1).save_pretrained(folder)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sfumato"):
            own = load_t5(tmp_path / "tokenizer", folder, torch.float32)
        assert "that are not used (decoder.*" in caplog.text
        states, _ = own.encode(PROMPT, 12, mask_padding=False, truncation="cut")
        reference = transformers.T5EncoderModel.from_pretrained(folder)
        ids = tokenizer(PROMPT, padding="max_length", max_length=12, return_tensors="pt")
        with torch.no_grad():
            expected = reference(ids["input_ids"]).last_hidden_state[0]
        assert torch.allclose(states, expected, atol=1e-5)


def test_a_language_model_with_buffers_of_older_files(tmp_path: Path) -> None:
    """Frequencies of rotary positions, a head, and names with and without `model.`."""
    text_encoders.qwen_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text_encoders.qwen_model(tied=False).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    expected = load_language_model(tmp_path / "tokenizer", tmp_path / "whole", None).tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    for prefix in ("model.", ""):
        folder = tmp_path / f"old {prefix}"
        shutil.copytree(tmp_path / "whole", folder)
        named = {
            k if k == "lm_head.weight" else prefix + k.removeprefix("model."): v
            for k, v in tensors.items()
        }
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        own = load_language_model(tmp_path / "tokenizer", folder, None).tensors()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in own)


# ---- classes -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ("EulerDiscreteScheduler", "DDIMScheduler"),
        ("DDIMScheduler", "EulerDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", "PNDMScheduler"),
    ],
)
def test_the_scheduler_of_model_index_counts(
    named: str, stored: str, sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The class of model_index.json with the other file's fields, as diffusers builds it."""
    folder = Path(shutil.copytree(sd1, tmp_path / "model"))
    scheduler = getattr(diffusers, stored)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    changed(folder / "model_index.json", scheduler=["diffusers", named])
    built = diffusers.StableDiffusionPipeline.from_pretrained(folder).scheduler
    assert type(built).__name__ == named
    built.save_pretrained(tmp_path / "built")
    config = json.loads((tmp_path / "built" / "scheduler_config.json").read_text())
    model = sfumato.load(folder)
    assert f"scheduler_config.json is of class {stored}, and model_index.json" in caplog.text
    shutil.copy(tmp_path / "built" / "scheduler_config.json", folder / "scheduler")
    caplog.clear()
    again = sfumato.load(folder)
    assert not caplog.records and config["_class_name"] == named
    assert (model.defaults, model.denoiser.process) == (again.defaults, again.denoiser.process)


def test_a_network_of_another_class_than_its_config_says(
    sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(sd1, tmp_path / "model"))
    changed(folder / "unet" / "config.json", _class_name="UNet2DModel")
    assert sfumato.load(folder).hash == sfumato.load(sd1).hash
    assert "model_index.json names UNet2DConditionModel, which is taken" in caplog.text
    values = json.loads((folder / "vae" / "config.json").read_text())
    del values["_class_name"]
    (folder / "vae" / "config.json").write_text(json.dumps(values))
    assert sfumato.load(folder).hash == sfumato.load(sd1).hash
    assert isinstance(sfumato.load(folder).conditioner, ClipText)
