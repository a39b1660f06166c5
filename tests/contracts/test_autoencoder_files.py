"""Autoencoders on disk: refusals, TAESD's pairs of files in every form, damage of any kind.

Every refusal is one sentence that names the file.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.errors import assert_one_sentence
from sfumato.checkpoints.families.taesd import (
    config_of,
    from_original,
    load_taesd,
    save_taesd,
    to_original,
)
from sfumato.checkpoints.formats.folder import WEIGHTS, load_part, modern, save_part
from sfumato.compress.base import registered as autoencoders
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.compress.kl_flux2 import AutoencoderKLFlux2, KLFlux2Config
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.compress.vq import VQConfig, VQModel
from sfumato.errors import UserError

SMALL: dict[str, Any] = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
EIGHT: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
}
MODELS: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": lambda: AutoencoderKL(KLConfig(**SMALL)),
    "AutoencoderKLFlux2": lambda: AutoencoderKLFlux2(KLFlux2Config(**SMALL, latent_channels=2)),
    "AutoencoderTiny": lambda: AutoencoderTiny(TinyConfig(**EIGHT)),
    "SfumatoAutoencoderTiny": lambda: AutoencoderTiny(TinyConfig(**EIGHT, use_midblock_gn=True)),
    "VQModel": lambda: VQModel(VQConfig(**SMALL, num_vq_embeddings=9)),
}


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "AutoencoderKL",
        {"up_block_types": ["AttnUpDecoderBlock2D"]},
        "expected 2 names, each UpDecoderBlock2D or AttnUpDecoderBlock2D",
    ),
    (
        "AutoencoderKL",
        {"down_block_types": ["DownEncoderBlock2D", "KDownBlock2D"]},
        "expected 2 names, each DownEncoderBlock2D",
    ),
    ("AutoencoderKL", {"scaling_factor": 0}, "scaling_factor=0: expected a number above 0"),
    ("AutoencoderKLFlux2", {"patch_size": [2, 1]}, "two equal numbers"),
    ("AutoencoderKLFlux2", {"patch_size": [0, 0]}, "two equal numbers"),
    ("AutoencoderKLFlux2", {"patch_size": 2}, "value of the wrong kind"),
    ("AutoencoderKLFlux2", {"decoder_block_out_channels": [4, 4, 8]}, "needs as many levels"),
    (
        "AutoencoderKLFlux2",
        {"decoder_block_out_channels": [4, 7]},
        "7 is not a multiple of norm_num_groups 2",
    ),
    (
        "AutoencoderKLFlux2",
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 2},
        "is not supported",
    ),
    ("AutoencoderKLFlux2", {"scaling_factor": 0.3}, "scaling_factor=0.3 is not known"),
    ("AutoencoderKLFlux2", {"batch_norm_eps": -3.0}, "bn.running_var has 1"),
    ("AutoencoderTiny", {"act_fn": "silu"}, "expected 'relu'"),
    ("AutoencoderTiny", {"upsample_fn": "bilinear"}, "expected 'nearest'"),
    ("AutoencoderTiny", {"upsampling_scaling_factor": 4}, "expected 2"),
    (
        "AutoencoderTiny",
        {"block_out_channels": [8, 8, 8, 4]},
        "block_out_channels=[8, 8, 8, 4] is not supported",
    ),
    ("AutoencoderTiny", {"encoder_block_out_channels": [8, 8, 8, 16]}, "one width at all levels"),
    ("AutoencoderTiny", {"num_decoder_blocks": [3, 3, 1]}, "as many numbers in each"),
    ("AutoencoderTiny", {"use_midblock_gn": True}, "does not fit its config"),
    ("AutoencoderTiny", {"scaling_factor": 0.0}, "value of the wrong kind"),
    ("AutoencoderTiny", {"scaling_factor": -2.0}, "positive stds"),
    ("VQModel", {"norm_type": "spatial"}, "expected 'group'"),
    ("VQModel", {"act_fn": "gelu"}, "expected 'silu'"),
    (
        "VQModel",
        {"num_vq_embeddings": 0},
        "num_vq_embeddings=0: expected a whole number of at least 1",
    ),
    ("VQModel", {"num_vq_embeddings": 10}, "does not fit its config"),
    ("VQModel", {"vq_embed_dim": 5}, "does not fit its config"),
    ("VQModel", {"commitment": 0.25}, "commitment=0.25 is not known to VQConfig"),
]


@pytest.mark.parametrize(
    ("name", "values", "words"), REFUSED, ids=[f"{n}-{v}" for n, v, _ in REFUSED]
)
def test_unsupported_fields_are_refused(
    tmp_path: Path, name: str, values: dict[str, Any], words: str
) -> None:
    save_part(tmp_path, MODELS[name]())
    assert type(load_part(tmp_path)) is autoencoders()[name][0]
    change_config(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        load_part(tmp_path)
    assert_one_sentence(caught.value, tmp_path, words)


@pytest.mark.parametrize("name", MODELS)
def test_folders_of_sfumato(name: str, tmp_path: Path) -> None:
    """Class, settings, weights and latent space are read as they were written."""
    model = MODELS[name]()
    save_part(tmp_path, model)
    again: Any = load_part(tmp_path, name)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == name
    assert again.config == model.config and again.space == model.space and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_damaged_weights(name: str, tmp_path: Path) -> None:
    """Keys missing, added, misshapen, NaN; files cut anywhere: one sentence that names the file,
    never another error.
    """
    save_part(tmp_path, MODELS[name]())
    file = tmp_path / WEIGHTS
    whole, tensors = file.read_bytes(), load_file(file)
    keys = sorted(k for k, v in tensors.items() if v.is_floating_point())
    dice = random.Random(0)
    for _ in range(6):
        key = dice.choice(keys)
        for damaged in (
            {k: v for k, v in tensors.items() if k != key},
            tensors | {f"{key}.more": tensors[key].clone()},
            tensors | {key: tensors[key][:0]},
            tensors | {key: torch.full_like(tensors[key], float("nan"))},
        ):
            save_file(damaged, file)
            with pytest.raises(UserError) as caught:
                load_part(tmp_path)
            assert_one_sentence(caught.value, file, key)
        file.write_bytes(whole[: dice.randrange(len(whole))])
        with pytest.raises(UserError) as caught:
            load_part(tmp_path)
        assert_one_sentence(caught.value, file)


def test_statistics_of_a_damaged_batch_norm(tmp_path: Path) -> None:
    model = MODELS["AutoencoderKLFlux2"]()
    model.bn.running_var[3] = -1.0
    save_part(tmp_path, model)
    with pytest.raises(UserError) as caught:
        load_part(tmp_path)
    assert_one_sentence(caught.value, tmp_path / WEIGHTS, "running_var has -1")


def test_old_names() -> None:
    key = "decoder.mid_block.attentions.0."
    old = {
        f"{key}{k}.weight": torch.full((1,), float(n))
        for n, k in enumerate(("query", "key", "value", "proj_attn", "group_norm"))
    }
    new = modern(old)
    assert [k.removeprefix(key) for k in new] == [
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
        "group_norm.weight",
    ]
    assert [float(v) for v in new.values()] == [0, 1, 2, 3, 4] and modern(new) == new
    untouched = {"encoder.key.weight": torch.zeros(1), "attentions.query": torch.zeros(1)}
    assert modern(untouched).keys() == untouched.keys()
    with pytest.raises(UserError, match="hold both"):
        modern(old | new)


# ---- TAESD ---------------------------------------------------------------------------------------

VARIANTS: dict[str, TinyConfig] = {
    "taesd": TinyConfig(**EIGHT),
    "taef1": TinyConfig(**EIGHT, latent_channels=16),
    "taef2": TinyConfig(**EIGHT, latent_channels=32, use_midblock_gn=True),
    "latents as wide as layers": TinyConfig(**EIGHT, latent_channels=8),
    "two levels, RGBA": TinyConfig(
        in_channels=4,
        out_channels=4,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(12, 12),
        latent_channels=4,
        num_encoder_blocks=(0, 2),
        num_decoder_blocks=(2, 1),
    ),
}


def same(a: AutoencoderTiny, b: AutoencoderTiny) -> None:
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
def test_taesd_in_every_form(name: str, tmp_path: Path) -> None:
    """The pair by name, the folder of the pair, pickles, one file with both halves, a folder with a
    config: one autoencoder.
    """
    autoencoder = AutoencoderTiny(VARIANTS[name])
    pair = save_taesd(tmp_path / name, autoencoder, torch.float32)
    assert [p.name for p in pair] == [f"{name}_encoder.safetensors", f"{name}_decoder.safetensors"]
    same(load_taesd(*pair), autoencoder)
    same(load_taesd(tmp_path), autoencoder)
    save_file(autoencoder.state_dict(), tmp_path / "both.safetensors")
    same(load_taesd(tmp_path / "both.safetensors"), autoencoder)
    (tmp_path / "pickles").mkdir()
    for half, file in zip(("encoder", "decoder"), pair, strict=True):
        torch.save(load_file(file), tmp_path / "pickles" / f"{name}_{half}.pth")
    same(load_taesd(tmp_path / "pickles"), autoencoder)
    save_part(tmp_path / "folder", autoencoder)
    same(load_taesd(tmp_path / "folder"), autoencoder)
    assert (
        load_taesd(*save_taesd(tmp_path / "half", autoencoder)).dtype == torch.float32
        and load_taesd(*pair, torch.float16).dtype == torch.float16
    )


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_taesd_keys_in_both_directions(half: str) -> None:
    """The published numbers: taesd's decoder has a layer without weights first, so that its
    convolutions are 1, 7, 12, 17, 19.
    """
    tensors = AutoencoderTiny(TinyConfig(**EIGHT)).state_dict()
    original = to_original(half, tensors)
    convs = {int(k.split(".")[0]) for k in original if k.count(".") == 1}
    assert convs == ({0, 2, 6, 10, 14} if half == "encoder" else {1, 7, 12, 17, 19})
    assert from_original(half, original).keys() == {k for k in tensors if k.startswith(half)}
    assert all(v is tensors[k] for k, v in from_original(half, original).items())


def sana(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder that begins as the variant of factor 32 does: two strided convolutions of other
    widths.
    """
    layers = {
        f"encoder.layers.{n}.{k}": v
        for n, k, v in (
            (0, "weight", torch.zeros(4, 3, 3, 3)),
            (2, "weight", torch.zeros(8, 4, 3, 3)),
        )
    }
    return layers | {
        k: v
        for k, v in tensors.items()
        if not k.startswith(("encoder.layers.0.", "encoder.layers.2."))
    }


def test_unrecognised_taesd(tmp_path: Path) -> None:
    tensors = AutoencoderTiny(TinyConfig(**EIGHT)).state_dict()
    with pytest.raises(
        UserError, match=r"widths \[4, 8\]: a variant of TAESD that is not supported"
    ):
        config_of(sana(tensors))
    encoder, decoder = save_taesd(tmp_path / "a", AutoencoderTiny(TinyConfig(**EIGHT)))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: load_taesd(decoder, encoder), "encoder"),  # swapped
        (lambda: load_taesd(encoder, encoder), "is not of a TAESD decoder"),
        (lambda: load_taesd(encoder), "the encoder is not one of TAESD"),
        (lambda: load_taesd(tmp_path, decoder), "is a folder and a decoder was given too"),
        (lambda: load_taesd(tmp_path / "absent.safetensors"), "is missing"),
        (lambda: load_taesd(tmp_path / "absent_encoder.pth", decoder), "is missing"),
    ]
    for case, words in cases:
        with pytest.raises(UserError) as caught:
            case()
        assert_one_sentence(caught.value, words)
    save_taesd(tmp_path / "b", AutoencoderTiny(TinyConfig(**EIGHT)))
    with pytest.raises(UserError, match="expected one pair"):
        load_taesd(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="none: expected one pair"):
        load_taesd(tmp_path / "c")
    save_part(tmp_path / "kl", MODELS["AutoencoderKL"]())
    with pytest.raises(UserError, match="holds a AutoencoderKL: expected an AutoencoderTiny"):
        load_taesd(tmp_path / "kl")


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    """Nothing of them runs."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    _, decoder = save_taesd(tmp_path / "a", AutoencoderTiny(TinyConfig(**EIGHT)))
    torch.save({"0.weight": Trap()}, tmp_path / "a_encoder.pth")
    torch.save([1, 2], tmp_path / "b_encoder.pth")
    (tmp_path / "c_encoder.pth").write_bytes(b"not a pickle")
    for name, words in (
        ("a", "wants to run code"),
        ("b", "holds a list"),
        ("c", "is not a pickle of tensors"),
    ):
        with pytest.raises(UserError) as caught:
            load_taesd(tmp_path / f"{name}_encoder.pth", decoder)
        assert_one_sentence(caught.value, words, f"{name}_encoder.pth")
    assert not (tmp_path / "sprung").exists()


def test_damaged_pairs(tmp_path: Path) -> None:
    """Any key gone, added, misshapen or renumbered, in either file, is a sentence."""
    autoencoder = AutoencoderTiny(TinyConfig(**EIGHT, use_midblock_gn=True))
    pair = save_taesd(tmp_path / "a", autoencoder)
    dice = random.Random(1)
    for which in (0, 1):
        tensors = load_file(pair[which])
        for _ in range(12):
            key = dice.choice(sorted(tensors))
            others = {k: v for k, v in tensors.items() if k != key}
            number, _, rest = key.partition(".")
            for damaged in (
                others,
                others | {key: tensors[key][..., :0]},
                others | {key: tensors[key][None]},
                others | {key: torch.full_like(tensors[key], float("inf"))},
                others | {f"{int(number) + 40}.{rest}": tensors[key]},
                others | {f"layers.{key}": tensors[key]},
                tensors | {f"{key}.more": tensors[key].clone()},
                {},
            ):
                save_file(damaged, tmp_path / "damaged.safetensors")
                files = (
                    (tmp_path / "damaged.safetensors", pair[1])
                    if which == 0
                    else (pair[0], tmp_path / "damaged.safetensors")
                )
                with pytest.raises(UserError) as caught:
                    load_taesd(*files)
                assert_one_sentence(caught.value, "damaged.safetensors")
    same(load_taesd(*pair), load_taesd(*pair))
