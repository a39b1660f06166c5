"""Single files in the original layouts against diffusers.

Files that a family writes are read by diffusers' converters as the same tensors under the same
keys, and by sfumato. The models are small, random and of every family.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import helpers.single_files as single
from helpers.clip_encoders import wide_encoder
from helpers.tensors import equal_tensors
from sfumato.checkpoints.checkpoint import Checkpoint, Component, ReadOptions
from sfumato.checkpoints.families._unet_config import STANDARD
from sfumato.checkpoints.families._unet_map import unet_map
from sfumato.checkpoints.families._vae import vae_map
from sfumato.checkpoints.schedulers import betas
from sfumato.checkpoints.weight_map import WeightMap

LEVELS = {
    "D": ("DownBlock2D", "UpBlock2D"),
    "C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}


def unet(levels: str, widths: tuple[int, ...], **fields: Any) -> diffusers.UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "block_out_channels": widths,
    } | fields
    return diffusers.UNet2DConditionModel(
        down_block_types=[LEVELS[k][0] for k in levels],
        up_block_types=[LEVELS[k][1] for k in reversed(levels)],
        **config,
    )


def vae(**fields: Any) -> diffusers.AutoencoderKL:
    n = len(fields.setdefault("block_out_channels", [32, 64]))
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }
    return diffusers.AutoencoderKL(
        **{"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32} | kinds | fields
    )


def clip(kind: type[nn.Module] = CLIPTextModel, **fields: Any) -> nn.Module:
    return wide_encoder(kind, **fields)


def part(network: nn.Module) -> Component:
    if isinstance(network, CLIPTextModel | CLIPTextModelWithProjection):
        names = {
            k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v
            for k, v in network.state_dict().items()
        }
        return single.part(
            network.config.to_dict() | {"architectures": [type(network).__name__]}, names
        )
    return single.part(dict(network.config), network.state_dict())


def sd1(**fields: Any) -> dict[str, nn.Module]:
    return {"unet": unet("CCD", (32, 64, 64), **fields), "vae": vae(), "text_encoder": clip()}


def sd2(**fields: Any) -> dict[str, nn.Module]:
    heads = {"attention_head_dim": [1, 2, 2], "use_linear_projection": True}
    return {
        "unet": unet("CCD", (64, 128, 128), **heads | fields),
        "vae": vae(),
        "text_encoder": clip(hidden_act="gelu", num_hidden_layers=23),
    }


def upscaler() -> dict[str, nn.Module]:
    only = {
        "only_cross_attention": [True, True, False],
        "num_class_embeds": 5,
        "in_channels": 7,
        "cross_attention_dim": 64,
    }
    network = unet("DCC", (32, 32, 96), use_linear_projection=True, **only)
    return {
        "unet": network,
        "vae": vae(scaling_factor=0.08333),
        "text_encoder": clip(hidden_act="gelu", num_hidden_layers=23),
    }


def sdxl(**fields: Any) -> dict[str, nn.Module]:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    }
    more = {
        "attention_head_dim": [1, 2, 2],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 3],
    }
    second = clip(CLIPTextModelWithProjection, hidden_act="gelu", num_hidden_layers=12)
    network = unet("DCC", (64, 128, 128), layers_per_block=2, **added | more | fields)
    return {
        "unet": network,
        "vae": vae(scaling_factor=0.13025),
        "text_encoder": clip(),
        "text_encoder_2": second,
    }


def refiner() -> dict[str, nn.Module]:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 5 * 8,
    }
    network = unet(
        "DCD",
        (64, 128, 128),
        attention_head_dim=[1, 2, 2],
        use_linear_projection=True,
        transformer_layers_per_block=2,
        **added,
    )
    second = clip(CLIPTextModelWithProjection, hidden_act="gelu", num_hidden_layers=12)
    return {"unet": network, "vae": vae(scaling_factor=0.13025), "text_encoder_2": second}


FAMILIES: dict[str, tuple[Callable[[], dict[str, nn.Module]], str]] = {
    "sd1": (sd1, "epsilon"),
    "sd1-inpainting": (lambda: sd1(in_channels=9), "epsilon"),
    "sd1-pix2pix": (lambda: sd1(in_channels=8), "epsilon"),
    "sd2": (sd2, "v_prediction"),
    "sd2-inpainting": (lambda: sd2(in_channels=9), "epsilon"),
    "x4-upscaler": (upscaler, "v_prediction"),
    "sdxl": (sdxl, "epsilon"),
    "sdxl-inpainting": (lambda: sdxl(in_channels=9), "epsilon"),
    "sdxl-refiner": (refiner, "epsilon"),
}


def build(name: str, prediction: str | None = None) -> tuple[dict[str, nn.Module], Checkpoint]:
    torch.manual_seed(0)
    make, usual = FAMILIES[name]
    networks = make()
    ends = {"beta_start": 0.0001, "beta_end": 0.02} if name == "x4-upscaler" else {}
    scheduler = SCHEDULER | ends | {"prediction_type": prediction or usual}
    return networks, single.gather(
        {k: part(v) for k, v in networks.items()}, {"scheduler": scheduler}
    )


def converted(
    name: str, networks: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The parts, as diffusers' own converters make them of a file."""
    result = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(
            dict(tensors), dict(networks["unet"].config)
        ),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(
            dict(tensors), dict(networks["vae"].config)
        ),
    }
    if name.startswith(("sd1", "sdxl")) and "text_encoder" in networks:
        result["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    elif "text_encoder" in networks:
        result["text_encoder"] = single_file_utils.convert_open_clip_checkpoint(
            networks["text_encoder"], dict(tensors)
        )
    if "text_encoder_2" in networks:
        prefix = f"conditioner.embedders.{int('text_encoder' in networks)}.model."
        result["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            networks["text_encoder_2"], dict(tensors), prefix
        )
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_converts_the_files_of_join(name: str) -> None:
    networks, parts = build(name)
    assert parts.kind == name
    result = converted(name, networks, single.join(parts))
    assert result.keys() == parts.components.keys()
    for key, expected in parts.components.items():
        assert equal_tensors(result[key], single.weights(expected)), key


@pytest.mark.parametrize("name", FAMILIES)
def test_split_is_the_inverse_of_join(name: str, tmp_path: Path) -> None:
    _, parts = build(name)
    single.save(tmp_path / "one.safetensors", parts)
    again = single.split(tmp_path / "one.safetensors")
    assert again.kind == name
    for key, expected in parts.components.items():
        assert equal_tensors(single.weights(again.components[key]), single.weights(expected)), key
    config, result = parts.components["unet"].config, again.components["unet"].config
    levels = len(config["block_out_channels"])
    for field in config.keys() - {
        "sample_size",
        "upcast_attention",
        "dropout",
        "transformer_layers_per_block",
        "only_cross_attention",
    }:
        if not field.startswith("_"):
            a, b = (
                list(v) if isinstance(v, list | tuple) else [v] * levels
                for v in (config[field], result[field])
            )
            assert a == b, field
    assert again.schedulers["scheduler"]["prediction_type"] == FAMILIES[name][1]
    assert torch.allclose(
        betas.table(again.schedulers["scheduler"]),
        betas.table(parts.schedulers["scheduler"]),
        rtol=1e-5,
    )
    single.save(tmp_path / "two.safetensors", again)  # what was split joins to the very same file
    assert equal_tensors(
        load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    )


@pytest.mark.parametrize("name", ["sd1", "sd2", "x4-upscaler", "sdxl", "sdxl-refiner"])
def test_inferred_configs_build_the_same_networks(name: str) -> None:
    """diffusers' networks of the configs that were inferred from keys give the same outputs."""
    networks, parts = build(name)
    again = single.split_tensors(single.join(parts), single.notes(parts), "file")
    network = diffusers.UNet2DConditionModel.from_config(again.components["unet"].config)
    network.load_state_dict(single.weights(again.components["unet"]))
    autoencoder = diffusers.AutoencoderKL.from_config(again.components["vae"].config)
    autoencoder.load_state_dict(single.weights(again.components["vae"]))
    channels, context = (
        networks["unet"].config.in_channels,
        networks["unet"].config.cross_attention_dim,
    )
    width = networks["unet"].config.projection_class_embeddings_input_dim
    sizes = {"sdxl": 6, "sdxl-refiner": 5}.get(name)
    added = (
        {"text_embeds": torch.randn(2, width - 8 * sizes), "time_ids": torch.rand(2, sizes)}
        if sizes
        else None
    )
    labels = torch.tensor([1, 3]) if name == "x4-upscaler" else None
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, context),
        "added_cond_kwargs": added,
        "class_labels": labels,
    }
    x = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x, 7, **inputs).sample, networks["unet"](x, 7, **inputs).sample)
        image = torch.randn(1, 3, 16, 16)
        assert torch.equal(autoencoder(image).sample, networks["vae"](image).sample)
    for key in ("text_encoder", "text_encoder_2"):
        if key in networks:
            config = again.components[key].config
            kind = (
                CLIPTextModelWithProjection
                if "With" in config["architectures"][0]
                else CLIPTextModel
            )
            assert isinstance(networks[key], kind)
            text = kind(
                CLIPTextConfig(
                    **{k: v for k, v in config.items() if k not in ("architectures", "model_type")}
                )
            ).eval()
            state = single.weights(again.components[key])
            text.load_state_dict(
                {
                    k.removeprefix("text_model.") if kind is CLIPTextModel else k: v
                    for k, v in state.items()
                }
            )
            ids = torch.tensor([[0, 4, 5, 49, 1]])
            with torch.no_grad():
                assert torch.equal(text(ids)[0], networks[key].eval()(ids)[0])


def test_diffusers_opens_the_file_itself(tmp_path: Path) -> None:
    networks, parts = build("sd1")
    single.save(tmp_path / "one.safetensors", parts)
    for name in ("unet", "vae"):
        networks[name].save_pretrained(tmp_path / name)
    network = diffusers.UNet2DConditionModel.from_single_file(
        tmp_path / "one.safetensors", config=str(tmp_path), subfolder="unet"
    )
    autoencoder = diffusers.AutoencoderKL.from_single_file(
        tmp_path / "one.safetensors", config=str(tmp_path), subfolder="vae"
    )
    assert equal_tensors(network.state_dict(), networks["unet"].state_dict()) and equal_tensors(
        autoencoder.state_dict(), networks["vae"].state_dict()
    )


# The published models' structures, on the meta device: (rows of the table, a config of diffusers).
FOUR, XL = (
    ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
)
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "sd1": (686, {"cross_attention_dim": 768, "down_block_types": FOUR}),
    "sd2": (
        686,
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "down_block_types": FOUR,
        },
    ),
    "sdxl": (
        1680,
        ADDED
        | {
            "cross_attention_dim": 2048,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": XL,
            "attention_head_dim": [5, 10, 20],
        }
        | {
            "transformer_layers_per_block": [1, 2, 10],
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "refiner": (
        1220,
        ADDED
        | {
            "cross_attention_dim": 1280,
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": [*XL, "DownBlock2D"],
        }
        | {
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        },
    ),
    "x4": (
        687,
        {
            "cross_attention_dim": 1024,
            "block_out_channels": [256, 512, 512, 1024],
            "down_block_types": [FOUR[-1], *FOUR[:3]],
            "in_channels": 7,
        }
        | {
            "only_cross_attention": [True, True, True, False],
            "num_class_embeds": 1000,
            "use_linear_projection": True,
        },
    ),
}


def held(rows: list[WeightMap]) -> dict[str, tuple[int, ...]]:
    return {name: r.shape for r in rows for name in r.targets}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures_are_covered_key_by_key(name: str) -> None:
    count, fields = PUBLISHED[name]
    up = [k.replace("Down", "Up") for k in reversed(fields["down_block_types"])]
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(up_block_types=up, **fields)
    rows = unet_map(network.config)
    assert len(rows) == len({r.source for r in rows}) == count
    assert held(rows) == {k: tuple(v.shape) for k, v in network.state_dict().items()}
    file = {f"model.diffusion_model.{r.source}": torch.empty(r.stored, device="meta") for r in rows}
    there = single_file_utils.convert_ldm_unet_checkpoint(file, dict(network.config))
    assert {k: tuple(v.shape) for k, v in there.items()} == held(rows)


def test_published_autoencoder_and_text_encoders() -> None:
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    towers = {"L": (768, 3072, 12, 196), "H": (1024, 4096, 23, None), "G": (1280, 5120, 32, 517)}
    with torch.device("meta"):
        autoencoder = diffusers.AutoencoderKL(
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, **kinds
        )
        rows = vae_map(autoencoder.config)
        assert len(rows) == 248
        assert held(rows) == {k: tuple(v.shape) for k, v in autoencoder.state_dict().items()}
        for width, inner, layers, count in towers.values():
            kind = CLIPTextModelWithProjection if width == 1280 else CLIPTextModel
            sizes = {
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": width // 64,
            }
            component = part(kind(CLIPTextConfig(**sizes, projection_dim=width)))
            shapes = {k: v.shape for k, v in component.tensors.items()}
            assert (
                held(single.clip_map(component.config))
                == held(single.open_clip_map(component.config))
                == shapes
            )
            assert count is None or len(shapes) == count


def test_sd2_whole_tower_leaves_its_last_layer_out() -> None:
    _, parts = build("sd2")
    tensors = single.join(parts)
    prefix = "cond_stage_model.model."
    block = {k: v for k, v in tensors.items() if f"{prefix}transformer.resblocks.22." in k}
    whole = tensors | {k.replace("resblocks.22", "resblocks.23"): v + 1 for k, v in block.items()}
    whole |= {f"{prefix}text_projection": torch.eye(64), f"{prefix}logit_scale": torch.tensor(4.6)}
    again = single.split_tensors(whole, {}, "file")
    assert equal_tensors(
        single.weights(again.components["text_encoder"]),
        single.weights(parts.components["text_encoder"]),
    )


def test_json_configs(tmp_path: Path) -> None:
    """Every config is plain JSON, and diffusers reads it without an unknown field."""
    _, parts = build("sdxl")
    again = single.split_tensors(single.join(parts), single.notes(parts), "file")
    for each in (*(p.config for p in again.components.values()), *again.schedulers.values()):
        assert json.loads(json.dumps(each)) == each
    assert STANDARD.keys() <= again.components["unet"].config.keys()
    for kind, config in (
        (diffusers.UNet2DConditionModel, again.components["unet"].config),
        (diffusers.DDIMScheduler, again.schedulers["scheduler"]),
    ):
        _, unused, _ = kind.extract_init_dict(config)
        assert not unused


def test_running_averages_are_read_on_request_only() -> None:
    _, parts = build("sd1")
    tensors = single.join(parts)
    keys = [k for k in tensors if k.startswith("model.diffusion_model.")]
    averaged = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): tensors[k] + 1 for k in keys
    }
    file = (
        tensors
        | averaged
        | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    )
    config = parts.components["unet"].config
    for ema in (False, True):
        result = single.split_tensors(file, {}, "file", ReadOptions(ema=ema)).components["unet"]
        result = single.weights(result)
        assert equal_tensors(
            result,
            single_file_utils.convert_ldm_unet_checkpoint(dict(file), config, extract_ema=ema),
        )
        assert torch.equal(
            result["conv_in.bias"],
            single.weights(parts.components["unet"])["conv_in.bias"] + int(ema),
        )


def test_both_ways_of_naming_clip_and_the_autoencoder(tmp_path: Path) -> None:
    _, parts = build("sd1")
    other = {
        k.replace(".text_model.", ".").replace("first_stage_model.", "vae."): v
        for k, v in single.join(parts).items()
    }
    save_file(other, tmp_path / "other.safetensors")
    again = single.split(tmp_path / "other.safetensors")
    assert all(
        equal_tensors(single.weights(again.components[k]), single.weights(p))
        for k, p in parts.components.items()
    )
