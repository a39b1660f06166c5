"""AutoencoderKL and VQModel inside single files: the autoencoders of Latent Diffusion.

Rombach et al. 2022, arXiv:2112.10752, section 3.1. The original decoder counts levels from the
image (up.0 is the last to run), diffusers' from the latent. The original attention is made of 1x1
convolutions, diffusers' of matrices. VQModel (van den Oord et al. 2017, arXiv:1711.00937) adds the
codebook.
"""

from collections.abc import Iterator
from typing import Any

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._layers import attending_levels, below, listed
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import Conv1x1, WeightMap, linear, weight

STANDARD: dict[str, Any] = {"act_fn": "silu", "norm_num_groups": 32}
KL_STANDARD: dict[str, Any] = {"shift_factor": None, "latents_mean": None, "latents_std": None}
VQ_STANDARD: dict[str, Any] = {"norm_type": "group", "lookup_from_codebook": False}
"""Diffusers' fields that are the same for all files of the original layout."""
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def is_quantized(config: Config) -> bool:
    """True for a VQModel's config."""
    return config.get("_class_name") == "VQModel" or "num_vq_embeddings" in config


def vae_config(shapes: Shapes, scaling_factor: float, sample_size: int = 512) -> dict[str, Any]:
    """The config of the autoencoder below the prefix: a VQModel's where there is a codebook.

    Args:
        shapes: Of the file's tensors.
        scaling_factor: Of latents.
        sample_size: The side of images that it was trained at.

    Raises:
        UserError: A decoder alone.
    """
    levels = shapes.count("encoder.down.")
    if not levels:
        raise shapes.error("an autoencoder without its encoder (encoder.down.*) is not supported")
    down = [
        "AttnDownEncoderBlock2D" if shapes.has(f"encoder.down.{k}.attn.") else "DownEncoderBlock2D"
        for k in range(levels)
    ]
    vq = shapes.has("quantize.")
    moments = shapes.size("encoder.conv_out.bias")
    config: dict[str, Any] = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        **STANDARD,
        "in_channels": shapes.size("encoder.conv_in.weight", 1, 4),
        "out_channels": shapes.size("decoder.conv_out.bias"),
        "down_block_types": down,
        "up_block_types": [k.replace("DownEncoder", "UpDecoder") for k in reversed(down)],
        "block_out_channels": [
            shapes.size(f"encoder.down.{k}.block.0.norm2.weight") for k in range(levels)
        ],
        "layers_per_block": shapes.count("encoder.down.0.block."),
        "latent_channels": moments if vq else moments // 2,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "mid_block_add_attention": shapes.has("encoder.mid.attn_1."),
    }
    if vq:
        entries, width = (shapes.size("quantize.embedding.weight", axis, 2) for axis in (0, 1))
        return config | {"num_vq_embeddings": entries, "vq_embed_dim": width, **VQ_STANDARD}
    convs = {f"use_{name}": shapes.has(f"{name}.") for name in ("quant_conv", "post_quant_conv")}
    return config | KL_STANDARD | convs


@listed
def vae_map(config: Config) -> Iterator[WeightMap]:
    """The table for diffusers' config fields, without prefix.

    Raises:
        UserError: A config that has no names in the original layout.
    """
    n = len(config["block_out_channels"])
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }
    attends = attending_levels(kinds | dict(config), DOWN, UP)
    widths, latent = config["block_out_channels"], config["latent_channels"]
    vq = is_quantized(config)
    code = config.get("vq_embed_dim") or latent
    moments, quantum = (latent, code) if vq else (2 * latent, 2 * latent)
    inputs, outputs, channels = config["in_channels"], config["out_channels"], widths[-1]
    layers, middle = config["layers_per_block"], config.get("mid_block_add_attention", True)
    levels = list(zip(range(n), widths, attends, strict=True))
    yield from linear("encoder.conv_in", "encoder.conv_in", widths[0], inputs, 3, 3)
    yield from below("encoder", "encoder", _levels("down", levels, widths[0], layers))
    yield from below("encoder.mid", "encoder.mid_block", _middle(channels, middle))
    yield from linear("encoder.norm_out", "encoder.conv_norm_out", channels)
    yield from linear("encoder.conv_out", "encoder.conv_out", moments, channels, 3, 3)
    if vq or config.get("use_quant_conv", True):
        yield from linear("quant_conv", "quant_conv", quantum, moments, 1, 1)
    if vq:
        codebook, entries = "quantize.embedding.weight", config["num_vq_embeddings"]
        yield weight(codebook, codebook, entries, code)
    if vq or config.get("use_post_quant_conv", True):
        yield from linear("post_quant_conv", "post_quant_conv", latent, code, 1, 1)
    yield from linear("decoder.conv_in", "decoder.conv_in", channels, latent, 3, 3)
    yield from below("decoder.mid", "decoder.mid_block", _middle(channels, middle))
    yield from below("decoder", "decoder", _levels("up", levels[::-1], channels, layers + 1))
    yield from linear("decoder.norm_out", "decoder.conv_norm_out", widths[0])
    yield from linear("decoder.conv_out", "decoder.conv_out", outputs, widths[0], 3, 3)


def _levels(
    way: str, levels: list[tuple[int, int, bool]], channels: int, layers: int
) -> Iterator[WeightMap]:
    """The levels of one half in the order in which they run: (number, width, attends)."""
    for k, (level, width, attends) in enumerate(levels):
        source, target = f"{way}.{level}", f"{way}_blocks.{k}"
        yield from below(source, target, _level(channels, width, layers, attends))
        if k < len(levels) - 1:
            steps = f"{source}.{way}sample.conv", f"{target}.{way}samplers.0.conv"
            yield from linear(*steps, width, width, 3, 3)
        channels = width


def _level(channels: int, width: int, layers: int, attends: bool) -> Iterator[WeightMap]:
    for k in range(layers):
        inputs = width if k else channels
        yield from below(f"block.{k}", f"resnets.{k}", _resnet(inputs, width))
        if attends:
            yield from below(f"attn.{k}", f"attentions.{k}", _attention(width))


def _middle(width: int, attends: bool) -> Iterator[WeightMap]:
    yield from below("block_1", "resnets.0", _resnet(width, width))
    yield from below("block_2", "resnets.1", _resnet(width, width))
    if attends:
        yield from below("attn_1", "attentions.0", _attention(width))


def _resnet(channels: int, width: int) -> Iterator[WeightMap]:
    for k, inputs in ((1, channels), (2, width)):
        yield from linear(f"norm{k}", f"norm{k}", inputs)
        yield from linear(f"conv{k}", f"conv{k}", width, inputs, 3, 3)
    if channels != width:
        yield from linear("nin_shortcut", "conv_shortcut", width, channels, 1, 1)


def _attention(width: int) -> Iterator[WeightMap]:
    yield from linear("norm", "group_norm", width)
    for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield weight(f"{a}.weight", f"{b}.weight", width, width, op=Conv1x1())
        yield weight(f"{a}.bias", f"{b}.bias", width)
