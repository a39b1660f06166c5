"""Fields of a folder of PixArt, Z-Image or FLUX.2 klein that a round trip can lose.

A folder of diffusers with one unusual field is opened, saved as a folder and as a single file, and
converted to a file and back. Each way keeps the field: in the model's settings, its tokens and its
images.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from helpers import text_encoders
from helpers.models import random_network
from helpers.pipelines import save_pipelines, vae_blocks
from sfumato.cli import main
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.sampling import Defaults

FLOW: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}
TRANSFORMER, VAE, INDEX = "transformer/config.json", "vae/config.json", "model_index.json"
SCHEDULER, TEXT = "scheduler/scheduler_config.json", "text_encoder/config.json"
TOKENS, CHAT = "tokenizer/tokenizer_config.json", "tokenizer/chat_template.jinja"


def random_vae(kind: type[Any], levels: tuple[int, ...], **fields: Any) -> Any:
    """An autoencoder with one layer a level."""
    blocks = vae_blocks(len(levels)) | {"block_out_channels": levels, "layers_per_block": 1}
    return random_network(lambda: kind(**blocks, **fields), 2)


def pixart(scratch: Path) -> Any:
    numbers = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1}
    widths = {"cross_attention_dim": 24, "caption_channels": 48, "sample_size": 128}
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    return diffusers.PixArtSigmaPipeline(
        transformer=random_network(
            lambda: diffusers.PixArtTransformer2DModel(**numbers, **widths), 1
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(**betas),
        vae=random_vae(diffusers.AutoencoderKL, (4, 8), latent_channels=4, scaling_factor=0.13025),
        **text_encoders.parts("pixart_sigma", scratch),
    )


def z_image(scratch: Path) -> Any:
    numbers = {"in_channels": 16, "dim": 48, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3}
    axes = {"n_kv_heads": 3, "cap_feat_dim": 12, "axes_dims": (4, 6, 6), "axes_lens": (512, 64, 64)}
    latents = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.ZImagePipeline(
        transformer=random_network(
            lambda: diffusers.ZImageTransformer2DModel(**numbers, **axes), 1
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=random_vae(diffusers.AutoencoderKL, (4, 4, 8, 8), **latents, **bare),
        text_encoder=text_encoders.qwen_model().model,
        tokenizer=text_encoders.qwen_tokenizer(),
    )


def klein(scratch: Path) -> Any:
    numbers = {"in_channels": 32, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": False}
    numbers |= {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32}
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 36}
    return diffusers.Flux2KleinPipeline(
        transformer=random_network(
            lambda: diffusers.Flux2Transformer2DModel(**numbers, **width), 1
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW, use_dynamic_shifting=True),
        vae=random_vae(diffusers.AutoencoderKLFlux2, (4, 4, 8, 8), latent_channels=8),
        **text_encoders.parts("flux2_klein", scratch),
        is_distilled=True,
    )


KINDS: dict[str, Callable[[Path], Any]] = {"PixArt": pixart, "Z-Image": z_image, "klein": klein}
NOTE: dict[str, Any] = {
    "name": "boots",
    "defaults": Defaults(steps=7, guidance=3.0, size=64, sampler="euler").to_json(),
    "training_data": {"images": 12, "name": "clothing"},
}
DYNAMIC = {"use_dynamic_shifting": True}
FIELDS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("PixArt", "all parts"): {
        SCHEDULER: {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear"}
        | {"solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True},
        VAE: {"scaling_factor": 0.3, "shift_factor": 0.2, "force_upcast": False},
        TRANSFORMER: {"interpolation_scale": 4, "norm_eps": 1e-2},
        TEXT: {"layer_norm_epsilon": 1e-2, "relative_attention_max_distance": 60},
        TOKENS: {"model_max_length": 40, "pad_token": "</s>", "eos_token": "a"},
        INDEX: {"_class_name": "PixArtAlphaPipeline"},
    },
    ("PixArt", "betas"): {
        SCHEDULER: {"trained_betas": [0.01] * 500, "num_train_timesteps": 500}
        | {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"},
        VAE: {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4, "scaling_factor": 1.0},
    },
    ("PixArt", "notes"): {
        SCHEDULER: {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        INDEX: {"_sfumato": NOTE},
    },
    ("Z-Image", "all parts"): {
        SCHEDULER: DYNAMIC
        | {"base_shift": 0.4, "max_shift": 1.3}
        | {"base_image_seq_len": 128, "max_image_seq_len": 2048},
        VAE: {"force_upcast": False},
        TRANSFORMER: {"rope_theta": 100.0, "t_scale": 10.0, "norm_eps": 1e-2},
        TEXT: {"rms_norm_eps": 1e-2, "hidden_act": "gelu"},
        TOKENS: {"model_max_length": 40, "pad_token": "<|im_end|>", "padding_side": "left"},
        CHAT: {"": "a{{ messages[0].content }}"},
    },
    ("Z-Image", "rope"): {
        SCHEDULER: {"shift": 5.0, "stochastic_sampling": True},
        TEXT: {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    },
    ("Z-Image", "notes"): {
        SCHEDULER: {"shift": 4.0},
        INDEX: {"_sfumato": NOTE},
    },
    ("klein", "all parts"): {
        SCHEDULER: DYNAMIC | {"time_shift_type": "linear", "stochastic_sampling": True},
        VAE: {"batch_norm_eps": 0.1, "batch_norm_momentum": 0.2},
        TRANSFORMER: {"rope_theta": 100, "eps": 1e-2},
        TEXT: {"rms_norm_eps": 1e-2, "hidden_act": "gelu"},
        TOKENS: {"model_max_length": 40, "pad_token": "<|im_end|>", "padding_side": "left"},
        CHAT: {"": "a{{ messages[0].content }}"},
        INDEX: {"is_distilled": False},
    },
    ("klein", "notes"): {
        SCHEDULER: {"use_dynamic_shifting": False},
        INDEX: {"_sfumato": NOTE},
    },
}
"""Fields that a folder of the kind can hold, by file, with values that are not the usual ones."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(
        lambda kind: KINDS[kind](tmp_path_factory.mktemp("scratch")), KINDS, tmp_path_factory
    )


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.suffix == ".json" else {"": file.read_text()}


def changed(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    for name, fields in files.items():
        assert not fields.items() <= read(folder / name).items(), f"{name} has other values"
        values = read(folder / name) | fields
        (folder / name).write_text(values[""] if name == CHAT else json.dumps(values))
    return folder


def settings(model: LatentDiffusion) -> dict[str, Any]:
    """All that a model holds beside its weights, which are in its hash."""
    return {
        "name": model.name,
        "hash": model.hash,
        "defaults": model.defaults,
        "training data": dict(model.training_data),
        "process": model.denoiser.process,
        "network": model.denoiser.network.to_config(),  # type: ignore[union-attr]
        "autoencoder": model.autoencoder.to_config(),
        "conditioner": model.conditioner.identity(),
    }


def draw(model: LatentDiffusion) -> Tensor:
    return model.generate("a cat, 3 dogs", steps=2, height=64, width=48, seed=4, output="tensor")


@pytest.fixture(scope="module")
def images(folders: dict[str, Path]) -> dict[str, Tensor]:
    return {kind: draw(load(folder)) for kind, folder in folders.items()}


def converted(source: Path, target: Path) -> Path:
    assert main(["convert", str(source), str(target)]) == 0
    return target


def kept(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The values of these fields in a file; a scheduler's class has some that are left out."""
    written = read(file)
    if file.parent.name == "scheduler":
        usual = inspect.signature(getattr(diffusers, written["_class_name"])).parameters
        written = {key: usual[key].default for key in fields if key in usual} | written
    if "_sfumato" in fields:
        written["_sfumato"] = {k: v for k, v in written["_sfumato"].items() if k != "version"}
    return {key: written.get(key) for key in fields}


@pytest.mark.parametrize(("kind", "case"), FIELDS)
def test_every_field_is_kept(
    kind: str,
    case: str,
    folders: dict[str, Path],
    images: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    files = FIELDS[kind, case]
    source = changed(Path(shutil.copytree(folders[kind], tmp_path / "source" / "model")), files)
    model = load(source)
    expected, image = settings(model), draw(model)
    assert not torch.equal(image, images[kind]), "the fields change images"
    places = [tmp_path / "saved" / "model", tmp_path / "file" / "model.safetensors"]
    for place in places:
        place.parent.mkdir()
        model.save(place)
    places += [converted(places[1], tmp_path / "back" / "model")]
    if kind == "Z-Image":  # whole single files of the others have no layout but sfumato's
        places += [converted(source, tmp_path / "other" / "model.safetensors")]
        places += [converted(places[-1], tmp_path / "last" / "model")]
    for place in places:
        again = load(place)
        assert settings(again) == expected, place
        if place.suffix:  # the folder after it is of this file
            continue
        assert torch.equal(draw(again), image), place
        for name, fields in files.items():
            assert kept(place / name, fields) == fields, place
