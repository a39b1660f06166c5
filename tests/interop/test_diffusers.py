"""Parity with diffusers: the same keys, the same outputs, the same folders, the same steps.

It is a reference here and nothing else.
"""

import inspect
import json
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.models import randomised, tiny_model
from helpers.tensors import assert_close, normal
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.checkpoints.schedulers.config import from_scheduler_config, to_scheduler_config
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise
from sfumato.diffuse.schedule import schedule, table
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR
from sfumato.diffuse.timesteps import timesteps
from sfumato.errors import UserError
from sfumato.loading import load
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import FIXED, UNet, UNetConfig
from sfumato.types import Conditioning

DIFFUSERS_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}
DIFFUSERS_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def norms(network: nn.Module) -> dict[str, Any]:
    """Epsilons and groups by name: 1e-6 for 1e-5 would not show in an output whose variance is
    1.
    """
    kinds = nn.GroupNorm | nn.LayerNorm
    return {
        k: (m.eps, getattr(m, "num_groups", None))
        for k, m in network.named_modules()
        if isinstance(m, kinds)
    }


# ---- autoencoders --------------------------------------------------------------------------------

SMALL = {"layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 3, "sample_size": 16}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "f2": {"block_out_channels": (4, 8)},
    "f4 grey": {
        "block_out_channels": (4, 6, 8),
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 2,
    },
    "f8": {"block_out_channels": (4, 4, 6, 8), "scaling_factor": 1.5, "shift_factor": 0.06},
    "f32": {"block_out_channels": (2, 2, 4, 4, 4, 8), "latent_channels": 5},
    "no quant convs": {
        "block_out_channels": (4, 8),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention": {
        "block_out_channels": (4, 4, 8),
        "mid_block_add_attention": False,
        "in_channels": 1,
        "out_channels": 1,
    },
    "statistics": {
        "block_out_channels": (4, 8),
        "latents_mean": (0.1, 0.2, 0.3),
        "latents_std": (1.0, 2.0, 0.5),
        "force_upcast": False,
    },
}


def same_autoencoder(actual: Any, peer: Any) -> None:
    """Equal keys, moments and pictures."""
    assert actual.state_dict().keys() == peer.state_dict().keys() and norms(actual) == norms(peer)
    image = normal(2, actual.channels, 64, 32)
    expected = peer.encode(image).latent_dist
    result = actual.posterior(image)
    assert_close(result.mean, expected.mean)
    assert_close(result.std, expected.std)
    assert_close(actual.reconstruct(result.mean), peer.decode(expected.mean).sample)
    for name in (
        "scaling_factor",
        "shift_factor",
        "force_upcast",
        "latent_channels",
        "block_out_channels",
    ):
        assert getattr(actual.config, name) == _tuples(peer.config[name])


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.inference_mode()
def test_autoencoders_in_both_directions_through_folders(name: str, tmp_path: Path) -> None:
    values = SMALL | AUTOENCODERS[name]
    actual = randomised(AutoencoderKL(KLConfig(**values)))
    save_part(tmp_path / "sfumato", actual)
    same_autoencoder(actual, diffusers.AutoencoderKL.from_pretrained(tmp_path / "sfumato"))
    count = len(values["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
    }
    peer = randomised(diffusers.AutoencoderKL(**values, **blocks), seed=1)
    peer.save_pretrained(tmp_path / "diffusers")
    loaded = load_part(tmp_path / "diffusers", "AutoencoderKL")
    same_autoencoder(loaded, peer)
    assert loaded.config == actual.config  # pyright: ignore[reportAttributeAccessIssue]


# ---- U-Nets --------------------------------------------------------------------------------------

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
SELF = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CROSS3 = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8, 16),
}
EVERY = {
    "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16, 8),
}
FOUR = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (4, 8, 8, 16),
}
DOWN4 = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP4 = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": 2,
    "use_linear_projection": True,
}
MIDDLE = {"mid_block_type": "UNetMidBlock2D"}
TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}
TINY |= {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 12}
UNETS: dict[str, dict[str, Any]] = {
    "plain, no middle": {**PLAIN, "mid_block_type": None},
    "plain, scale_shift": {
        **PLAIN,
        **MIDDLE,
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": 2,
    },
    "self-attention, classes": {**SELF, **MIDDLE, "num_class_embeds": 5},
    "self-attention, scale_shift, classes": {
        **SELF,
        **MIDDLE,
        "num_class_embeds": 3,
        "resnet_time_scale_shift": "scale_shift",
    },
    "cross-attention": {**CROSS},
    "cross-attention, no middle": {**CROSS, "mid_block_type": None},
    "linear projection, depth 2": {
        **CROSS,
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
    },
    "SDXL's shape": {
        **CROSS3,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),
    },
    "tuples": {
        **CROSS3,
        "layers_per_block": (1, 2, 1),
        "cross_attention_dim": (12, 12, 12),
        "attention_head_dim": (2, 4, 8),
    },
    "every kind of block": {
        **EVERY,
        "attention_head_dim": (2, 4, 8),
        "num_class_embeds": 4,
        "layers_per_block": 2,
    },
    "time embedding": {
        **CROSS,
        "time_embedding_dim": 24,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "padding 0, eps": {**SELF, **MIDDLE, "downsample_padding": 0, "norm_eps": 1e-3},
    "projected vector": {
        **SELF,
        **MIDDLE,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 6,
    },
    "class kinds: timestep": {**SELF, **MIDDLE, "class_embed_type": "timestep"},
    "class kinds: simple projection": {
        **CROSS,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 6,
    },
    "class kinds: identity": {**CROSS, "class_embed_type": "identity"},
    "SD 1": {**FOUR, "attention_head_dim": 4},
    "SD 2": {
        **FOUR,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
        "layers_per_block": 2,
    },
    "SDXL": {
        **CROSS3,
        **SIZES,
        "projection_class_embeddings_input_dim": 7 + 6 * 8,
        "transformer_layers_per_block": (1, 2, 3),
    },
    "SDXL refiner": {
        **FOUR,
        **SIZES,
        "projection_class_embeddings_input_dim": 7 + 5 * 8,
        "down_block_types": DOWN4,
        "up_block_types": UP4,
    },
    "x4 upscaler": {
        **FOUR,
        "only_cross_attention": (True, True, True, False),
        "num_class_embeds": 7,
        "in_channels": 7,
        "out_channels": 3,
    },
    "only cross-attention": {**CROSS, "only_cross_attention": True, "use_linear_projection": True},
    "only cross-attention, not in the middle": {
        **CROSS,
        "only_cross_attention": True,
        "mid_block_only_cross_attention": False,
    },
    "guidance scale": {**CROSS, "time_cond_proj_dim": 12},
    "guidance scale, odd width, classes": {**CROSS, "time_cond_proj_dim": 7, "num_class_embeds": 4},
    "guidance scale, SDXL": {
        **CROSS3,
        **SIZES,
        "projection_class_embeddings_input_dim": 7 + 6 * 8,
        "time_cond_proj_dim": 256,
    },
    "inpainting channels": {**CROSS, "in_channels": 7, "out_channels": 3},
}


def inputs(
    config: UNetConfig, size: tuple[int, int], mask: bool = False
) -> tuple[Tensor, Tensor, Conditioning, dict[str, Any]]:
    """Return x (2, 3, h, w), timesteps, and the conditioning for sfumato and for diffusers."""
    cross = any(
        "Cross" in str(k)
        for k in (*config.down_block_types, *config.up_block_types, config.mid_block_type)
    )
    tokens = normal(2, 5, 12, seed=1) if cross else None
    kept = (
        torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
        if mask and cross
        else None
    )
    labels = torch.tensor([1, 2])
    vector, class_labels, added = None, None, None
    if config.addition_embed_type:
        text, count = (
            normal(2, 7, seed=2),
            ((config.projection_class_embeddings_input_dim or 0) - 7) // 8,
        )
        sizes = torch.tensor([[1024.0, 1021, 3, 0, 768, 512], [333, 1024, 0, 77, 1536, 640]])[
            :, :count
        ]
        vector, added = torch.cat([text, sizes], 1), {"text_embeds": text, "time_ids": sizes}
    elif config.class_embed_type == "timestep":
        class_labels = torch.tensor([20.0, 350.0])
        vector = class_labels[:, None]
    elif config.class_embed_type is not None:
        vector = class_labels = normal(
            2,
            config.projection_class_embeddings_input_dim or 4 * config.block_out_channels[0],
            seed=2,
        )
    elif config.num_class_embeds:
        vector, class_labels = torch.eye(config.num_class_embeds)[labels], labels
    concat = normal(2, config.in_channels - 3, *size, seed=3) if config.in_channels > 3 else None
    features = None
    if config.time_cond_proj_dim:
        scales = torch.tensor([8.5, 1.75])
        features = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, scales - 1, config.time_cond_proj_dim
        )
        vector = torch.cat([*([vector] if vector is not None else []), scales[:, None]], 1)
    actual = Conditioning(tokens=tokens, mask=kept, vector=vector, concat=concat)
    peer = {
        "timestep_cond": features,
        "encoder_hidden_states": tokens,
        "encoder_attention_mask": kept,
        "class_labels": class_labels,
        "added_cond_kwargs": added,
    }
    return normal(2, 3, *size), torch.tensor([999.0, 333.25]), actual, peer


def same_unet(actual: Any, peer: Any, size: tuple[int, int] = (8, 8), mask: bool = False) -> None:
    assert actual.state_dict().keys() == peer.state_dict().keys() and norms(actual) == norms(peer)
    x, timestep, cond, words = inputs(actual.config, size, mask)
    joined = x if cond.concat is None else torch.cat([x, cond.concat], 1)
    assert_close(actual(x, timestep, cond), peer(joined, timestep, **words).sample)


@pytest.mark.parametrize("name", UNETS)
@torch.inference_mode()
def test_unets_in_both_directions_through_folders(name: str, tmp_path: Path) -> None:
    values = TINY | UNETS[name]
    actual = randomised(UNet(UNetConfig(**values)))
    save_part(tmp_path / "sfumato", actual)
    peer = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "sfumato")
    same_unet(actual, peer)
    # odd maps fail in diffusers' AttnUpBlock2D
    sizes = [(4, 12)] if "AttnUpBlock2D" in values["up_block_types"] else [(7, 7), (6, 9)]
    for size in sizes:
        # there the first attention of diffusers takes no mask
        same_unet(actual, peer, size, mask="only_cross_attention" not in values)
    peer = randomised(diffusers.UNet2DConditionModel(**values), seed=1)
    peer.save_pretrained(tmp_path / "diffusers")
    loaded = load_part(tmp_path / "diffusers", "UNet2DConditionModel")
    same_unet(loaded, peer)
    assert loaded.config == actual.config  # pyright: ignore[reportAttributeAccessIssue]


@torch.inference_mode()
def test_odd_maps_where_diffusers_fails() -> None:
    """AttnUpBlock2D doubles to the skip's own size: padding the input by hand and cropping would be
    the alternative.
    """
    actual = randomised(UNet(UNetConfig(**(TINY | SELF | MIDDLE))))
    x, timestep, cond, _ = inputs(actual.config, (7, 5))
    assert actual(x, timestep, cond).shape == (2, 3, 7, 5)


@torch.inference_mode()
def test_every_input_shows_in_the_output() -> None:
    """Without this, parity could hold because nothing matters: tokens, mask, vector, time, concat
    each change y.
    """
    actual = randomised(
        UNet(
            UNetConfig(
                **(
                    TINY
                    | EVERY
                    | {"in_channels": 4, "num_class_embeds": 4, "attention_head_dim": 4}
                )
            )
        )
    )
    x, timestep, cond, _ = inputs(actual.config, (8, 8), mask=True)
    y = actual(x, timestep, cond)
    assert cond.tokens is not None and cond.concat is not None
    unmasked = cond.tokens.clone()
    unmasked[0, 4] += 5  # a token that is masked out
    assert torch.equal(actual(x, timestep, replace(cond, tokens=unmasked)), y)
    changes = [
        {"tokens": cond.tokens + 1},
        {"mask": None},
        {"vector": torch.eye(4)[[3, 3]]},
        {"concat": cond.concat + 1},
    ]
    for change in changes:
        assert (actual(x, timestep, replace(cond, **change)) - y).abs().max() > 1e-3, change
    assert (actual(x, timestep - 100, cond) - y).abs().max() > 1e-3
    missing = [{"tokens": None}, {"vector": None}]
    for change in missing:
        with pytest.raises(UserError, match="is missing"):
            actual(x, timestep, replace(cond, **change))


@pytest.mark.parametrize("size", [(8, 8), (7, 7)])
@torch.inference_mode()
def test_controlnet_residuals(size: tuple[int, int]) -> None:
    """A real ControlNet's residuals are the network's `Conditioning.residuals`.

    Those of the down blocks come in order, then the middle's.
    """
    values = TINY | CROSS | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    actual = randomised(UNet(UNetConfig(**values)))
    peer = diffusers.UNet2DConditionModel(**values).eval()
    peer.load_state_dict(actual.state_dict())
    control = randomised(diffusers.ControlNetModel.from_unet(peer, conditioning_channels=3), seed=2)
    x, timestep, cond, words = inputs(actual.config, size)
    picture = normal(2, 3, 8 * size[0], 8 * size[1], seed=4)
    down, middle = control(x, timestep, words["encoder_hidden_states"], picture, return_dict=False)
    expected = peer(
        x,
        timestep,
        **words,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    assert_close(actual(x, timestep, replace(cond, residuals=(*down, middle))), expected)
    assert (expected - actual(x, timestep, cond)).abs().max() > 1e-2
    for wrong in ((*down[1:], middle), (*down, middle, middle), (*down, middle[:, :8])):
        with pytest.raises(UserError, match="do not fit this U-Net: expected"):
            actual(x, timestep, replace(cond, residuals=wrong))


# ---- configs -------------------------------------------------------------------------------------


def defaults_of(config: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(config) if f.default is not MISSING}


def test_every_field_of_diffusers_configs_is_listed_with_its_default() -> None:
    peer = {
        k: p.default
        for k, p in inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters.items()
        if k != "self"
    }
    assert defaults_of(UNetConfig) | FIXED == peer
    peer = {
        k: p.default
        for k, p in inspect.signature(diffusers.AutoencoderKL.__init__).parameters.items()
        if k != "self"
    }
    assert {*defaults_of(KLConfig), "act_fn", "down_block_types", "up_block_types"} == peer.keys()


def another(value: Any) -> Any:
    """A value that is not this one."""
    return not value if isinstance(value, bool) else 7


def saved_unet(tmp_path: Path) -> Path:
    save_part(tmp_path / "unet", UNet(UNetConfig(**(TINY | PLAIN | MIDDLE))))
    return tmp_path / "unet"


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *((k, another(v), "is not supported") for k, v in FIXED.items()),
        (
            "adapter_strength",
            0.5,
            "adapter_strength=0.5 is not known to UNetConfig: it might change the result",
        ),
        (
            "down_block_types",
            ["KDownBlock2D", "DownBlock2D"],
            "block type 'KDownBlock2D' is not supported",
        ),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "is not supported"),
        ("class_embed_type", "text", "class_embed_type 'text' is not supported"),
        ("resnet_time_scale_shift", "spatial", "expected 'default' or 'scale_shift'"),
        ("block_out_channels", [8, 18], "18 is not a multiple of norm_num_groups 4"),
        ("up_block_types", ["UpBlock2D"], "needs 2 down_block_types and 2 up_block_types"),
        ("out_channels", 4, "does not fit its config"),
        ("norm_num_groups", 0, "norm_num_groups=0: expected a whole number of at least 1"),
        ("time_cond_proj_dim", 3, "time_cond_proj_dim=3: expected a whole number of at least 4"),
        ("time_cond_proj_dim", 256, "does not fit its config"),
    ],
)
def test_unsupported_unet_fields_are_refused(
    tmp_path: Path, field: str, value: Any, words: str
) -> None:
    folder = saved_unet(tmp_path)
    change_config(folder, **{field: value})
    with pytest.raises(UserError, match=words) as caught:
        load_part(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported by KLConfig: expected 'silu'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "is not supported"),
        ({"double_z": False}, "double_z=False is not known"),
        (
            {
                "block_out_channels": [4],
                "down_block_types": ["DownEncoderBlock2D"],
                "up_block_types": ["UpDecoderBlock2D"],
            },
            "2 to 6",
        ),
        ({"latents_std": [1.0, 0.0, 1.0]}, "positive stds"),
        ({"latents_mean": [0.0]}, "as many means"),
        ({"_class_name": "AutoencoderTiny"}, "of class 'AutoencoderTiny'"),
    ],
)
def test_unsupported_autoencoder_fields_are_refused(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    save_part(tmp_path, AutoencoderKL(KLConfig(**(SMALL | AUTOENCODERS["statistics"]))))
    change_config(tmp_path, **values)
    with pytest.raises(UserError, match=words):
        load_part(tmp_path, "AutoencoderKL")


# ---- schedules and schedulers --------------------------------------------------------------------


def diffusers_scheduler(process: Process) -> Any:
    values = to_scheduler_config(process)
    return getattr(diffusers, values["_class_name"]).from_config(values)


@pytest.mark.parametrize("kind", DIFFUSERS_SCHEDULES)
def test_tables_equal_diffusers(kind: str) -> None:
    """alpha^2 and sigma^2 at every grid point, to 1e-6 plus the rounding of float32.

    Each beta is rounded to 2^-24 of itself. The product is taken over diffusers' betas in float64:
    its own cumulative product adds up to 1e-4 of rounding, checked last.
    """
    process = Process(schedule(kind), parameterization("v"))
    peer = diffusers_scheduler(process)
    betas = peer.betas.double()
    products = torch.log1p(-betas).cumsum(0)
    lost = 1e-6 + (2**-24 * betas / (1 - betas)).cumsum(0)
    alpha, sigma = process.schedule.at(process.schedule.time(torch.arange(1000)))
    assert ((alpha.square() / products.exp() - 1).abs() < lost).all()
    assert ((sigma.square() / -torch.expm1(products) - 1).abs() < lost).all()
    # only the last beta of cosine, 0.999, costs more
    assert lost[:-1].max() < 2e-6 and lost[-1] < 1e-4
    torch.testing.assert_close(alpha.square().float(), peer.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", DIFFUSERS_SCHEDULES)
@pytest.mark.parametrize("name", DIFFUSERS_PREDICTIONS)
def test_scheduler_configs_in_both_directions_through_folders(
    kind: str, name: str, tmp_path: Path
) -> None:
    options = {} if kind == "cosine" else {"start": 0.0003, "end": 0.015}
    process = Process(schedule(kind, steps=500, **options), parameterization(name))
    config = to_scheduler_config(process)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    peer = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    assert (
        peer.config.prediction_type == DIFFUSERS_PREDICTIONS[name]
        and peer.config.beta_schedule == DIFFUSERS_SCHEDULES[kind]
    )
    assert len(peer.alphas_cumprod) == 500 and not peer.config.clip_sample
    peer.save_pretrained(tmp_path / "again")
    assert (
        from_scheduler_config(
            json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
        )
        == process
    )
    assert from_scheduler_config(config) == process


def test_flow_scheduler_in_both_directions(tmp_path: Path) -> None:
    process = Process(schedule("flow"), parameterization("flow"))
    peer = diffusers_scheduler(process)
    peer.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert len(values) > 12 and from_scheduler_config(values) == process
    # no scheduler of diffusers stands for it: a config of sfumato does
    other = Process(schedule("flow"), parameterization("v"))
    config = to_scheduler_config(other)
    assert (
        config["_class_name"] == "SfumatoProcess"
        and from_scheduler_config(json.loads(json.dumps(config))) == other
    )
    for change, words in (
        ({"schedule": {"class": "Flow"}}, "expected a class of"),
        ({"shift": 3}, "shift=3 is not known"),
    ):
        with pytest.raises(UserError, match=words):
            from_scheduler_config({**config, **change})


FLOW, TABLE = "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"
UNKNOWN = "TomorrowsScheduler"


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (UNKNOWN, {}, f"scheduler class {UNKNOWN!r} is not known"),
        (
            TABLE,
            {"trained_betas": [0.1, 1.2], "num_train_timesteps": 2},
            "strictly between 0 and 1",
        ),
        (TABLE, {"clip_sample": None}, "clip_sample=None: expected true or false"),
        (TABLE, {"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
        (TABLE, {"prediction_type": "flow"}, "prediction_type='flow'"),
        (TABLE, {"snr_shift_scale": 2}, "snr_shift_scale=2 is not known"),
        (FLOW, {"num_train_timesteps": 500}, "num_train_timesteps=500"),
        (FLOW, {"beta_start": 0.1}, "beta_start=0.1 is not known"),
    ],
)
def test_unsupported_schedulers_are_refused(name: str, values: dict[str, Any], words: str) -> None:
    good = {"clip_sample": False} if name != FLOW else {}
    if name != UNKNOWN:
        from_scheduler_config({"_class_name": name, **good})
    with pytest.raises(UserError, match=words):
        from_scheduler_config({"_class_name": name, **good, **values})


# ---- whole models --------------------------------------------------------------------------------


class DiffusersModel(nn.Module):
    """A model folder opened with diffusers, and a sampling loop by hand."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(
            folder / "scheduler"
        )

    @torch.inference_mode()
    def forward(
        self, noise: Tensor, labels: list[int], null: int, steps: int, weight: float
    ) -> Tensor:
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            # its own default ends at sigma 0.001, not at 1/steps
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        else:
            self.scheduler.set_timesteps(steps)
        x = noise
        for timestep in self.scheduler.timesteps:
            y, unconditional = (
                self.unet(
                    x, timestep, encoder_hidden_states=None, class_labels=torch.tensor(k)
                ).sample
                for k in (labels, [null] * len(labels))
            )
            x = self.scheduler.step(
                unconditional + weight * (y - unconditional), timestep, x
            ).prev_sample
        return x

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(self.vae.config[k])[:, None, None] for k in ("latents_mean", "latents_std")
        )
        return self.vae.decode(z * std + mean).sample.clamp(-1, 1).add(1).div(2)


PAIRS = [
    ("cosine", "eps"),
    ("cosine", "v"),
    ("linear", "eps"),
    ("linear", "v"),
    ("scaled_linear", "v"),
    ("flow", "flow"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_a_whole_model_makes_the_same_latents_and_pictures(
    pair: tuple[str, str], weight: float, tmp_path: Path
) -> None:
    model = tiny_model()
    process = Process(schedule(pair[0]), parameterization(pair[1]))
    model = replace(model, denoiser=Denoiser(model.denoiser.network, process))
    model.save(tmp_path / "model")
    peer, names = DiffusersModel(tmp_path / "model"), model.class_names
    noise = SeededNoise((2, 8, 8), [11, 12, 13])()
    labels = [0, 2, 1]
    settings = {"prompt": [names[k] for k in labels], "seed": 11, "steps": 5, "guidance": weight}
    actual = model.generate(**settings, output="latent")
    expected = peer(noise, labels, len(names), 5, weight)
    assert_close(actual, expected, 1e-4)
    # a random network's eps errors are divided by alpha(1): those latents are far out of any
    # picture's range
    if pair[1] != "eps":
        pictures = model.generate(**settings, output="tensor")
        assert (pictures - peer.decode(expected)).abs().max() < 1e-3
        assert pictures.std() > 0.01
    again = load(tmp_path / "model")  # what was read from the folder is the model that was written
    assert torch.equal(again.generate(**settings, output="latent"), actual)


@pytest.mark.parametrize(
    ("chosen", "parameter"),
    [
        (ZeroTerminalSNR(schedule("scaled_linear")), "v"),
        (ZeroTerminalSNR(schedule("linear", steps=50)), "x0"),
        (table(schedule("cosine", steps=30).betas), "eps"),
    ],
)
def test_rescaled_and_own_tables_in_both_directions(chosen: Any, parameter: str) -> None:
    """A scheduler of diffusers built from a written config has the same table.

    The config read again gives the same process.
    """
    process = Process(chosen, parameterization(parameter))
    config = to_scheduler_config(process)
    peer: Any = diffusers.DDIMScheduler.from_config(config)
    grid = torch.arange(1, chosen.grid + 1, dtype=torch.float64) / chosen.grid
    torch.testing.assert_close(
        peer.alphas_cumprod.double(), chosen.at(grid)[0].square(), rtol=1e-4, atol=1e-6
    )
    again = from_scheduler_config(json.loads(json.dumps(config)))
    assert again.parameterization == process.parameterization and again.schedule.at(
        0.37
    ) == chosen.at(0.37)


def test_a_shifted_flow_in_both_directions() -> None:
    process = Process(Shifted(schedule("flow"), 3.0), parameterization("flow"))
    config = to_scheduler_config(process)
    peer: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    peer.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    actual = [process.schedule.point(t)[1] for t in timesteps("trailing", 10, process.schedule)]
    np.testing.assert_allclose(peer.sigmas.numpy(), actual, atol=1e-6)
    assert from_scheduler_config(config) == process
