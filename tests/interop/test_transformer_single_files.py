"""Whole SD 3 and FLUX.1 models in one file, networks in files beside a folder, DiT and SiT.

They open as models with the same images, and are written as files that diffusers' converters and
transformers read as the same tensors.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfumato
from helpers import clip_encoders, text_encoders
from helpers.file_opens import opens
from helpers.models import random_network
from helpers.tensors import equal_tensors
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint, ReadOptions
from sfumato.checkpoints.families import FLOW, Family, TransformerFamily
from sfumato.checkpoints.families.flux import DYNAMIC
from sfumato.checkpoints.formats.folded import KEY as FOLDED_KEY
from sfumato.checkpoints.lazy_tensor import LazyTensor, from_tensors
from sfumato.checkpoints.metadata import CONFIGS, TOKENIZERS
from sfumato.checkpoints.metadata import TRANSFORMER as NOTE
from sfumato.checkpoints.schedulers.config import read_scheduler
from sfumato.cli import main
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_labels import ClassLabels
from sfumato.predict.conditioners.flux_text import FluxText, FluxTextConfig
from sfumato.predict.conditioners.sd3_text import Sd3Text, Sd3TextConfig
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.base import build, registered
from sfumato.predict.networks.sit import SiTConfig, SiTTransformer
from sfumato.predict.text_encoders.clip import ClipEncoder
from sfumato.predict.text_encoders.t5 import T5Encoder
from sfumato.sampling import Defaults
from sfumato.types import Conditioning

SD3: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "caption_projection_dim": 64,
}
SD3 |= {
    "joint_attention_dim": 192,
    "pooled_projection_dim": 160,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
}
FLUX |= {
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
CLASSES = {"sd3": ("SD3Transformer2DModel", SD3), "flux": ("FluxTransformer2DModel", FLUX)}
CLASSES |= {"schnell": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": False})}
CONVERTERS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
}
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
}
DIT |= {"num_embeds_ada_norm": 5, "norm_eps": 1e-6}
PREFIX = "model.diffusion_model."


LATENTS = {
    family.name: family.latents
    for family in families.registered()
    if isinstance(family, TransformerFamily) and family.latents
}


def write_transformer(
    family: Family, config: dict[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    raw = family.write(
        Checkpoint({"transformer": Component(config, tensors)}, path=Path("network"))
    )
    return dict(raw.tensors), dict(raw.metadata)


def network(name: str, **fields: Any) -> Any:
    class_name, values = CLASSES[name]
    return random_network(lambda: build(registered()[class_name][1](**values | fields)), 1)


def autoencoder(scale: float, shift: float | None, channels: int = 16) -> AutoencoderKL:
    config = KLConfig(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=channels,
        scaling_factor=scale, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=16,
    )  # fmt: skip
    return random_network(lambda: AutoencoderKL(config), 2)


def clip(projected: bool, seed: int, pad: str, **fields: Any) -> ClipEncoder:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    size, kind = (
        len(clip_encoders.vocabulary()),
        CLIPTextModelWithProjection if projected else CLIPTextModel,
    )
    words = {
        "vocab_size": size,
        "max_position_embeddings": 77,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    network = random_network(lambda: clip_encoders.wide_encoder(kind, **words | fields), seed)
    return ClipEncoder(clip_encoders.tokenizer(pad), network, projected)


def t5(width: int, scratch: Path) -> T5Encoder:
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
    tokenizer = text_encoders.t5_tokenizer(scratch / f"spiece-{width}")
    return T5Encoder(
        tokenizer, random_network(lambda: T5EncoderModel(config), 3), text_encoders.spiece()
    )


def texts(name: str, scratch: Path) -> Any:
    if name != "sd3":
        return FluxText(
            clip(False, 1, clip_encoders.END),
            t5(32, scratch),
            FluxTextConfig(max_sequence_length=512 if name == "flux" else 256),
        )
    big = clip(
        True, 2, "!", hidden_size=128, num_attention_heads=2, projection_dim=96, hidden_act="gelu"
    )
    return Sd3Text(clip(True, 1, clip_encoders.END), big, t5(192, scratch))


def whole(name: str, scratch: Path) -> LatentDiffusion:
    """A model as `load` would make one of the published folder."""
    scheduler = FLOW | (DYNAMIC if name == "flux" else {"shift": 1.0 if name == "schnell" else 3.0})
    recipe = read_scheduler(scheduler, even=name != "sd3" or None)
    run: dict[str, Any] = {"sampler": recipe.sampler, "spacing": recipe.default_spacing}
    run |= (
        {"steps": 28, "guidance": 7.0}
        if name == "sd3"
        else {"steps": 28 if name == "flux" else 4, "guidance": 1.0}
    )
    parts = (
        autoencoder(*LATENTS["sd3" if name == "sd3" else "flux"]),
        Denoiser(network(name), recipe.process),
        texts(name, scratch),
    )
    record = {"images": 12}
    return LatentDiffusion(*parts, Defaults(**run), f"tiny-{name}", training_data=record)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusion]:
    scratch = tmp_path_factory.mktemp("tokenizers")
    return {name: whole(name, scratch) for name in CLASSES}


def converted(
    name: str, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Convert a file with diffusers.

    Its converter handles FLUX's own width only; it cuts in the same way at 64.
    """
    split = torch.split
    with monkeypatch.context() as patch:
        if name == "flux":
            patch.setattr(
                torch,
                "split",
                lambda t, sizes, dim=0: split(t, [s * 64 // 3072 for s in sizes], dim),
            )
        return CONVERTERS[name](dict(tensors))


def picture(model: LatentDiffusion) -> Tensor:
    """The latent after two steps, with the model's own sampler and times."""
    return model.generate("a red dog", steps=2, seed=3, height=16, width=16, output="latent")


def same(a: Tensor, b: Tensor) -> bool:
    """True if images are equal but for the last bits of CLIP's pooled vector.

    Those depend on the address of its weights.
    """
    return bool((a - b).norm() < 1e-5 * b.norm())


@pytest.fixture(scope="module")
def saved(
    models: dict[str, LatentDiffusion], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The place of a model as `folder` and as `a.safetensors`, for reading only."""

    @cache
    def place(name: str) -> Path:
        result = tmp_path_factory.mktemp(name)
        models[name].save(result / "folder")
        models[name].save(result / "a.safetensors")
        return result

    return place


def notes_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# ---- whole files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_there_and_back(
    name: str, models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same model from the file, and the same file from that model, to the last bit."""
    model = models[name]
    again = sfumato.load(saved(name) / "a.safetensors")
    assert (again.hash, again.name, again.defaults) == (model.hash, model.name, model.defaults)
    assert again.training_data == model.training_data != {}
    assert (
        again.denoiser.process == model.denoiser.process
        and again.conditioner.to_config() == model.conditioner.to_config()
    )
    assert same(picture(again), picture(model))
    again.save(tmp_path / "b.safetensors")
    assert equal_tensors(
        load_file(saved(name) / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    )
    one, two = (
        notes_of(path) for path in (saved(name) / "a.safetensors", tmp_path / "b.safetensors")
    )
    assert {k: v for k, v in one.items() if k != TOKENIZERS} == {
        k: v for k, v in two.items() if k != TOKENIZERS
    }
    again.save(tmp_path / "folder")
    assert sfumato.load(tmp_path / "folder").hash == model.hash


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_others_read_the_file(
    name: str,
    models: dict[str, LatentDiffusion],
    saved: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models[name]
    file = load_file(saved(name) / "a.safetensors")
    assert equal_tensors(
        converted(name, below(file, PREFIX), monkeypatch), dict(model.denoiser.network.state_dict())
    )
    assert equal_tensors(
        single_file_utils.convert_ldm_vae_checkpoint(dict(file), model.autoencoder.to_config()),
        dict(model.autoencoder.state_dict()),
    )
    if name == "sd3":
        for part, tower in (("", "clip_l"), ("_2", "clip_g")):
            result = single_file_utils.convert_ldm_clip_checkpoint(
                dict(file), f"text_encoders.{tower}.transformer."
            )
            assert equal_tensors(result, model.conditioner.encoders[part].tensors())
        assert equal_tensors(
            below(file, "text_encoders.t5xxl.transformer."), model.conditioner.encoder_3.tensors()
        )
    assert NOTE not in notes_of(saved(name) / "a.safetensors") or set(
        json.loads(notes_of(saved(name) / "a.safetensors")[NOTE])
    ) == {"sample_size"}


@pytest.mark.parametrize("name", CLASSES)
def test_files_of_others(
    name: str, models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without a note: tokenizers from a folder, published settings for the rest."""
    model = models[name]
    save_file(load_file(saved(name) / "a.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(
        UserError,
        match=r"bare\.safetensors has text encoders and no tokenizers.*tokenizer and tokenizer_2",
    ):
        sfumato.load(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="has no folder tokenizer"):
        sfumato.load(tmp_path / "bare.safetensors", tokenizer=tmp_path)
    result = sfumato.load(tmp_path / "bare.safetensors", tokenizer=saved(name) / "folder")
    assert result.defaults == model.defaults and result.denoiser.process == model.denoiser.process
    assert result.conditioner.to_config() == model.conditioner.to_config() and result.name == "bare"
    assert same(picture(result), picture(model))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_convert_keeps_all_that_changes_an_image(
    name: str, models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """`sfumato convert` from a folder to a file, to another, and back: each opens alone, with its
    tokenizers, and draws the same.
    """
    one, two, folder = (
        tmp_path / "one.safetensors",
        tmp_path / "two.safetensors",
        tmp_path / "folder",
    )
    assert main(["convert", str(saved(name) / "folder"), str(one)]) == 0
    assert main(["convert", str(one), str(two), "--dtype", "fp32"]) == 0
    assert main(["convert", str(two), str(folder)]) == 0
    assert main(["convert", str(saved(name) / "a.safetensors"), str(tmp_path / "other")]) == 0
    model = models[name]
    for place in (one, folder, tmp_path / "other"):
        result = sfumato.load(place)
        assert (result.hash, result.name, result.defaults) == (
            model.hash,
            model.name,
            model.defaults,
        ), place
        assert result.training_data == model.training_data
        assert result.conditioner.to_config() == model.conditioner.to_config()
    assert same(picture(result), picture(model))
    entries = [
        json.loads((path / "model_index.json").read_text())
        for path in (folder, saved(name) / "folder")
    ]
    assert all(entries[0][key] == entries[1][key] for key in entries[0] if key != "_sfumato"), (
        "diffusers opens the tokenizers by their classes"
    )


def test_convert_follows_the_classes_of_model_index(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """As `load` does, also for a community's pipeline."""
    folder = Path(shutil.copytree(saved("flux") / "folder", tmp_path / "folder"))
    for file, name in (
        ("transformer/config.json", "SD3Transformer2DModel"),
        ("scheduler/scheduler_config.json", "DDIMScheduler"),
        ("model_index.json", ["mine.py", "FluxPipeline"]),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    assert main(["convert", str(folder), str(tmp_path / "a.safetensors")]) == 0
    result, model = sfumato.load(tmp_path / "a.safetensors"), models["flux"]
    assert (result.hash, result.denoiser.process) == (model.hash, model.denoiser.process)


SCHEDULER = "scheduler/scheduler_config.json"
MOVED = {"base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 4, "max_image_seq_len": 30}
FIELDS: list[tuple[str, str, dict[str, Any]]] = [
    ("sd3", SCHEDULER, {"shift": 2.0}),
    ("sd3", SCHEDULER, {"use_dynamic_shifting": True, **MOVED}),
    ("sd3", "transformer/config.json", {"sample_size": 4}),
    ("sd3", "tokenizer_2/tokenizer_config.json", {"pad_token": "a"}),
    ("sd3", "tokenizer_3/tokenizer_config.json", {"model_max_length": 20}),
    ("flux", SCHEDULER, MOVED),
    ("flux", SCHEDULER, {"time_shift_type": "linear"}),
    ("flux", SCHEDULER, {"shift_terminal": 0.1}),
    ("schnell", SCHEDULER, {"shift": 3.0}),
]
"""Fields of folders that both single files keep, those of `save` and of `convert`."""


@pytest.mark.parametrize(("name", "file", "fields"), FIELDS)
def test_fields_that_are_kept(
    name: str, file: str, fields: dict[str, Any], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    def facts(place: Path) -> tuple[Any, ...]:
        model = sfumato.load(place)
        encoders = model.conditioner.encoders
        tokens = [encoder.tokenizer for encoder in encoders.values()]
        lengths = [(token.model_max_length, token.pad_token) for token in tokens]
        configs = [model.denoiser.network.to_config(), model.conditioner.to_config()]
        parts = (model.hash, model.denoiser.process, model.defaults, model.autoencoder.space)
        return (*parts, configs, lengths)

    folder = Path(shutil.copytree(saved(name) / "folder", tmp_path / "folder"))
    index = json.loads((folder / "model_index.json").read_text())
    del index["_sfumato"]  # as of another program, whose scheduler decides
    (folder / "model_index.json").write_text(json.dumps(index))
    usual = facts(folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | fields))
    expected = facts(folder)
    assert expected != usual, "the field counts"
    sfumato.load(folder).save(tmp_path / "again")
    sfumato.load(folder).save(tmp_path / "a.safetensors")
    for source, target in (("folder", "b.safetensors"), ("b.safetensors", "back")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
    for place in ("again", "a.safetensors", "b.safetensors", "back"):
        assert facts(tmp_path / place) == expected, place


def test_half_precision(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models["flux"]
    half = sfumato.load(saved("flux") / "a.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in half.denoiser.network.parameters()} == {torch.bfloat16}
    model.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    assert sfumato.load(tmp_path / "half.safetensors", dtype=torch.bfloat16).hash == half.hash


def test_sd3_without_t5(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models["sd3"]
    model = replace(
        model,
        conditioner=replace(
            model.conditioner, encoder_3=None, config=Sd3TextConfig(joint_attention_dim=192)
        ),
    )
    model.save(tmp_path / "a.safetensors")
    assert not any("t5xxl" in k for k in load_file(tmp_path / "a.safetensors"))
    assert sfumato.load(tmp_path / "a.safetensors").hash == model.hash
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "bare.safetensors")
    assert same(
        picture(sfumato.load(tmp_path / "bare.safetensors", tokenizer=saved("sd3") / "folder")),
        picture(model),
    )


def test_models_outside_the_layout(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Heads, latents or text encoders unlike the published ones are in sfumato's own layout.

    The file gives the same model.
    """
    model = models["flux"]
    flat = replace(model, autoencoder=autoencoder(0.5, None))
    norm = replace(
        model,
        conditioner=replace(
            model.conditioner,
            encoder=clip(False, 1, clip_encoders.END, layer_norm_eps=1e-3, hidden_act="gelu"),
        ),
    )
    axes = replace(
        model, denoiser=replace(model.denoiser, network=network("flux", axes_dims_rope=(8, 12, 12)))
    )
    eps = replace(
        model,
        denoiser=replace(
            model.denoiser, process=Process(schedule("linear"), parameterization("eps"))
        ),
    )
    for k, other in enumerate((flat, norm, axes, eps)):
        path = tmp_path / f"{k}.safetensors"
        other.save(path)
        assert FOLDED_KEY in notes_of(path), k
        assert sfumato.load(path).hash == other.hash
    assert FOLDED_KEY not in notes_of(saved("flux") / "a.safetensors")


def test_damaged_files(saved: Callable[[str], Path], tmp_path: Path) -> None:
    good = saved("flux") / "a.safetensors"
    file, notes = load_file(good), notes_of(good)
    bad = tmp_path / "bad.safetensors"
    key = "first_stage_model.decoder.conv_in.weight"
    tables: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        ({k: v for k, v in file.items() if k != key}, notes, "conv_in"),
        (file | {key: file[key] * math.nan}, notes, "NaN"),
        (file | {"more.weight": torch.ones(1)}, notes, r"more\.weight"),
        (
            {k: v for k, v in file.items() if k.startswith(PREFIX)},
            {},
            r"holds a network alone.*transformer=FILE",
        ),
        (
            {k: v for k, v in file.items() if not k.startswith("text_")},
            {},
            "holds a network and an autoencoder alone",
        ),
        (file, notes | {CONFIGS: "[1]"}, "no table of configs"),
        (file, notes | {CONFIGS: "{"}, "wrong kind"),
        (file, notes | {TOKENIZERS: "{}"}, "tokenizer"),
        (
            file,
            notes | {TOKENIZERS: json.dumps({"tokenizer": {"../x": ""}, "tokenizer_2": {}})},
            "names a path",
        ),
        (file, notes | {"sfumato.scheduler": '{"_class_name": "DDIMSchedule"}'}, "DDIMSchedule"),
        (file, notes | {"sfumato.model": '{"defaults": {"steps": -1}}'}, "steps"),
    ]
    for tensors, metadata, message in tables:
        save_file(tensors, bad, metadata)
        with pytest.raises(
            UserError, match=f"(?s)bad.safetensors.*{message}|{message}.*bad.safetensors"
        ):
            sfumato.load(bad)
    with pytest.raises(UserError, match="reading="):
        sfumato.load(good, reading=ReadOptions(ema=True))


# ---- a network in a file of its own --------------------------------------------------------------


def lone(model: LatentDiffusion, name: str, path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Writes the network of a model under its original names."""
    net: Any = model.denoiser.network
    table, _ = write_transformer(
        families.by_name(name), net.to_config(), from_tensors(net.state_dict())
    )
    tensors = {prefix + k: v.load().contiguous() for k, v in table.items()}
    save_file(tensors, path)
    return tensors


@pytest.fixture
def base(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """FLUX's folder without the weights of its network."""
    shutil.copytree(saved("flux") / "folder", tmp_path / "base")
    (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return tmp_path / "base"


def test_a_network_beside_a_folder(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    model = models["flux"]
    with pytest.raises(UserError, match="has no weights"):
        sfumato.load(base)
    for prefix in ("", PREFIX):
        tensors = lone(model, "flux", tmp_path / "net.safetensors", prefix)
        result = sfumato.load(base, transformer=tmp_path / "net.safetensors")
        assert (
            result.hash == model.hash
            and result.defaults == model.defaults
            and same(picture(result), picture(model))
        )
    # settings of the weights that are replaced, and a class that model_index.json corrects
    config = base / "transformer" / "config.json"
    fields = {"quantization_config": {"quant_method": "bitsandbytes"}, "min_decay": 0.1}
    fields["_class_name"] = "SD3Transformer2DModel"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    assert sfumato.load(base, transformer=tmp_path / "net.safetensors").hash == model.hash
    torch.save({"state_dict": tensors}, tmp_path / "net.pt")
    assert sfumato.load(base, transformer=str(tmp_path / "net.pt")).hash == model.hash
    every = saved("flux") / "a.safetensors"  # of a whole file the network is taken
    assert sfumato.load(base, transformer=every).hash == model.hash


def test_quantised_networks(
    models: dict[str, LatentDiffusion], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GGUF's Q8_0, whose numbers are written out here, and eight bits with scales."""
    tensors = lone(models["flux"], "flux", tmp_path / "net.safetensors")
    writer, expected = gguf.GGUFWriter(tmp_path / "net.gguf", "flux"), {}
    for key, tensor in tensors.items():
        data = tensor.numpy()
        if tensor.ndim == 2:
            blocks = data.reshape(-1, 32)
            scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
            numbers = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
            expected[key] = torch.from_numpy(
                (scale.astype(np.float32) * numbers).reshape(data.shape)
            )
            packed = np.concatenate([scale.view(np.uint8), numbers.view(np.uint8)], 1).reshape(
                data.shape[0], -1
            )
            writer.add_tensor(key, packed, raw_dtype=Kind.Q8_0)
        else:
            expected[key] = tensor
            writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = sfumato.load(base, transformer=tmp_path / "net.gguf").denoiser.network
    assert equal_tensors(dict(result.state_dict()), converted("flux", expected, monkeypatch))
    with pytest.raises(UserError, match=r"net\.gguf holds a network alone"):
        sfumato.load(tmp_path / "net.gguf")
    eights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            eights |= {
                key: (16 * tensor).to(torch.float8_e4m3fn),
                f"{key.removesuffix('weight')}scale_weight": torch.tensor(1 / 16),
            }
        else:
            eights[key] = tensor
    save_file(eights, tmp_path / "fp8.safetensors")
    scaled = {
        k: v.float() / 16 if v.dtype == torch.float8_e4m3fn else v
        for k, v in eights.items()
        if not k.endswith("scale_weight")
    }
    result = sfumato.load(base, transformer=tmp_path / "fp8.safetensors").denoiser.network
    assert equal_tensors(dict(result.state_dict()), converted("flux", scaled, monkeypatch))
    for name in ("net.gguf", "fp8.safetensors"):
        with pytest.raises(UserError, match="cannot be streamed"):
            sfumato.load(base, transformer=tmp_path / name, memory="64GB")


def test_a_file_is_opened_once(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    """A whole file, a folder's parts, and a network beside a folder: safetensors, pickled, GGUF."""
    place = saved("flux")
    with opens() as counts:
        sfumato.load(place / "a.safetensors")
    assert counts == {f"{place.name}/a.safetensors": 1}
    with opens() as counts:
        sfumato.load(place / "a.safetensors", memory="64GB")
    assert counts == {f"{place.name}/a.safetensors": 1}
    with opens() as counts:
        sfumato.load(place / "folder")
    assert set(counts.values()) == {1} and len(counts) == 4
    tensors = lone(models["flux"], "flux", tmp_path / "net.safetensors")
    torch.save(tensors, tmp_path / "net.pt")
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "flux")
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    for name in ("net.safetensors", "net.pt", "net.gguf"):
        with opens() as counts:
            sfumato.load(base, transformer=tmp_path / name)
        assert (
            set(counts.values()) == {1} and f"{tmp_path.name}/{name}" in counts and len(counts) == 4
        )


def test_networks_that_do_not_belong(
    models: dict[str, LatentDiffusion], base: Path, tmp_path: Path
) -> None:
    lone(models["sd3"], "sd3", tmp_path / "sd3.safetensors")
    lone(models["schnell"], "flux", tmp_path / "schnell.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "odd.safetensors")
    for name, message in (
        (
            "sd3",
            "holds a SD3Transformer2DModel, and the given config is of a FluxTransformer2DModel",
        ),
        ("schnell", "guidance_in"),
        ("odd", "holds no diffusion transformer"),
        ("none", "was not found"),
    ):
        with pytest.raises(
            UserError, match=rf"{name}\.safetensors.*{message}|{message}.*{name}\.safetensors"
        ):
            sfumato.load(base, transformer=tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="expected a model's folder"):
        sfumato.load(tmp_path / "sd3.safetensors", transformer=tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match="holds no U-Net"):
        sfumato.load("fashion", transformer=tmp_path / "sd3.safetensors")
    (base / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        sfumato.load(base, transformer=tmp_path / "schnell.safetensors")


def test_streamed(
    models: dict[str, LatentDiffusion], saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    """The same pictures with weights that stay in the files."""
    model = models["flux"]
    lone(model, "flux", tmp_path / "net.safetensors")
    expected = picture(model)
    assert same(
        picture(sfumato.load(base, transformer=tmp_path / "net.safetensors", memory="64GB")),
        expected,
    )
    assert same(picture(sfumato.load(saved("flux") / "a.safetensors", memory="64GB")), expected)


def test_command_line(
    models: dict[str, LatentDiffusion],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A picture remembers the file, and is made again with it."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    lone(models["flux"], "flux", tmp_path / "net.safetensors")
    small = ["--n", "1", "--steps", "1", "--height", "16", "--width", "16"]
    assert (
        main(
            [
                "generate",
                "a cat",
                "--model",
                str(base),
                "--transformer",
                "net.safetensors",
                *small,
                "--out",
                "a.png",
            ]
        )
        == 0
    )
    assert main(["generate", "--from", "a.png", "--out", "b.png"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    task = [
        "vary",
        "a.png",
        "a cat",
        "--model",
        str(base),
        "--transformer",
        "net.safetensors",
        "--steps",
        "4",
        "--out",
        "c.png",
    ]
    assert main(task) == 0, capsys.readouterr().err
    assert main(["generate", "a cat", "--model", str(base), *small]) == 2
    assert "has no weights" in capsys.readouterr().err


# ---- DiT and SiT ---------------------------------------------------------------------------------


def sit_file(**fields: Any) -> tuple[SiTTransformer, dict[str, Tensor], dict[str, str]]:
    config = SiTConfig(**DIT | fields)
    net = random_network(lambda: SiTTransformer(config), 4)
    first = net.transformer_blocks[0].norm1.emb.state_dict()
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    table, notes = write_transformer(
        families.by_name("sit"), net.to_config(), from_tensors(net.state_dict())
    )
    return net, {k: v.load().contiguous() for k, v in table.items()}, notes


def published(file: dict[str, Tensor], heads: int, x: Tensor, s: Tensor, label: Tensor) -> Tensor:
    """SiT of the paper from the tensors of its file, at its own time s, which is 1 for pictures:
    dx/ds. Patches of 2.
    """
    from torch.nn.functional import (
        conv2d,
        gelu,
        layer_norm,
        linear,
        scaled_dot_product_attention,
        silu,
    )

    def layer(name: str, value: Tensor) -> Tensor:
        return linear(value, file[f"{name}.weight"], file[f"{name}.bias"])

    angles = s[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = layer(
        "t_embedder.mlp.2",
        silu(layer("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))),
    )
    c = silu(c + file["y_embedder.embedding_table.weight"][label])
    y = (
        conv2d(x, file["x_embedder.proj.weight"], file["x_embedder.proj.bias"], stride=2)
        .flatten(2)
        .mT
        + file["pos_embed"]
    )
    width = y.shape[-1]
    for k in range(DIT["num_layers"]):
        shift, scale, gate, shift_2, scale_2, gate_2 = layer(f"blocks.{k}.adaLN_modulation.1", c)[
            :, None
        ].chunk(6, -1)
        z = layer(f"blocks.{k}.attn.qkv", layer_norm(y, (width,), eps=1e-6) * (1 + scale) + shift)
        q, key, v = z.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        y = y + gate * layer(
            f"blocks.{k}.attn.proj",
            scaled_dot_product_attention(q, key, v).transpose(1, 2).flatten(2),
        )
        z = layer(
            f"blocks.{k}.mlp.fc1", layer_norm(y, (width,), eps=1e-6) * (1 + scale_2) + shift_2
        )
        y = y + gate_2 * layer(f"blocks.{k}.mlp.fc2", gelu(z, approximate="tanh"))
    shift, scale = layer("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    y = layer("final_layer.linear", layer_norm(y, (width,), eps=1e-6) * (1 + scale) + shift)
    side = x.shape[-1] // 2
    return (
        y.unflatten(1, (side, side))
        .unflatten(-1, (2, 2, -1))
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(len(x), -1, 2 * side, 2 * side)[:, :4]
    )


def test_sit_is_the_papers_network_as_a_flow() -> None:
    """The velocity eps - z at time t is minus the paper's at 1 - t.

    `Process` turns it into the image and the noise.
    """
    net, file, _ = sit_file()
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 3, 5])
    t = torch.tensor([0.1, 0.5, 0.96])
    with torch.no_grad():
        y = net(x, 1000 * t, Conditioning(vector=torch.eye(6)[label]))[:, :4]
        velocity = published(file, 2, x, 1 - t, label)
        assert float((y + velocity).norm() / velocity.norm()) < 1e-5
        denoiser = Denoiser(net, Process(schedule("flow"), parameterization("flow")))
        prediction = denoiser(x, 0.5, Conditioning(vector=torch.eye(6)[label]))
        half = published(file, 2, x, torch.full((3,), 0.5), label)
    # z = x + (1 - s) v and eps = x - s v
    torch.testing.assert_close(prediction.x0, x + 0.5 * half, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prediction.eps, x - 0.5 * half, atol=1e-4, rtol=1e-4)


def test_the_class_name_distinguishes_sit_from_dit() -> None:
    net, file, notes = sit_file()
    assert json.loads(notes[NOTE])["_class_name"] == "SfumatoSiT"
    result = (
        families.by_name("sit").read(RawCheckpoint(from_tensors(file))).components["transformer"]
    )
    values = result.config
    assert SiTConfig.from_dict(values) == net.config
    assert equal_tensors({k: v.load() for k, v in result.tensors.items()}, dict(net.state_dict()))
    with pytest.raises(UserError, match="holds a SfumatoSiT, and the given config is of a DiT"):
        other = {"transformer": {**values, "_class_name": "DiTTransformer2DModel"}}
        families.by_name("dit").read(RawCheckpoint(from_tensors(file), notes), None, other)


def test_convert_dit_and_sit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pickles as published, or with a training state; to a folder, to a file and back."""
    monkeypatch.chdir(tmp_path)
    net, file, _ = sit_file()
    torch.save(file, "net.pt")
    torch.save(
        {
            "ema": file,
            "model": {k: 2 * v for k, v in file.items()},
            "opt": {},
            "args": argparse.Namespace(model="SiT-XL/2"),
        },
        "run.pt",
    )
    for source in ("net.pt", "run.pt"):
        folder = source.removesuffix(".pt")
        assert main(["convert", source, folder, "--network", "sit"]) == 0, capsys.readouterr().err
        config = json.loads((tmp_path / folder / "transformer" / "config.json").read_text())
        assert SiTConfig.from_dict(config) == net.config and config["_class_name"] == "SfumatoSiT"
        assert equal_tensors(
            load_file(tmp_path / folder / "transformer" / "diffusion_pytorch_model.safetensors"),
            dict(net.state_dict()),
        )
    assert main(["convert", "net", "again.safetensors"]) == 0 and equal_tensors(
        load_file("again.safetensors"), file
    )
    assert main(["convert", "again.safetensors", "third"]) == 0  # the file says that it is SiT's
    assert json.loads(Path("third/transformer/config.json").read_text()) == config
    assert main(["convert", "net.pt", "dit"]) == 0
    assert (
        json.loads(Path("dit/transformer/config.json").read_text())["_class_name"]
        == "DiTTransformer2DModel"
    )
    capsys.readouterr()
    assert (
        main(["convert", "again.safetensors", "x", "--network", "dit"]) == 2
        and "holds SfumatoSiT" in capsys.readouterr().err
    )
    assert (
        main(["convert", "net", "x", "--network", "sit"]) == 2
        and "for single files" in capsys.readouterr().err
    )


def test_a_sit_draws_with_a_folder(tmp_path: Path) -> None:
    """Its process is a flow: another scheduler in the folder is refused."""
    net, file, _ = sit_file()
    torch.save(file, tmp_path / "net.pt")
    process = Process(schedule("flow"), parameterization("flow"))
    labels = ClassLabels(("cat", "dog", "fox", "owl", "carp"))
    model = LatentDiffusion(
        autoencoder(0.18215, None, 4),
        Denoiser(net, process),
        labels,
        Defaults(steps=2, sampler="ddim"),
        "sit",
    )
    model.save(tmp_path / "folder")
    again = sfumato.load(tmp_path / "folder", transformer=tmp_path / "net.pt")
    assert again.hash == model.hash == sfumato.load(tmp_path / "folder").hash
    assert again.generate("fox", seed=1)[0].tobytes() == model.generate("fox", seed=1)[0].tobytes()
    place = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "linear"}))
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    index["scheduler"][1] = "DDIMScheduler"  # this class decides
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError,
        match=r"scheduler_config\.json is of a process with target 'eps', and a SiTTransformer "
        r"predicts 'flow'",
    ):
        sfumato.load(tmp_path / "folder")
