"""Parity with diffusers for every family of autoencoders: the same keys, moments, codes and
pictures, in folders of both directions.

tests/interop/test_diffusers.py has the plain AutoencoderKL.
"""

import json
from pathlib import Path
from typing import Any

import diffusers as library
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.tensors import assert_close, normal
from sfumato.checkpoints.formats.folder import WEIGHTS, load_part, save_part
from sfumato.compress.base import registered as autoencoders
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.compress.kl_flux2 import KLFlux2Config
from sfumato.compress.tiny import TinyConfig
from sfumato.compress.vq import VQConfig

diffusers: Any = library  # its classes are loaded by name, which type checkers cannot follow


@pytest.fixture(autouse=True)
def weights() -> None:
    """Draw the weights of layers from torch's own generator, seeded anew.

    They are the same in every run, whatever ran before.
    """
    torch.manual_seed(0)


def randomise(network: Any, seed: int = 0) -> Any:
    """Norms start at 1 and 0, and statistics too, where mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "embedding" in name:
                # codes that lie among the latents
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in network.named_buffers():
            if name == "bn.running_mean":
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name == "bn.running_var":
                buffer.copy_(0.01 + torch.rand(buffer.shape, generator=generator))
            elif name == "bn.num_batches_tracked":
                buffer.fill_(123457)
    return network.eval().requires_grad_(False)


def norms(network: nn.Module) -> dict[str, Any]:
    """Epsilons and groups by name: 1e-6 for 1e-5 would not show in an output whose variance is
    1.
    """
    return {
        k: (m.eps, m.num_groups) for k, m in network.named_modules() if isinstance(m, nn.GroupNorm)
    }


def patchify(cells: Tensor) -> Tensor:
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    return Flux2Pipeline._patchify_latents(cells)


def unpatchify(packed: Tensor) -> Tensor:
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    return Flux2Pipeline._unpatchify_latents(packed)


SMALL = {"layers_per_block": 1, "norm_num_groups": 2, "sample_size": 16}
NEAR, FAR = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, FAR_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
PLAIN2 = {"down_block_types": (NEAR,) * 2, "up_block_types": (UP,) * 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl-f16's levels": (
        "AutoencoderKL",
        SMALL
        | {
            "block_out_channels": (4, 6, 8),
            "down_block_types": (NEAR, NEAR, FAR),
            "up_block_types": (FAR_UP, UP, UP),
        },
    ),
    "attention at different levels": (
        "AutoencoderKL",
        SMALL
        | {
            "block_out_channels": (4, 8),
            "down_block_types": (FAR, NEAR),
            "up_block_types": (UP, FAR_UP),
            "layers_per_block": 2,
        },
    ),
    "flux2": (
        "AutoencoderKLFlux2",
        SMALL | PLAIN2 | {"block_out_channels": (4, 8), "latent_channels": 3},
    ),
    "flux2's small decoder": (
        "AutoencoderKLFlux2",
        SMALL
        | PLAIN2
        | {
            "block_out_channels": (4, 8),
            "decoder_block_out_channels": (2, 4),
            "latent_channels": 2,
            "batch_norm_eps": 0.03,
        }
        | {"use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "taesd": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8,) * 4,
            "decoder_block_out_channels": (6,) * 4,
            "latent_channels": 4,
        },
    ),
    "tiny with two levels": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "latent_channels": 5,
            "in_channels": 1,
        }
        | {
            "out_channels": 1,
            "num_encoder_blocks": (2, 0),
            "num_decoder_blocks": (1, 2),
            "scaling_factor": 1.25,
            "shift_factor": 0.5,
        },
    ),
    "vq-f4": (
        "VQModel",
        SMALL
        | {
            "block_out_channels": (4, 4, 8),
            "down_block_types": (NEAR,) * 3,
            "up_block_types": (UP,) * 3,
        }
        | {"num_vq_embeddings": 50, "latent_channels": 3, "scaling_factor": 1.3},
    ),
    "vq-f8's levels": (
        "VQModel",
        SMALL
        | {
            "block_out_channels": (4, 4, 4, 8),
            "down_block_types": (NEAR, NEAR, NEAR, FAR),
            "up_block_types": (FAR_UP, UP, UP, UP),
        }
        | {
            "num_vq_embeddings": 30,
            "latent_channels": 4,
            "vq_embed_dim": 2,
            "mid_block_add_attention": False,
            "lookup_from_codebook": True,
        },
    ),
}


def encoded(peer: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of raw latents, in the layout of their denoisers."""
    result = peer.encode(image)
    if hasattr(result, "latents"):
        return result.latents, torch.zeros_like(result.latents)
    mean, std = result.latent_dist.mean, result.latent_dist.std
    return (patchify(mean), patchify(std)) if hasattr(peer, "bn") else (mean, std)


def decoded(peer: Any, raw: Tensor) -> Tensor:
    return peer.decode(unpatchify(raw) if hasattr(peer, "bn") else raw).sample


def same(autoencoder: Any, peer: Any) -> None:
    """Equal keys, norms, moments and pictures, of the latent of a picture and of any other."""
    assert autoencoder.state_dict().keys() == peer.state_dict().keys() and norms(
        autoencoder
    ) == norms(peer)
    for key, tensor in peer.state_dict().items():
        assert (
            torch.equal(autoencoder.state_dict()[key], tensor)
            and autoencoder.state_dict()[key].dtype == tensor.dtype
        ), key
    image = normal(2, autoencoder.channels, 64, 32)
    mean, std = encoded(peer, image)
    result = autoencoder.posterior(image)
    assert (result.mean.shape[1], 64 // result.mean.shape[2]) == (
        autoencoder.space.channels,
        autoencoder.space.factor,
    )
    assert_close(result.mean, mean)
    torch.testing.assert_close(result.std, std, rtol=1e-5, atol=0)
    assert_close(autoencoder.reconstruct(result.mean), decoded(peer, mean))
    noise = 2 * normal(*mean.shape, seed=1)
    assert_close(autoencoder.reconstruct(noise), decoded(peer, noise))


def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    kind, values = FAMILIES[name]
    network, config = autoencoders()[kind]
    return network, config, values


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_in_both_directions_through_folders(name: str, tmp_path: Path) -> None:
    network, config, values = pair(name)
    kind: Any = getattr(diffusers, FAMILIES[name][0])
    autoencoder = randomise(network(config.from_dict(values)))
    save_part(tmp_path / "sfumato", autoencoder)
    same(autoencoder, kind.from_pretrained(tmp_path / "sfumato"))
    peer = randomise(kind(**values), seed=1)
    peer.save_pretrained(tmp_path / "diffusers")
    loaded: Any = load_part(tmp_path / "diffusers", FAMILIES[name][0])
    same(loaded, peer)
    assert loaded.config == autoencoder.config
    written, read = (
        json.loads((tmp_path / k / "config.json").read_text()) for k in ("sfumato", "diffusers")
    )
    # AutoencoderTiny notes these by itself
    keys = read.keys() - {"block_out_channels"} if name.startswith("t") else read.keys()
    assert {k: written.get(k) for k in keys if not k.startswith("_d")} == {
        k: read[k] for k in keys if not k.startswith("_d")
    }
    assert not written.keys() - read.keys(), "a field that they do not know"


@torch.inference_mode()
def test_flux2_standardises_as_its_pipeline_does(tmp_path: Path) -> None:
    """Its lines: (patchify(mean) - running_mean) / sqrt(running_var + eps), and back."""
    values = FAMILIES["flux2"][1]
    peer: Any = randomise(diffusers.AutoencoderKLFlux2(**values))
    peer.save_pretrained(tmp_path)
    autoencoder: Any = load_part(tmp_path)
    image = normal(2, 3, 32, 16)
    mean, std = (
        peer.bn.running_mean.view(1, -1, 1, 1),
        torch.sqrt(peer.bn.running_var.view(1, -1, 1, 1) + peer.config.batch_norm_eps),
    )
    expected = (patchify(peer.encode(image).latent_dist.mode()) - mean) / std
    z = autoencoder.encode(image)
    assert_close(z, expected)
    assert_close(autoencoder.decode(z), peer.decode(unpatchify(expected * std + mean)).sample)
    assert_close(
        z,
        torch.nn.functional.batch_norm(
            patchify(peer.encode(image).latent_dist.mode()),
            peer.bn.running_mean,
            peer.bn.running_var,
            eps=1e-4,
        ),
    )
    autoencoder.set_statistics(
        tuple(torch.linspace(-1, 1, 12).tolist()), tuple(torch.linspace(0.5, 2, 12).tolist())
    )
    torch.testing.assert_close(torch.tensor(autoencoder.space.std), torch.linspace(0.5, 2, 12))
    save_part(tmp_path / "again", autoencoder, torch.float16)
    halves: Any = diffusers.AutoencoderKLFlux2.from_pretrained(
        tmp_path / "again", torch_dtype=torch.float16
    )
    batches = halves.bn.num_batches_tracked
    assert batches.dtype == torch.int64 and int(batches) == 123457  # float16 has no such number
    torch.testing.assert_close(
        halves.bn.running_mean.float(), torch.linspace(-1, 1, 12), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["vq-f4", "vq-f8's levels"])
@torch.inference_mode()
def test_codes_equal_diffusers(name: str) -> None:
    network, config, values = pair(name)
    peer: Any = randomise(diffusers.VQModel(**values))
    image = normal(3, 3, 64, 32)
    h = peer.encode(image).latents
    # codes among the cells, so that most are the nearest of a cell
    count = values["num_vq_embeddings"]
    peer.quantize.embedding.weight.copy_(
        h.movedim(1, -1).flatten(0, -2)[:count] + 0.1 * h.std() * normal(count, h.shape[1])
    )
    autoencoder = network(config.from_dict(values))
    autoencoder.load_state_dict(peer.state_dict())
    autoencoder.eval()
    quantised, _, (_, _, indices) = peer.quantize(h)
    codes = autoencoder.codes(image)
    assert torch.equal(codes.flatten(), indices) and len(codes.unique()) > count / 2
    assert_close(autoencoder.quantize(h), quantised)
    shape = (3, *h.shape[2:], h.shape[1])
    entries = (
        indices
        if peer.config.lookup_from_codebook
        else peer.quantize.get_codebook_entry(indices, shape)
    )
    assert_close(
        autoencoder.from_codes(codes),
        peer.decode(entries, force_not_quantize=True, shape=shape).sample,
    )
    assert_close(autoencoder.from_codes(codes), autoencoder.reconstruct(h))


# ---- old names and published configs -------------------------------------------------------------

RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("name", ["kl-f16's levels", "vq-f8's levels", "flux2"])
@torch.inference_mode()
def test_old_names_of_attention(name: str, tmp_path: Path) -> None:
    """Both libraries rename them when they open the file."""
    network, config, values = pair(name)
    autoencoder = randomise(network(config.from_dict(values | {"mid_block_add_attention": True})))
    save_part(tmp_path, autoencoder)
    tensors = load_file(tmp_path / WEIGHTS)
    old = dict(tensors)
    for new, before in RENAMED.items():
        old = {k.replace(f".{new}.", f".{before}."): v for k, v in old.items()}
    assert sum(k not in tensors for k in old) >= 16
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    same(load_part(tmp_path), getattr(diffusers, FAMILIES[name][0]).from_pretrained(tmp_path))
    assert all(torch.equal(v, tensors[k]) for k, v in load_part(tmp_path).state_dict().items())


FOUR = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": [NEAR] * 4,
    "up_block_types": [UP] * 4,
    "act_fn": "silu",
}
FOUR |= {"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32}
NULLS = {
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "_name_or_path": "somewhere",
}
SIXTEEN = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
    "mid_block_add_attention": True,
}
LDM = {
    "block_out_channels": [128, 128, 256, 256, 512],
    "down_block_types": [NEAR] * 4 + [FAR],
    "up_block_types": [FAR_UP] + [UP] * 4,
}
TINY4 = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64] * 4,
    "decoder_block_out_channels": [64] * 4,
}
TINY4 |= {
    "block_out_channels": [64] * 4,
    "act_fn": "relu",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
}
TINY4 |= {
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "force_upcast": False,
    "scaling_factor": 1.0,
}
# The fields that published folders hold, and the first channel's mean and std of the raw latent.
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "SD 1": (
        FOUR | {"_class_name": "AutoencoderKL", "latent_channels": 4, "sample_size": 512},
        0.0,
        1 / 0.18215,
    ),
    "SD 2": (
        FOUR
        | {
            "_class_name": "AutoencoderKL",
            "latent_channels": 4,
            "sample_size": 768,
            "scaling_factor": 0.18215,
        },
        0.0,
        1 / 0.18215,
    ),
    "SDXL": (
        FOUR
        | NULLS
        | {
            "_class_name": "AutoencoderKL",
            "latent_channels": 4,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
        },
        0.0,
        1 / 0.13025,
    ),
    "SD3": (
        FOUR
        | NULLS
        | SIXTEEN
        | {"_class_name": "AutoencoderKL", "scaling_factor": 1.5305, "shift_factor": 0.0609},
        0.0609,
        1 / 1.5305,
    ),
    "FLUX.1": (
        FOUR
        | NULLS
        | SIXTEEN
        | {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159},
        0.1159,
        1 / 0.3611,
    ),
    "Playground 2.5": (
        FOUR
        | {
            "_class_name": "AutoencoderKL",
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        }
        | {"latents_std": [8.4927, 5.9022, 6.5498, 5.2299]},
        -1.6574,
        8.4927 / 0.5,
    ),
    "kl-f16": (
        FOUR | LDM | {"_class_name": "AutoencoderKL", "latent_channels": 16},
        0.0,
        1 / 0.18215,
    ),
    "FLUX.2": (
        FOUR
        | {
            "_class_name": "AutoencoderKLFlux2",
            "latent_channels": 32,
            "batch_norm_eps": 1e-4,
            "batch_norm_momentum": 0.1,
        }
        | {
            "patch_size": [2, 2],
            "force_upcast": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "sample_size": 1024,
        },
        0.0,
        1.0,
    ),
    "TAESD": (TINY4 | {"_class_name": "AutoencoderTiny", "latent_channels": 4}, 0.0, 1.0),
    "TAEF1": (
        TINY4
        | {
            "_class_name": "AutoencoderTiny",
            "latent_channels": 16,
            "shift_factor": 0.0,
            "upsample_fn": "nearest",
        },
        0.0,
        1.0,
    ),
    "VQ-f4": (
        FOUR
        | {
            "_class_name": "VQModel",
            "block_out_channels": [128, 256, 512],
            "down_block_types": [NEAR] * 3,
            "up_block_types": [UP] * 3,
        }
        | {
            "latent_channels": 3,
            "num_vq_embeddings": 8192,
            "vq_embed_dim": None,
            "sample_size": 256,
        },
        0.0,
        1 / 0.18215,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    """Full size, without weights: the same keys and shapes.

    The statistics are those that diffusers' pipelines use.
    """
    values, mean, std = PUBLISHED[name]
    network, config = autoencoders()[values["_class_name"]]
    with torch.device("meta"):
        autoencoder: Any = network(config.from_dict(values))
        peer: Any = getattr(diffusers, values["_class_name"]).from_config(values)
    assert {k: v.shape for k, v in autoencoder.state_dict().items()} == {
        k: v.shape for k, v in peer.state_dict().items()
    }
    assert (autoencoder.space.mean[0], autoencoder.space.std[0]) == pytest.approx((mean, std))
    assert config.from_dict(json.loads(json.dumps(autoencoder.to_config()))) == autoencoder.config


def test_statistics_round_trip_through_files() -> None:
    """diffusers' SDXL pipeline takes raw = z latents_std / scaling_factor + latents_mean."""
    autoencoder = AutoencoderKL(
        KLConfig(
            block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2, scaling_factor=0.5
        )
    )
    autoencoder.set_statistics((0.5, 1.0), (2.0, 3.0))
    for config in (
        autoencoder.config,
        KLConfig(
            latent_channels=2, scaling_factor=0.5, latents_mean=(0.5, 1.0), latents_std=(2.0, 3.0)
        ),
    ):
        written = json.loads(json.dumps(config.to_dict()))
        assert (
            [s / written["scaling_factor"] for s in written["latents_std"]]
            == [2.0, 3.0]
            == list(config.space.std)
        )
        assert KLConfig.from_dict(written).space == config.space


def test_defaults_equal_diffusers() -> None:
    """A field that a folder leaves out has the default of diffusers."""
    import inspect

    for name, config in (("AutoencoderKLFlux2", KLFlux2Config), ("AutoencoderTiny", TinyConfig)):
        reference = {
            k: v.default
            for k, v in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
            if k != "self"
        }
        actual = config().to_dict()
        assert {k: actual[k] for k in reference} == {
            k: list(v) if k.endswith("_types") else v for k, v in reference.items()
        }
    reference = {
        k: v.default
        for k, v in inspect.signature(diffusers.VQModel.__init__).parameters.items()
        if k != "self"
    }
    # one level is refused
    levels = {
        "block_out_channels": (64, 64),
        "down_block_types": (NEAR,) * 2,
        "up_block_types": (UP,) * 2,
    }
    actual = VQConfig.from_dict(dict(levels)).to_dict()
    assert {k: actual[k] for k in reference if k not in levels} == {
        k: v for k, v in reference.items() if k not in levels
    }
