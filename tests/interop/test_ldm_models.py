"""Latent Diffusion's own models beside diffusers: networks, whole pictures, folders both ways,
single files both ways.

diffusers has pipelines for the text-to-image and the unconditional models. Of the original U-Net
without tokens there is a second implementation here, written from its parts (Ho et al. 2020,
arXiv:2006.11239; Dhariwal & Nichol 2021, arXiv:2105.05233) under the original names.
"""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import LDMPipeline
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
    LDMTextToImagePipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers.single_files as single
from helpers import ldm_conditioners
from helpers.models import randomised
from helpers.pipelines import open_pipeline, pipeline_images, quiet, vae_blocks
from helpers.tensors import equal_tensors, relative_error
from sfumato.checkpoints.checkpoint import ReadOptions
from sfumato.checkpoints.families._unet_map import unet_map
from sfumato.checkpoints.families.ldm_yaml import from_yaml
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.checkpoints.lazy_tensor import from_tensors, load_tensors
from sfumato.checkpoints.weight_map import load_all, store_all, with_prefix
from sfumato.compress.vq import VQConfig, VQModel
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance_models.skip_layers import branches
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.predict.networks.unet_2d import UNet2DConfig
from sfumato.predict.text_encoders.bert import build_bert
from sfumato.sampling import Defaults
from sfumato.types import Conditioning

BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
BETAS |= {"steps_offset": 1}
# DDIM's times of Latent Diffusion: the last step goes to the first of the table, not to no noise
LEADING = "leading:clean=false,offset=1"
SMALL = {
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "sample_size": 8,
}
SMALL |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
SMALL |= {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
RESNETS = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
KINDS: dict[str, dict[str, Any]] = {
    "CelebA-HQ, FFHQ, bedrooms": {},
    "churches": {**RESNETS, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "steps by name": {
        "down_block_types": ("ResnetDownsampleBlock2D", *SMALL["down_block_types"][1:])
    },
    "one head": {"attention_head_dim": None},
    "no attention in the middle": {"add_attention": False, "norm_eps": 1e-6},
    "DDPM": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "time_embedding_dim": 20,
    },
    "no middle": {"mid_block_type": None},
}


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unet_without_tokens(kind: str, tmp_path: Path) -> None:
    """Folders of each library open in the other with the same weights."""
    peer = randomised(diffusers.UNet2DModel(**{**SMALL, **KINDS[kind]}), 1)
    peer.save_pretrained(tmp_path / "diffusers")
    network = load_part(tmp_path / "diffusers", "UNet2DModel")
    assert isinstance(network, UNet)
    save_part(tmp_path / "sfumato", network)
    assert (
        json.loads((tmp_path / "sfumato" / "config.json").read_text())["_class_name"]
        == "UNet2DModel"
    )
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "sfumato")
    for side in (8, 12):
        x, t = torch.randn(2, 3, side, 8), torch.tensor([981.0, 7.0])
        with torch.no_grad():
            expected = peer(x, t).sample
            # where weights lie in memory decides how sums are rounded
            assert relative_error(again(x, t).sample, expected) < 1e-6
        assert relative_error(network(x, t, Conditioning()), expected) < 1e-5


def test_every_default_equals_diffusers() -> None:
    config = UNet2DConfig.from_dict({"_class_name": "UNet2DModel"})
    written = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items()}
    reference = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in diffusers.UNet2DModel().config.items()
        if k[0] != "_"
    }
    assert {k: v for k, v in written.items() if k != "_class_name"} == reference


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not supported"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8 is not known to UNet2DModel"),
        ({"num_attention_heads": 2}, "num_attention_heads=2 is not known to UNet2DModel"),
        ({"downsample_type": "pool"}, "downsample_type 'pool' is not supported"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups None with resnet_time_scale_shift 'scale_shift'",
        ),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups 2"),
        ({"attention_head_dim": 5}, "16 does not divide by attention_head_dim 5"),
        (
            {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")},
            "has no cross-attention",
        ),
        (
            {"down_block_types": ("DownBlock2D", "KDownBlock2D", "DownBlock2D")},
            "block type 'KDownBlock2D'",
        ),
        ({"class_embed_type": "fourier"}, "class_embed_type 'fourier' is not supported"),
        (
            {"_class_name": "SfumatoUNet2DModel", "num_attention_heads": 2},
            "attention_head_dim 8 beside num_attention_heads 2",
        ),
        (
            {
                "_class_name": "SfumatoUNet2DModel",
                "num_attention_heads": 5,
                "attention_head_dim": None,
            },
            "by num_attention_heads 5",
        ),
    ],
)
def test_bad_configs_of_a_unet_without_tokens_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        UNet2DConfig.from_dict({"_class_name": "UNet2DModel", **SMALL, **fields})


def test_steps_by_residual_blocks_with_tokens() -> None:
    """UNet2DConditionModel has such blocks too."""
    shape = {
        "in_channels": 3,
        "out_channels": 3,
        "cross_attention_dim": 6,
        "attention_head_dim": 2,
        "block_out_channels": (8, 16),
    }
    shape |= {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    shape |= {"up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    peer = randomised(diffusers.UNet2DConditionModel(**shape), 1)
    network = UNet(UNetConfig(**shape)).eval()
    network.load_state_dict(peer.state_dict())
    x, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6)
    with torch.no_grad():
        assert (
            relative_error(
                network(x, torch.full((2,), 7.0), Conditioning(tokens)),
                peer(x, 7, tokens).sample,
            )
            < 1e-5
        )


@pytest.mark.invariance
def test_rows_do_not_depend_on_the_batch() -> None:
    network = randomised(UNet(UNet2DConfig(**{**SMALL, **KINDS["churches"]})), 1)
    x, t = torch.randn(5, 3, 8, 8), torch.full((5,), 500.0)
    with torch.inference_mode():
        whole = network(x, t, Conditioning())
        for k in range(5):
            assert torch.equal(
                network(x[k : k + 1], t[k : k + 1], Conditioning()), whole[k : k + 1]
            )


def test_text_transformer() -> None:
    small = {
        "vocab_size": 40,
        "encoder_layers": 3,
        "encoder_ffn_dim": 48,
        "head_dim": 4,
        "d_model": 24,
    }
    config = LDMBertConfig(**small)
    peer = randomised(LDMBertModel(config), 1)
    network = build_bert(
        config.to_diff_dict(),
        peer.state_dict(),
        torch.float32,
        Path("config.json"),
        Path("weights"),
    )
    tokens = torch.randint(0, 40, (2, 77))
    with torch.no_grad():
        assert relative_error(network(tokens), peer(tokens)[0]) < 1e-5
        assert relative_error(network(tokens[:, :9]), peer(tokens[:, :9])[0]) < 1e-5
    for field, value in (
        ("activation_function", "relu"),
        ("scale_embedding", True),
        ("rotary", True),
        ("head_dim", 0),
    ):
        with pytest.raises(UserError, match=field):
            build_bert(
                {**small, field: value},
                peer.state_dict(),
                torch.float32,
                Path("config.json"),
                Path("weights"),
            )


# ---- the original U-Net without tokens -----------------------------------------------------------


class Original:
    """The U-Net under its original names: weights are taken by name, and noted."""

    def __init__(
        self, tensors: dict[str, Tensor], heads: int | None, width: int | None, new_order: bool
    ):
        self.tensors, self.heads, self.width, self.new_order = tensors, heads, width, new_order
        self.taken: set[str] = set()

    def get(self, name: str) -> Tensor:
        self.taken.add(name)
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return any(k.startswith(f"{name}.") for k in self.tensors)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.get(f"{name}.weight")
        return F.conv2d(x, weight, self.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.get(f"{name}.weight"), self.get(f"{name}.bias"), 1e-5)

    def block(self, name: str, x: Tensor, time: Tensor, step: str = "") -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if step:
            x, h = (
                F.avg_pool2d(v, 2)
                if step == "down"
                else v.repeat_interleave(2, 2).repeat_interleave(2, 3)
                for v in (x, h)
            )
        h = self.conv(f"{name}.in_layers.2", h)
        emb = self.linear(f"{name}.emb_layers.1", F.silu(time))[:, :, None, None]
        if emb.shape[1] == 2 * h.shape[1]:
            scale, shift = emb.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + emb)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        return h + (
            self.conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection") else x
        )

    def attend(self, name: str, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        heads = self.heads or c // (self.width or 0)
        # (B, 3C, N)
        qkv = F.conv1d(
            self.norm(f"{name}.norm", x).flatten(2),
            self.get(f"{name}.qkv.weight"),
            self.get(f"{name}.qkv.bias"),
        )
        if self.new_order:
            q, k, v = (part.reshape(b * heads, c // heads, -1) for part in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.reshape(b * heads, 3 * c // heads, -1).split(c // heads, 1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c // heads), -1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return x + F.conv1d(
            h, self.get(f"{name}.proj_out.weight"), self.get(f"{name}.proj_out.bias")
        ).reshape(b, c, *size)

    def run(self, x: Tensor, t: Tensor) -> Tensor:
        width = self.tensors["time_embed.0.weight"].shape[1]
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        time = self.linear(
            "time_embed.2",
            F.silu(self.linear("time_embed.0", torch.cat([angle.cos(), angle.sin()], 1))),
        )
        skips = [x := self.conv("input_blocks.0.0", x)]
        n, ups = 1, {k.split(".")[1] for k in self.tensors if k.startswith("output_blocks")}
        side = x.shape[-1]
        steps = self.downs()
        while self.has(f"input_blocks.{n}"):
            if self.has(f"input_blocks.{n}.0.op"):
                x = self.conv(f"input_blocks.{n}.0.op", x, 2)
            else:
                x = self.block(f"input_blocks.{n}.0", x, time, "down" if n in steps else "")
            x = self.attend(f"input_blocks.{n}.1", x) if self.has(f"input_blocks.{n}.1") else x
            skips.append(x)
            n += 1
        x = self.block(
            "middle_block.2",
            self.attend("middle_block.1", self.block("middle_block.0", x, time)),
            time,
        )
        for n in range(len(ups)):
            x = self.block(f"output_blocks.{n}.0", torch.cat([x, skips.pop()], 1), time)
            for k in (1, 2):
                name = f"output_blocks.{n}.{k}"
                if self.has(f"{name}.qkv"):
                    x = self.attend(name, x)
                elif self.has(f"{name}.conv"):
                    x = self.conv(f"{name}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
                elif self.has(f"{name}.in_layers"):
                    x = self.block(name, x, time, "up")
        assert x.shape[-1] == side and not skips
        return self.conv("out.2", F.silu(self.norm("out.0", x)))

    def downs(self) -> list[int]:
        """For two residual blocks a level."""
        return [n for n in range(3, 100, 3) if self.has(f"input_blocks.{n}.0.in_layers")]


# parameters of the YAML, and the expected fields of the config
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ffhq": (
        {
            "model_channels": 32,
            "channel_mult": [1, 2, 3],
            "attention_resolutions": [4, 2],
            "num_head_channels": 32,
        },
        {"attention_head_dim": 32, "num_attention_heads": None, "downsample_type": "conv"},
    ),
    "churches": (
        {
            "model_channels": 32,
            "channel_mult": [1, 2, 4],
            "attention_resolutions": [1, 2],
            "num_heads": 8,
            "use_scale_shift_norm": True,
        }
        | {"resblock_updown": True},
        {
            "attention_head_dim": None,
            "num_attention_heads": 8,
            "downsample_type": "resnet",
            "attn_norm_num_groups": 32,
        },
    ),
}


def yaml_of(name: str, levels: int, **more: Any) -> dict[str, Any]:
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "num_res_blocks": 2,
        **PUBLISHED[name][0],
        **more,
    }
    dd = {
        "double_z": False,
        "z_channels": 3,
        "resolution": 2 ** (levels + 2),
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "num_res_blocks": 1,
    }
    dd |= {"ch_mult": [1] * levels, "attn_resolutions": [], "dropout": 0.0}
    first = {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {"embed_dim": 3, "n_embed": 11, "ddconfig": dd},
    }
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "concat_mode": False,
        "image_size": 64,
        "channels": 3,
    }
    params |= {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": unet,
        },
        "first_stage_config": first,
    }
    params |= {"cond_stage_config": "__is_unconditional__"}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def config_of(name: str) -> UNet2DConfig:
    published, kept = PUBLISHED[name]
    widths = tuple(published["model_channels"] * m for m in published["channel_mult"])
    attends = [2**k in published["attention_resolutions"] for k in range(len(widths))]
    rest = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if kept["downsample_type"] == "resnet"
        else ("DownBlock2D", "UpBlock2D")
    )
    return UNet2DConfig(
        sample_size=8,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else rest[0] for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else rest[1] for a in reversed(attends)),
        upsample_type=kept["downsample_type"],
        resnet_time_scale_shift="scale_shift"
        if published.get("use_scale_shift_norm")
        else "default",
        **kept,
    )


def unconditional(name: str, levels: int = 3) -> LatentDiffusion:
    """A model with the numbers that single files imply: norms of 32 groups."""
    conditioner = ldm_nothing()
    autoencoder = VQModel(
        VQConfig(
            block_out_channels=(32,) * levels,
            layers_per_block=1,
            num_vq_embeddings=11,
            sample_size=2 ** (levels + 2),
            scaling_factor=1.0,
        )
    )
    network = randomised(UNet(config_of(name)), 1)
    process = Process(schedule("scaled_linear", start=0.0015, end=0.0195), parameterization("eps"))
    defaults = Defaults(steps=4, guidance=1.0, spacing=LEADING)
    return LatentDiffusion(
        randomised(autoencoder, 2), Denoiser(network, process), conditioner, defaults
    )


def ldm_nothing() -> Any:
    from sfumato.predict.conditioners.unconditional import Unconditional

    return Unconditional()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("new_order", [False, True])
def test_original_layout_without_tokens(name: str, new_order: bool) -> None:
    config, published = config_of(name), PUBLISHED[name][0]
    network = randomised(UNet(config), 1)
    tensors = load_tensors(
        store_all(unet_map(config.to_dict(), new_order), from_tensors(network.state_dict()))
    )
    original = Original(
        tensors, published.get("num_heads"), published.get("num_head_channels"), new_order
    )
    x, t = torch.randn(2, 3, 8, 16), torch.tensor([981.0, 7.0])
    with torch.no_grad():
        assert relative_error(network(x, t, Conditioning()), original.run(x, t)) < 1e-5
    assert original.taken == tensors.keys()
    file = {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
    text = from_yaml(yaml_of(name, 3, use_new_attention_order=new_order))
    for reading in (ReadOptions(new_attention_order=new_order), ReadOptions(original_config=text)):
        result = single.split_tensors(file | ae_tensors(3), {}, "file", reading).components["unet"]
        assert {k: result.config.get(k) for k in PUBLISHED[name][1]} == PUBLISHED[name][1], (
            "the rule of the published models, or the YAML's"
        )
        assert all(
            torch.equal(v, result.tensors[k].load()) for k, v in network.state_dict().items()
        )
        assert result.config["sample_size"] == 64 and result.config["down_block_types"] == list(
            config.down_block_types
        )
        rebuilt = result.build(Path("file"))
        assert torch.equal(rebuilt(x, t, Conditioning()), network(x, t, Conditioning()))
    if published.get("num_heads", 2) > 1:  # the orders differ, and so does what comes out
        other = load_tensors(
            load_all(unet_map(config.to_dict(), not new_order), from_tensors(tensors), "file")
        )
        assert not torch.equal(
            other["mid_block.attentions.0.to_q.weight"],
            network.state_dict()["mid_block.attentions.0.to_q.weight"],
        )


def ae_tensors(levels: int) -> dict[str, Tensor]:
    from sfumato.checkpoints.families._vae import vae_map

    autoencoder = unconditional("ffhq", levels).autoencoder
    maps = with_prefix(vae_map(autoencoder.to_config()), "first_stage_model.")
    return load_tensors(store_all(maps, from_tensors(autoencoder.state_dict())))


# ---- whole pictures ------------------------------------------------------------------------------


def ddim(**fields: Any) -> Any:
    return diffusers.DDIMScheduler(**{**BETAS, **fields})


def vq(levels: int = 2, **fields: Any) -> Any:
    shape = {
        **vae_blocks(levels),
        "block_out_channels": (8,) * levels,
        "num_vq_embeddings": 40,
        "latent_channels": 3,
        **fields,
    }
    result = randomised(diffusers.VQModel(**shape), 2)
    result.quantize.embedding.weight.copy_(
        torch.randn(40, 3, generator=torch.Generator().manual_seed(5))
    )
    return result


def unconditional_pipeline(**fields: Any) -> Any:
    unet = randomised(diffusers.UNet2DModel(**{**SMALL, **fields}), 1)
    return quiet(LDMPipeline(vqvae=vq(scaling_factor=1.0), unet=unet, scheduler=ddim()))


def drawn(pipe: Any, *prompts: list[str], **options: Any) -> Tensor:
    """Two images in five steps."""
    images = pipeline_images(pipe, *prompts, n=2, num_inference_steps=5, **options)
    assert images.std() > 0.02, "images in which something can be seen"
    return images


def compare(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape and (result - expected).abs().max() < 1e-3, float(
        (result - expected).abs().max()
    )


@pytest.mark.parametrize("kind", ["CelebA-HQ, FFHQ, bedrooms", "churches"])
def test_unconditional_pictures(kind: str, tmp_path: Path) -> None:
    """Folders of each library open in the other, with the same default run."""
    peer = unconditional_pipeline(**KINDS[kind])
    peer.save_pretrained(tmp_path / "diffusers")
    expected = drawn(peer, batch_size=2)
    model = load(tmp_path / "diffusers")
    assert model.defaults == Defaults(steps=50, guidance=1.0, spacing=LEADING)
    compare(model.generate(n=2, steps=5, output="tensor"), expected)
    model.save(tmp_path / "sfumato")
    again = load(tmp_path / "sfumato")
    assert again.hash == model.hash and again.defaults == model.defaults
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = open_pipeline(tmp_path / "sfumato")
    assert isinstance(pipe, LDMPipeline)
    compare(drawn(pipe, batch_size=2), expected)
    with pytest.raises(UserError, match="this model is unconditional"):
        model.generate("a face", steps=1)


def test_folders_of_the_first_hour(tmp_path: Path) -> None:
    """CompVis/ldm-celebahq-256 is of diffusers 0.1: pickles, old names of attention, fields that
    came later left out. The scale of latents is one of them: 1, where today's diffusers takes
    0.18215.
    """
    pipe = unconditional_pipeline()
    pipe.save_pretrained(tmp_path / "old", safe_serialization=False)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, late in (
        ("unet", ["add_attention", "downsample_type", "upsample_type", "attn_norm_num_groups"]),
        ("vqvae", ["scaling_factor"]),
    ):
        config, file = (
            tmp_path / "old" / part / "config.json",
            tmp_path / "old" / part / "diffusion_pytorch_model.bin",
        )
        values = json.loads(config.read_text())
        for field in late:
            del values[field]
        config.write_text(json.dumps(values))
        tensors = torch.load(file, weights_only=True)
        for now, then in new.items():
            tensors = {k.replace(f".{now}.", f".{then}."): v for k, v in tensors.items()}
        torch.save(tensors, file)
    assert any(
        "proj_attn" in k
        for k in torch.load(
            tmp_path / "old" / "unet" / "diffusion_pytorch_model.bin", weights_only=True
        )
    )
    scheduler = {k: v for k, v in BETAS.items() if k not in ("set_alpha_to_one", "steps_offset")}
    scheduler |= {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.1.3",
        "num_train_timesteps": 1000,
        "timestep_values": None,
    }
    (tmp_path / "old" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    model = load(tmp_path / "old")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        {k: v for k, v in scheduler.items() if k != "timestep_values"}
    )
    compare(model.generate(n=2, steps=5, output="tensor"), drawn(pipe, batch_size=2))


TEXT_UNET = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def text_pipeline(**wide: Any) -> Any:
    """Latents of one eighth, as the pipeline takes for granted."""
    config = ldm_conditioners.bert_config(**wide.get("bert", {}))
    bert = LDMBertModel(
        LDMBertConfig(**{k: getattr(config, k) for k in config.__dataclass_fields__})
    )
    unet = diffusers.UNet2DConditionModel(**{**TEXT_UNET, **wide.get("unet", {})})
    vae = diffusers.AutoencoderKL(
        **{
            **vae_blocks(4),
            "block_out_channels": (8,) * 4,
            "latent_channels": 4,
            **wide.get("vae", {}),
        }
    )
    parts = {
        "bert": randomised(bert, 1),
        "unet": randomised(unet, 3),
        "vqvae": randomised(vae, 2),
    }
    return quiet(
        LDMTextToImagePipeline(
            **parts,
            tokenizer=ldm_conditioners.tokenizer(),
            scheduler=ddim(beta_start=0.00085, beta_end=0.012),
        )
    )


PROMPTS = ["a red cat, (very:1.3) red", "Two DOGS"]


def test_text_to_image_pictures(tmp_path: Path) -> None:
    peer = text_pipeline()
    peer.save_pretrained(tmp_path / "diffusers")
    model = load(tmp_path / "diffusers")
    assert model.defaults == Defaults(steps=50, guidance=1.0, spacing=LEADING)
    assert model.describe()["parts"].keys() == {"autoencoder", "denoiser", "text_encoder"}
    model.save(tmp_path / "sfumato")
    again = load(tmp_path / "sfumato")
    assert again.hash == model.hash and again.defaults == model.defaults
    pipe = open_pipeline(tmp_path / "sfumato")
    assert isinstance(pipe, LDMTextToImagePipeline)
    for guidance, height in ((1.0, 32), (5.0, 32), (3.0, 64)):
        request: dict[str, Any] = {"height": height, "width": 32}
        expected = drawn(peer, PROMPTS, guidance_scale=guidance, **request)
        compare(drawn(pipe, PROMPTS, guidance_scale=guidance, **request), expected)
        for each in (model, again):
            compare(
                each.generate(PROMPTS, steps=5, guidance=guidance, output="tensor", **request),
                expected,
            )
    other = model.generate(
        PROMPTS,
        steps=5,
        guidance=5.0,
        negative_prompt="a dog",
        output="tensor",
        height=32,
        width=32,
    )
    assert (
        other - model.generate(PROMPTS, steps=5, guidance=5.0, output="tensor", height=32, width=32)
    ).abs().max() > 1e-3


# ---- single files --------------------------------------------------------------------------------


WIDE = {"norm_num_groups": 32, "block_out_channels": (32, 64), "attention_head_dim": 8}


def same_pictures(a: LatentDiffusion, b: LatentDiffusion, **request: Any) -> None:
    result = [m.generate(steps=3, output="tensor", seed=4, **request) for m in (a, b)]
    # Not to the last bit: how weights lie to cache lines in a file decides how a product of few
    # rows is rounded.
    assert (result[0] - result[1]).abs().max() < 1e-5 and result[0].std() > 0.01


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_text_to_image_single_files(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """A folder of diffusers becomes a single file with the original names, and back.

    The model is the same, tokenizer and run included.
    """
    wide = {
        "unet": WIDE,
        "vae": {"norm_num_groups": 32, "block_out_channels": (32,) * 4},
        "bert": {"encoder_attention_heads": 8},
    }
    text_pipeline(**wide).save_pretrained(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    folder.save(tmp_path / "one.safetensors", dtype)
    keys = load_file(tmp_path / "one.safetensors").keys()
    assert {
        "cond_stage_model.transformer.attn_layers.layers.3.1.net.0.0.weight",
        "model.diffusion_model.middle_block.1.norm.weight",
    } <= keys
    one = load(tmp_path / "one.safetensors")
    assert one.denoiser.process == folder.denoiser.process and one.defaults == folder.defaults
    if dtype is None:
        same_pictures(folder, one, prompt="a red cat", guidance=3.0, height=32, width=32)
    one.save(tmp_path / "two.safetensors", dtype)
    two = load(tmp_path / "two.safetensors")
    assert two.hash == one.hash
    one.save(tmp_path / "folder 2")
    assert load(tmp_path / "folder 2").hash == one.hash
    tensors = load_file(tmp_path / "one.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no tokenizer, as all files in its layout"):
        load(tmp_path / "bare.safetensors")
    bare = load(tmp_path / "bare.safetensors", tokenizer=tmp_path / "folder" / "tokenizer")
    # a file without notes has the family's default size; the images of a size are the same
    network = bare.denoiser.network.config
    assert network.sample_size == 32 and one.denoiser.network.config.sample_size == 4
    assert replace(network, sample_size=4) == one.denoiser.network.config
    assert equal_tensors(bare.denoiser.network.state_dict(), one.denoiser.network.state_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_unconditional_single_files(name: str, tmp_path: Path) -> None:
    model = unconditional(name)
    model.save(tmp_path / "one.safetensors")
    assert "model.diffusion_model.middle_block.1.qkv.weight" in load_file(
        tmp_path / "one.safetensors"
    )
    one = load(tmp_path / "one.safetensors")
    assert one.defaults.guidance == 1.0 and one.denoiser.process == model.denoiser.process
    same_pictures(model, one, height=32, width=32)
    one.save(tmp_path / "folder")
    assert load(tmp_path / "folder").hash == one.hash
    kind = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    if name == "ffhq":
        assert kind["_class_name"] == "LDMPipeline" and kind["unet"] == ["diffusers", "UNet2DModel"]
        expected = drawn(open_pipeline(tmp_path / "folder", "LDMPipeline"), batch_size=2)
        compare(load(tmp_path / "folder").generate(n=2, steps=5, output="tensor"), expected)
    else:  # 8 heads at every width: diffusers' class has no field for it
        assert kind["_class_name"] == "LatentDiffusion" and kind["unet"] == [
            "diffusers",
            "SfumatoUNet2DModel",
        ]


def test_wrappers_and_references_of_a_network_without_tokens() -> None:
    """Deep features are reused, and copies weakened.

    Downsampling by residual blocks is never skipped, and every combination runs.
    """
    model = unconditional("churches")
    request: dict[str, Any] = {"height": 32, "width": 32, "steps": 3, "seed": 4, "output": "latent"}
    whole = model.generate(**request)
    assert torch.equal(model.generate(cache=1, **request), whole)
    for other in (
        {"cache": 2},
        {"guidance": "2 perturbed_attention"},
        {"guidance": "2 skip_layers:layers=up_blocks.0"},
    ):
        result = model.generate(**other, **request)
        assert result.isfinite().all() and not torch.equal(result, whole), other
    names = {name for name, _ in branches(model.denoiser.network)}
    assert "down_blocks.0.resnets.0" in names and "down_blocks.0.downsamplers.0" not in names


CLASS_UNET = {**TEXT_UNET, **WIDE, "in_channels": 3, "out_channels": 3, "sample_size": 64}


def class_conditional(rows: int = 5, **fields: Any) -> LatentDiffusion:
    autoencoder = VQModel(
        VQConfig(
            block_out_channels=(32,) * 3,
            layers_per_block=1,
            num_vq_embeddings=11,
            scaling_factor=1.0,
        )
    )
    network = randomised(UNet(UNetConfig(**{**CLASS_UNET, "attention_head_dim": 1})), 1)
    process = Process(schedule("scaled_linear", start=0.0015, end=0.0195), parameterization("eps"))
    conditioner = ldm_conditioners.class_embedding(rows, **fields)
    defaults = Defaults(guidance=1.5, steps=50, spacing=LEADING)
    return LatentDiffusion(
        randomised(autoencoder, 2), Denoiser(network, process), conditioner, defaults
    )


@pytest.mark.parametrize("names", [(), ("tench", "goldfish", "shark", "ray")])
def test_class_conditional_models(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Folder and single file, with guidance from the row for no class; the pictures are those of
    the parts put together by hand.
    """
    model = class_conditional(class_names=names)
    request: dict[str, Any] = {"height": 16, "width": 16, "steps": 5, "seed": 4, "output": "latent"}
    result = model.generate("2", guidance=3.0, **request)
    table = model.conditioner.table

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional, free = (
            model.denoiser.network(x, t, Conditioning(table[k][None, None])) for k in (2, 4)
        )
        return free + 3.0 * (conditional - free)

    z = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    scheduler = ddim()
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(guided(z, t[None].float()), t, z).prev_sample
    assert relative_error(result, z) < 1e-4
    assert not torch.allclose(result, model.generate("1", guidance=3.0, **request))
    if names:
        assert torch.equal(model.generate("sharks", guidance=3.0, **request), result)
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        model.save(path)
        again = load(path)
        assert (
            again.class_names == (names or ("0", "1", "2", "3"))
            and again.denoiser.process == model.denoiser.process
        )
        assert again.defaults == model.defaults
        same_pictures(model, again, prompt="2", guidance=3.0, height=16, width=16)
    assert load_file(tmp_path / "one.safetensors")["cond_stage_model.embedding.weight"].shape == (
        5,
        24,
    )
    assert (tmp_path / "folder" / "conditioner" / "diffusion_pytorch_model.safetensors").exists()
    bare = load_file(tmp_path / "one.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="give heads, or its YAML"):
        load(tmp_path / "bare.safetensors")
    labelled = load(tmp_path / "bare.safetensors", reading=ReadOptions(heads=1, class_names=names))
    assert labelled.class_names == model.class_names
    same_pictures(model, labelled, prompt="2", guidance=3.0, height=16, width=16)


def test_a_table_without_a_row_for_none(tmp_path: Path) -> None:
    """ImageNet's 1000 classes and no more: images are generated without guidance.

    With guidance the request is refused.
    """
    model = class_conditional(1000)
    model.save(tmp_path / "one.safetensors")
    path = tmp_path / "one.safetensors"
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    del notes["sfumato.model"]  # a file of its authors has no defaults
    save_file(load_file(path), path, notes)
    model = load(path)
    assert model.defaults.guidance == 1.0 and len(model.class_names) == 1000
    small: dict[str, Any] = {"height": 16, "width": 16, "steps": 2, "output": "tensor"}
    assert model.generate("999", **small).isfinite().all()
    for wrong in ({"prompt": "999", "guidance": 2.0}, {"prompt": None}):
        with pytest.raises(UserError, match="no row for no class"):
            model.generate(**wrong, **small)
