"""Whole models in one file, and models from a hub cache on this machine: both open to the same
model as the folder.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers.family_models as models
import sfumato
from helpers.file_opens import opens
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component
from sfumato.checkpoints.convert import Source, StoreOptions, to_file
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.formats.folded import fold, unfold
from sfumato.checkpoints.lazy_tensor import from_tensors, load_tensors
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.errors import UserError
from sfumato.io.atomic import write_json


def test_single_file_is_the_folder(tiny: Path, tmp_path: Path) -> None:
    model = sfumato.load(tiny)
    model.save(tmp_path / "one.safetensors")
    again = sfumato.load(tmp_path / "one.safetensors")
    assert (
        again.hash == model.hash
        and again.defaults == model.defaults
        and again.class_names == model.class_names
    )
    a, b = (
        m.generate(model.class_names[0], steps=2, output="latent", seed=3) for m in (model, again)
    )
    assert torch.equal(a, b)


def test_a_model_with_taesd_is_a_folder_in_one_file(tmp_path: Path) -> None:
    """TAESD has no place in the original layouts: sfumato's own holds it, and `convert` refuses."""
    name = "ldm-unconditional"
    parts = models.checkpoint(name, models.networks(name))
    save_file(load_tensors(families.write(parts).tensors), tmp_path / "kl.safetensors")
    torch.manual_seed(0)
    model = sfumato.load(tmp_path / "kl.safetensors")
    channels = model.autoencoder.space.channels
    tiny = AutoencoderTiny(TinyConfig(latent_channels=channels)).eval().requires_grad_(False)
    model = replace(model, autoencoder=tiny)
    model.save(tmp_path / "tiny.safetensors")
    again = sfumato.load(tmp_path / "tiny.safetensors")
    assert isinstance(again.autoencoder, AutoencoderTiny) and again.hash == model.hash
    z = torch.randn(1, channels, 4, 4)
    assert torch.equal(again.autoencoder.decode(z), tiny.decode(z))
    vae = Component(tiny.to_config(), from_tensors(tiny.state_dict()))
    source = Source(Checkpoint({"unet": parts.components["unet"], "vae": vae}))
    with pytest.raises(UserError, match=r"is an AutoencoderTiny, .* expected an AutoencoderKL"):
        to_file(source, tmp_path / "no.safetensors", StoreOptions(), lambda k, n: None)
    assert not (tmp_path / "no.safetensors").exists()


def test_a_changed_weight_is_another_model(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    sfumato.load(tiny).save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors["unet.conv_in.bias"] += 1e-3
    save_file(tensors, path, metadata=metadata)
    assert sfumato.load(path).hash != sfumato.load(tiny).hash


def test_truncated_and_foreign_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    sfumato.load(tiny).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        sfumato.load(path)
    save_file({"model.diffusion_model.x": torch.zeros(2)}, path)
    with pytest.raises(
        UserError, match=r"lacks model.diffusion_model.*, which decides its architecture"
    ):
        sfumato.load(path)


def test_a_path_in_the_file_cannot_leave_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    save_file(
        {"vae.x": torch.zeros(2)}, path, metadata={"sfumato": json.dumps({"../../evil.json": {}})}
    )
    with pytest.raises(UserError, match="outside"):
        sfumato.load(path)
    save_file({"../vae.x": torch.zeros(2)}, path, metadata={"sfumato": "{}"})
    with pytest.raises(UserError, match="plain name"):
        sfumato.load(path)
    for more in (
        {"others": {"../../evil.txt": "AAAA"}},
        {"weights": {"vae": "../../evil.safetensors"}},
    ):
        save_file(
            {"vae.x": torch.zeros(2)},
            path,
            metadata={"sfumato": "{}", "sfumato_files": json.dumps(more)},
        )
        with pytest.raises(UserError, match="outside"):
            sfumato.load(path)


def test_a_folder_is_folded_whole(tmp_path: Path) -> None:
    """Files of every kind and weights of any name, byte for byte; weights in several files are
    refused, not lost.
    """
    folder = tmp_path / "model"
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part).mkdir(parents=True)
        save_file({"a.b": torch.rand(3)}, folder / part / f"{name}.safetensors")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(bytes(range(256)))
    write_json(folder / "model_index.json", {"a": 1})
    fold(folder, tmp_path / "one.safetensors")
    unfold(open_file(tmp_path / "one.safetensors"), tmp_path / "again")
    files, others = (
        sorted(p.relative_to(at) for p in at.rglob("*") if p.is_file())
        for at in (folder, tmp_path / "again")
    )
    assert files == others and len(files) == 4
    for file in files:
        if file.suffix == ".safetensors":
            assert torch.equal(
                load_file(folder / file)["a.b"], load_file(tmp_path / "again" / file)["a.b"]
            )
        else:
            assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    save_file({"c": torch.rand(3)}, folder / "vae" / "more.safetensors")
    with pytest.raises(UserError, match=r"more.safetensors cannot be folded into one file"):
        fold(folder, tmp_path / "two.safetensors")
    assert not (tmp_path / "two.safetensors").exists()


def test_hub_id_from_the_local_cache(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(tiny, cached / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert sfumato.load("someone/tiny").hash == sfumato.load(tiny).hash
    with pytest.raises(UserError, match="someone/else"):
        sfumato.load("someone/else")


def test_a_file_is_opened_once(tiny: Path, tmp_path: Path) -> None:
    """A folder's parts, a folder in one file, and a model with a U-Net in the original layout:
    safetensors and pickled.
    """
    with opens() as counts:
        sfumato.load(tiny)
    assert counts == {
        "vae/diffusion_pytorch_model.safetensors": 1,
        "unet/diffusion_pytorch_model.safetensors": 1,
    }
    sfumato.load(tiny).save(tmp_path / "folded.safetensors")
    raw = families.write(
        models.checkpoint("ldm-unconditional", models.networks("ldm-unconditional"))
    )
    tensors = load_tensors(raw.tensors)
    save_file(tensors, tmp_path / "unet.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "unet.ckpt")
    for name in ("folded.safetensors", "unet.safetensors", "unet.ckpt"):
        with opens() as counts:
            sfumato.load(tmp_path / name)
        assert counts[f"{tmp_path.name}/{name}"] == 1, name
        assert set(counts.values()) == {1}, (
            "the parts of a folder in one file are unpacked, and opened once each"
        )
    for name in ("unet.safetensors", "unet.ckpt"):
        with opens() as counts:
            sfumato.load(tmp_path / name)
        assert counts == {f"{tmp_path.name}/{name}": 1}
    with opens() as counts:
        sfumato.load(tmp_path / "unet.safetensors", memory="64GB")
    assert counts == {f"{tmp_path.name}/unet.safetensors": 1}
