"""UNet2DConditionModel and UNet2DModel inside single files: the U-Net of Latent Diffusion.

Rombach et al. 2022, arXiv:2112.10752. The original counts blocks from input to output:
input_blocks.N is the first convolution (N = 0), a residual block (.0) with its transformer (.1), or
a step down (.0.op); output_blocks.N is a residual block (.0), its transformer (.1) and, at the end
of a level, a step up (.1 or .2). diffusers counts levels. The table follows from the config alone.
Projections are linear or 1x1 convolutions in both layouts alike.

Without tokens (UNet2DModel) .1 is plain attention: norm, one convolution for q, k and v, and one
behind. Its 3 C channels hold, head by head, q, k and v of the head ("legacy"), or with
`use_new_attention_order` all of q, then k, then v. A step down or up may be a residual block
(`resblock_updown`): input_blocks.N.0 as others, without attention, and output_blocks.N.1 or .2.
"""

from collections.abc import Iterator
from typing import Any

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._layers import (
    attending_levels,
    below,
    embedder,
    listed,
    matrix,
    unnamed,
)
from sfumato.checkpoints.weight_map import Chunk, Conv1d, WeightMap, linear, weight
from sfumato.predict.networks.unet_2d import OWN_CLASS

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
PLAIN_DOWN = {"DownBlock2D": False, "ResnetDownsampleBlock2D": False, "AttnDownBlock2D": True}
PLAIN_UP = {"UpBlock2D": False, "ResnetUpsampleBlock2D": False, "AttnUpBlock2D": True}
PLAIN = ("UNet2DModel", OWN_CLASS)


def is_plain(config: Config) -> bool:
    """True for the config of a U-Net without tokens."""
    return config.get("_class_name") in PLAIN


def at(config: Config, field: str, level: int, default: Any = None) -> Any:
    """A field that holds one value, or one a level."""
    value = config.get(field, default)
    return value[level] if isinstance(value, list | tuple) else value


def heads_at(config: Config, width: int) -> int:
    """The heads of attention at this width, in a U-Net without tokens."""
    head = config.get("attention_head_dim", 8) or width
    return config.get("num_attention_heads") or width // head


def _attending(config: Config) -> list[bool]:
    """For each level, True where it attends; `UserError` for a config without original names."""
    plain = is_plain(config)
    attends = attending_levels(config, *((PLAIN_DOWN, PLAIN_UP) if plain else (DOWN, UP)))
    middle = "UNetMidBlock2D" if plain else "UNetMidBlock2DCrossAttn"
    if config.get("mid_block_type", middle) != middle or not config.get("add_attention", True):
        raise unnamed(
            f"mid_block_type {config.get('mid_block_type')!r}", f"{middle} with attention"
        )
    if plain and len(set(_steps(config))) > 1:
        raise unnamed("a U-Net with residual blocks as some of its steps", "all of them, or none")
    return attends


def _steps(config: Config) -> list[bool]:
    """For each step down and up of a U-Net without tokens, True where it is a residual block."""
    last = len(config["block_out_channels"]) - 1
    return [
        kind.startswith("Resnet")
        or (kind.startswith("Attn") and config.get(f"{way}sample_type", "conv") == "resnet")
        for way in ("down", "up")
        for kind in config[f"{way}_block_types"][:last]
    ]


@listed
def unet_map(config: Config, new_order: bool = False) -> Iterator[WeightMap]:
    """The table for diffusers' config fields, without prefix.

    Args:
        config: Of a U-Net with or without tokens.
        new_order: The order of q, k and v, for U-Nets without tokens.

    Raises:
        UserError: A config that has no names in the original layout.
    """
    attending = _attending(config)
    if config.get("time_cond_proj_dim") is not None:
        raise unnamed(f"time_cond_proj_dim {config['time_cond_proj_dim']}", "null")
    by_block = is_plain(config) and any(_steps(config))
    widths = list(config["block_out_channels"])
    time, last = 4 * widths[0], len(widths) - 1
    yield from linear("time_embed.0", "time_embedding.linear_1", time, widths[0])
    yield from linear("time_embed.2", "time_embedding.linear_2", time, time)
    yield from _labels(config, time)
    yield from linear("input_blocks.0.0", "conv_in", widths[0], config["in_channels"], 3, 3)

    def block(
        source: str, target: str, layer: int, inputs: int, width: int, level: int | None
    ) -> Iterator[WeightMap]:
        """A residual block, and the attention after it."""
        resnet = _resnet(inputs, width, time, config)
        yield from below(f"{source}.0", f"{target}.resnets.{layer}", resnet)
        if level is None or attending[level]:
            attention = _attention(width, level, config, new_order)
            yield from below(f"{source}.1", f"{target}.attentions.{layer}", attention)

    def step(source: str, target: str, conv: str, width: int) -> Iterator[WeightMap]:
        """A step down or up: a convolution or a residual block."""
        if by_block:
            yield from below(source, target, _resnet(width, width, time, config))
        else:
            yield from linear(f"{source}.{conv}", f"{target}.conv", width, width, 3, 3)

    skips, channels = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        target = f"down_blocks.{level}"
        for layer in range(at(config, "layers_per_block", level)):
            yield from block(f"input_blocks.{len(skips)}", target, layer, channels, width, level)
            channels = width
            skips.append(width)
        if level < last:
            source = f"input_blocks.{len(skips)}.0"
            yield from step(source, f"{target}.downsamplers.0", "op", width)
            skips.append(width)
    yield from block("middle_block", "mid_block", 0, channels, channels, None)
    resnet = _resnet(channels, channels, time, config)
    yield from below("middle_block.2", "mid_block.resnets.1", resnet)
    count = 0
    for level in reversed(range(len(widths))):
        width, target = widths[level], f"up_blocks.{last - level}"
        for layer in range(at(config, "layers_per_block", level) + 1):
            inputs, source = channels + skips.pop(), f"output_blocks.{count}"
            yield from block(source, target, layer, inputs, width, level)
            channels, count = width, count + 1
        if level:
            source = f"output_blocks.{count - 1}.{2 if attending[level] else 1}"
            yield from step(source, f"{target}.upsamplers.0", "conv", width)
    yield from linear("out.0", "conv_norm_out", widths[0])
    yield from linear("out.2", "conv_out", config["out_channels"], widths[0], 3, 3)


def _labels(config: Config, time: int) -> Iterator[WeightMap]:
    """The layers that join the time embedding.

    They embed SDXL's pooled text and sizes, a vector of features, or classes or noise levels.
    """
    inputs = int(config.get("projection_class_embeddings_input_dim") or 0)
    addition, kind = config.get("addition_embed_type"), config.get("class_embed_type")
    if (addition, kind) in (("text_time", None), (None, "projection")):
        target = "add_embedding" if addition else "class_embedding"
        yield from embedder("label_emb.0", target, time, inputs, ("0", "2"))
    elif (addition, kind) != (None, None):
        raise unnamed(f"addition_embed_type {addition!r} with class_embed_type {kind!r}")
    elif config.get("num_class_embeds") is not None:
        yield weight("label_emb.weight", "class_embedding.weight", config["num_class_embeds"], time)


def _resnet(channels: int, width: int, time: int, config: Config) -> Iterator[WeightMap]:
    both = 2 if config.get("resnet_time_scale_shift", "default") == "scale_shift" else 1
    yield from linear("in_layers.0", "norm1", channels)
    yield from linear("in_layers.2", "conv1", width, channels, 3, 3)
    yield from linear("emb_layers.1", "time_emb_proj", both * width, time)
    yield from linear("out_layers.0", "norm2", width)
    yield from linear("out_layers.3", "conv2", width, width, 3, 3)
    if channels != width:
        yield from linear("skip_connection", "conv_shortcut", width, channels, 1, 1)


def _attention(
    width: int, level: int | None, config: Config, new_order: bool
) -> Iterator[WeightMap]:
    if not is_plain(config):
        return _transformer(width, level, config)
    return _plain_attention(width, 1 if new_order else heads_at(config, width))


def _plain_attention(width: int, heads: int) -> Iterator[WeightMap]:
    """Attention without tokens; `heads`: by which q, k and v are interleaved, see `Chunk`."""
    yield from linear("norm", "group_norm", width)
    for kind, shape, trailing in (("weight", (width, width), (1,)), ("bias", (width,), ())):
        targets = tuple(f"to_{a}.{kind}" for a in "qkv")
        yield WeightMap(f"qkv.{kind}", targets, shape, Chunk(trailing, heads))
    yield weight("proj_out.weight", "to_out.0.weight", width, width, op=Conv1d())
    yield weight("proj_out.bias", "to_out.0.bias", width)


def _transformer(width: int, level: int | None, config: Config) -> Iterator[WeightMap]:
    """A spatial transformer, whose inner names are the same in both layouts.

    `level` None is the middle, which is built as the last level.
    """
    point = () if config.get("use_linear_projection", False) else (1, 1)
    where = -1 if level is None else level
    tokens = at(config, "cross_attention_dim", where)
    if level is None:
        only = _middle_only(config)
    else:
        only = at(config, "only_cross_attention", level, False)
    yield from linear("norm", "norm", width)
    yield from linear("proj_in", "proj_in", width, width, *point)
    for k in range(at(config, "transformer_layers_per_block", where, 1)):
        block = f"transformer_blocks.{k}"
        yield from below(block, block, _transformer_block(width, tokens if only else width, tokens))
    yield from linear("proj_out", "proj_out", width, width, *point)


def _transformer_block(width: int, first: int, second: int) -> Iterator[WeightMap]:
    """A block; `first` and `second`: the widths to which its two attentions attend."""
    for name, inputs in (("attn1", first), ("attn2", second)):
        for layer, wide in (("to_q", width), ("to_k", inputs), ("to_v", inputs)):
            yield matrix(f"{name}.{layer}", f"{name}.{layer}", width, wide)
        yield from linear(f"{name}.to_out.0", f"{name}.to_out.0", width, width)
    yield from linear("ff.net.0.proj", "ff.net.0.proj", 8 * width, width)
    yield from linear("ff.net.2", "ff.net.2", width, 4 * width)
    for k in (1, 2, 3):
        yield from linear(f"norm{k}", f"norm{k}", width)


def _middle_only(config: Config) -> bool:
    """True where the middle attends to tokens alone.

    That is its own field, or else the one value that all levels share.
    """
    middle, only = (config.get(f"{part}only_cross_attention") for part in ("mid_block_", ""))
    return only is True if middle is None else middle
