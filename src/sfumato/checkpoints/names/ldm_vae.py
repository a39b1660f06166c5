"""AutoencoderKL and VQModel <-> `first_stage_model.*`, the autoencoders of Latent Diffusion
(Rombach et al. 2022, arXiv:2112.10752, 3.1).

Their decoder counts levels from the image (up.0 is the last to run), ours from the latent. Their
attention is made of 1x1 convolutions, ours of matrices. VQModel (van den Oord et al. 2017,
arXiv:1711.00937) adds the codebook.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Form, Row, pair, row
from sfumato.errors import UserError

DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
Config = Mapping[str, Any]


def quantised(config: Config) -> bool:
    """Whether the config is a VQModel's."""
    return config.get("_class_name") == "VQModel" or "num_vq_embeddings" in config


def vae_rows(config: Config) -> list[Row]:
    """The whole table for diffusers' config fields, without the prefix `first_stage_model.`;
    `UserError` for what has no name there.
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


def _vae(config: Config, attends: list[bool]) -> Iterator[Row]:
    widths, latent, vq = (
        list(config["block_out_channels"]),
        config["latent_channels"],
        quantised(config),
    )
    code = config.get("vq_embed_dim") or latent
    moments, quantum = (latent, code) if vq else (2 * latent, 2 * latent)
    last, layers, middle = (
        len(widths) - 1,
        config["layers_per_block"],
        config.get("mid_block_add_attention", True),
    )
    yield from pair("encoder.conv_in", "encoder.conv_in", widths[0], config["in_channels"], 3, 3)
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
            yield from pair(
                f"encoder.down.{level}.downsample.conv",
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
                width,
                width,
                3,
                3,
            )
        channels = width
    yield from _middle("encoder", channels, middle)
    yield from pair("encoder.norm_out", "encoder.conv_norm_out", channels)
    yield from pair("encoder.conv_out", "encoder.conv_out", moments, channels, 3, 3)
    if vq or config.get("use_quant_conv", True):
        yield from pair("quant_conv", "quant_conv", quantum, moments, 1, 1)
    if vq:
        yield row(
            "quantize.embedding.weight",
            "quantize.embedding.weight",
            config["num_vq_embeddings"],
            code,
        )
    if vq or config.get("use_post_quant_conv", True):
        yield from pair("post_quant_conv", "post_quant_conv", latent, code, 1, 1)
    yield from pair("decoder.conv_in", "decoder.conv_in", channels, latent, 3, 3)
    yield from _middle("decoder", channels, middle)
    for level in reversed(range(len(widths))):
        width, ours = widths[level], f"decoder.up_blocks.{last - level}"
        yield from _level(f"decoder.up.{level}", ours, channels, width, layers + 1, attends[level])
        if level:
            yield from pair(
                f"decoder.up.{level}.upsample.conv", f"{ours}.upsamplers.0.conv", width, width, 3, 3
            )
        channels = width
    yield from pair("decoder.norm_out", "decoder.conv_norm_out", channels)
    yield from pair("decoder.conv_out", "decoder.conv_out", config["out_channels"], channels, 3, 3)


def _level(
    theirs: str, ours: str, channels: int, width: int, layers: int, attends: bool
) -> Iterator[Row]:
    for layer in range(layers):
        yield from _resnet(
            f"{theirs}.block.{layer}",
            f"{ours}.resnets.{layer}",
            width if layer else channels,
            width,
        )
        if attends:
            yield from _attention(f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}", width)


def _middle(half: str, channels: int, attends: bool) -> Iterator[Row]:
    for k in (1, 2):
        yield from _resnet(
            f"{half}.mid.block_{k}", f"{half}.mid_block.resnets.{k - 1}", channels, channels
        )
    if attends:
        yield from _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", channels)


def _resnet(theirs: str, ours: str, channels: int, width: int) -> Iterator[Row]:
    for k, wide in ((1, channels), (2, width)):
        yield from pair(f"{theirs}.norm{k}", f"{ours}.norm{k}", wide)
        yield from pair(f"{theirs}.conv{k}", f"{ours}.conv{k}", width, wide, 3, 3)
    if channels != width:
        yield from pair(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut", width, channels, 1, 1)


def _attention(theirs: str, ours: str, width: int) -> Iterator[Row]:
    yield from pair(f"{theirs}.norm", f"{ours}.group_norm", width)
    for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield row(f"{theirs}.{a}.weight", f"{ours}.{b}.weight", width, width, form=Form.POINT)
        yield row(f"{theirs}.{a}.bias", f"{ours}.{b}.bias", width)
