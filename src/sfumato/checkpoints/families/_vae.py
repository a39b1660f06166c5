"""AutoencoderKL and VQModel inside single files: the autoencoders of Latent Diffusion.

Rombach et al. 2022, arXiv:2112.10752, section 3.1. The original decoder counts levels from the
image (up.0 is the last to run), diffusers' from the latent. The original attention is made of 1x1
convolutions, diffusers' of matrices. VQModel (van den Oord et al. 2017, arXiv:1711.00937) adds the
codebook.
"""

from collections.abc import Iterator
from typing import Any

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import Conv1x1, WeightMap, linear, weight
from sfumato.errors import UserError

STANDARD: dict[str, Any] = {"act_fn": "silu", "norm_num_groups": 32}
KL_STANDARD: dict[str, Any] = {"shift_factor": None, "latents_mean": None, "latents_std": None}
VQ_STANDARD: dict[str, Any] = {"norm_type": "group", "lookup_from_codebook": False}
"""What the original layout stands for, in diffusers' fields."""
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def is_quantized(config: Config) -> bool:
    """Whether the config is a VQModel's."""
    return config.get("_class_name") == "VQModel" or "num_vq_embeddings" in config


def vae_config(shapes: Shapes, scaling_factor: float, sample_size: int = 512) -> dict[str, Any]:
    """diffusers' config of the autoencoder below the prefix: AutoencoderKL, or VQModel where there
    is a codebook.
    """
    levels = shapes.count("encoder.down.")
    if not levels:
        raise UserError(
            f"{shapes.where} lacks {shapes.prefix}encoder.down.*: an autoencoder without its encoder is not supported"
        )
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
        codes = {axis: shapes.size("quantize.embedding.weight", axis, 2) for axis in (0, 1)}
        return config | {"num_vq_embeddings": codes[0], "vq_embed_dim": codes[1], **VQ_STANDARD}
    return (
        config
        | KL_STANDARD
        | {
            "use_quant_conv": shapes.has("quant_conv."),
            "use_post_quant_conv": shapes.has("post_quant_conv."),
        }
    )


def vae_map(config: Config) -> list[WeightMap]:
    """The table for diffusers' config fields, without prefix; `UserError` for what has no name
    there.
    """
    n = len(config["block_out_channels"])
    down = config.get("down_block_types", ["DownEncoderBlock2D"] * n)
    up = config.get("up_block_types", ["UpDecoderBlock2D"] * n)
    kinds = [k for k in down if k not in DOWN] + [k for k in up if k not in UP]
    if kinds:
        raise UserError(
            f"block type {kinds[0]!r} has no name in the original layout: expected one of {', '.join((*DOWN, *UP))}"
        )
    if (len(down), len(up)) != (n, n) or [DOWN[k] for k in down] != [UP[k] for k in up][::-1]:
        raise UserError(
            "an autoencoder whose up_block_types are not the reverse of its down_block_types has no name in the original layout"
        )
    return list(_vae(config, [DOWN[k] for k in down]))


def _vae(config: Config, attends: list[bool]) -> Iterator[WeightMap]:
    widths, latent, vq = (
        list(config["block_out_channels"]),
        config["latent_channels"],
        is_quantized(config),
    )
    code = config.get("vq_embed_dim") or latent
    moments, quantum = (latent, code) if vq else (2 * latent, 2 * latent)
    last, layers, middle = (
        len(widths) - 1,
        config["layers_per_block"],
        config.get("mid_block_add_attention", True),
    )
    yield from linear("encoder.conv_in", "encoder.conv_in", widths[0], config["in_channels"], 3, 3)
    channels = widths[0]
    for level, width in enumerate(widths):
        yield from _level(
            f"encoder.down.{level}",
            f"encoder.down_blocks.{level}",
            channels,
            width,
            layers,
            attends[level],
        )
        if level < last:
            yield from linear(
                f"encoder.down.{level}.downsample.conv",
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
                width,
                width,
                3,
                3,
            )
        channels = width
    yield from _middle("encoder", channels, middle)
    yield from linear("encoder.norm_out", "encoder.conv_norm_out", channels)
    yield from linear("encoder.conv_out", "encoder.conv_out", moments, channels, 3, 3)
    if vq or config.get("use_quant_conv", True):
        yield from linear("quant_conv", "quant_conv", quantum, moments, 1, 1)
    if vq:
        yield weight(
            "quantize.embedding.weight",
            "quantize.embedding.weight",
            config["num_vq_embeddings"],
            code,
        )
    if vq or config.get("use_post_quant_conv", True):
        yield from linear("post_quant_conv", "post_quant_conv", latent, code, 1, 1)
    yield from linear("decoder.conv_in", "decoder.conv_in", channels, latent, 3, 3)
    yield from _middle("decoder", channels, middle)
    for level in reversed(range(len(widths))):
        width, target = widths[level], f"decoder.up_blocks.{last - level}"
        yield from _level(
            f"decoder.up.{level}", target, channels, width, layers + 1, attends[level]
        )
        if level:
            yield from linear(
                f"decoder.up.{level}.upsample.conv",
                f"{target}.upsamplers.0.conv",
                width,
                width,
                3,
                3,
            )
        channels = width
    yield from linear("decoder.norm_out", "decoder.conv_norm_out", channels)
    yield from linear(
        "decoder.conv_out", "decoder.conv_out", config["out_channels"], channels, 3, 3
    )


def _level(
    source: str, target: str, channels: int, width: int, layers: int, attends: bool
) -> Iterator[WeightMap]:
    for layer in range(layers):
        yield from _resnet(
            f"{source}.block.{layer}",
            f"{target}.resnets.{layer}",
            width if layer else channels,
            width,
        )
        if attends:
            yield from _attention(f"{source}.attn.{layer}", f"{target}.attentions.{layer}", width)


def _middle(half: str, channels: int, attends: bool) -> Iterator[WeightMap]:
    for k in (1, 2):
        yield from _resnet(
            f"{half}.mid.block_{k}", f"{half}.mid_block.resnets.{k - 1}", channels, channels
        )
    if attends:
        yield from _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", channels)


def _resnet(source: str, target: str, channels: int, width: int) -> Iterator[WeightMap]:
    for k, wide in ((1, channels), (2, width)):
        yield from linear(f"{source}.norm{k}", f"{target}.norm{k}", wide)
        yield from linear(f"{source}.conv{k}", f"{target}.conv{k}", width, wide, 3, 3)
    if channels != width:
        yield from linear(
            f"{source}.nin_shortcut", f"{target}.conv_shortcut", width, channels, 1, 1
        )


def _attention(source: str, target: str, width: int) -> Iterator[WeightMap]:
    yield from linear(f"{source}.norm", f"{target}.group_norm", width)
    for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield weight(f"{source}.{a}.weight", f"{target}.{b}.weight", width, width, op=Conv1x1())
        yield weight(f"{source}.{a}.bias", f"{target}.{b}.bias", width)
