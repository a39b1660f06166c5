"""UNet2DConditionModel <-> `model.diffusion_model.*`, the U-Net of Latent Diffusion (Rombach et al. 2022, arXiv:2112.10752).

Theirs counts blocks from input to output: input_blocks.N is the first convolution (N = 0), a residual block (.0) with its transformer (.1),
or a step down (.0.op); output_blocks.N is a residual block (.0), its transformer (.1) and, at the end of a level, a step up (.1 or .2).
Ours counts levels. The rows follow from the config alone. Linear and 1x1 projections are what they are in both.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Row, pair, row
from sfumato.errors import UserError

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
Config = Mapping[str, Any]


def at(config: Config, field: str, level: int, default: Any = None) -> Any:
    """A field that holds one value, or one a level."""
    value = config.get(field, default)
    return value[level] if isinstance(value, list | tuple) else value


def _refuse(config: Config) -> None:
    """`UserError` for what the original layout has no names for."""
    kinds = [k for k in config["down_block_types"] if k not in DOWN] + [k for k in config["up_block_types"] if k not in UP]
    if kinds:
        raise UserError(f"block type {kinds[0]!r} has no name in the original layout: expected one of {', '.join((*DOWN, *UP))}")
    n = len(config["block_out_channels"])
    if (len(config["down_block_types"]), len(config["up_block_types"])) != (n, n):
        raise UserError(f"a U-Net of {n} block_out_channels needs {n} down_block_types and {n} up_block_types")
    if [DOWN[k] for k in config["down_block_types"]] != [UP[k] for k in config["up_block_types"]][::-1]:
        raise UserError("up_block_types that are not the reverse of down_block_types have no name in the original layout")
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        raise UserError(f"mid_block_type {config['mid_block_type']!r} has no name in the original layout: expected UNetMidBlock2DCrossAttn")


def unet_rows(config: Config) -> list[Row]:
    """The whole table for diffusers' config fields, without the prefix `model.diffusion_model.`; `UserError` for what has no name there."""
    _refuse(config)
    return list(_unet(config))


def _unet(config: Config) -> Iterator[Row]:
    widths = list(config["block_out_channels"])
    time, last = 4 * widths[0], len(widths) - 1
    yield from pair("time_embed.0", "time_embedding.linear_1", time, widths[0])
    yield from pair("time_embed.2", "time_embedding.linear_2", time, time)
    yield from _labels(config, time)
    yield from pair("input_blocks.0.0", "conv_in", widths[0], config["in_channels"], 3, 3)
    skips, count, channels = [widths[0]], 1, widths[0]
    for level, width in enumerate(widths):
        for layer in range(at(config, "layers_per_block", level)):
            theirs, ours = f"input_blocks.{count}", f"down_blocks.{level}"
            yield from _resnet(f"{theirs}.0", f"{ours}.resnets.{layer}", channels, width, time, config)
            if DOWN[config["down_block_types"][level]]:
                yield from _transformer(f"{theirs}.1", f"{ours}.attentions.{layer}", width, level, config)
            channels, count = width, count + 1
            skips.append(width)
        if level < last:
            yield from pair(f"input_blocks.{count}.0.op", f"down_blocks.{level}.downsamplers.0.conv", width, width, 3, 3)
            count += 1
            skips.append(width)
    yield from _resnet("middle_block.0", "mid_block.resnets.0", channels, channels, time, config)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", channels, None, config)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", channels, channels, time, config)
    count = 0
    for level in reversed(range(len(widths))):
        width, ours, attends = widths[level], f"up_blocks.{last - level}", DOWN[config["down_block_types"][level]]
        for layer in range(at(config, "layers_per_block", level) + 1):
            theirs = f"output_blocks.{count}"
            yield from _resnet(f"{theirs}.0", f"{ours}.resnets.{layer}", channels + skips.pop(), width, time, config)
            if attends:
                yield from _transformer(f"{theirs}.1", f"{ours}.attentions.{layer}", width, level, config)
            channels, count = width, count + 1
        if level:
            step = f"output_blocks.{count - 1}.{2 if attends else 1}.conv"
            yield from pair(step, f"{ours}.upsamplers.0.conv", width, width, 3, 3)
    yield from pair("out.0", "conv_norm_out", widths[0])
    yield from pair("out.2", "conv_out", config["out_channels"], widths[0], 3, 3)


def _labels(config: Config, time: int) -> Iterator[Row]:
    """What joins the time embedding: SDXL's pooled text and sizes, a vector of features, or a table of classes or noise levels."""
    width = config.get("projection_class_embeddings_input_dim")
    addition, kind = config.get("addition_embed_type"), config.get("class_embed_type")
    if (addition, kind) in (("text_time", None), (None, "projection")):
        ours = "add_embedding" if addition else "class_embedding"
        yield from pair("label_emb.0.0", f"{ours}.linear_1", time, int(width or 0))
        yield from pair("label_emb.0.2", f"{ours}.linear_2", time, time)
    elif (addition, kind) != (None, None):
        raise UserError(f"addition_embed_type {addition!r} with class_embed_type {kind!r} has no name in the original layout")
    elif config.get("num_class_embeds") is not None:
        yield row("label_emb.weight", "class_embedding.weight", config["num_class_embeds"], time)


def _resnet(theirs: str, ours: str, channels: int, width: int, time: int, config: Config) -> Iterator[Row]:
    both = 2 if config.get("resnet_time_scale_shift", "default") == "scale_shift" else 1
    yield from pair(f"{theirs}.in_layers.0", f"{ours}.norm1", channels)
    yield from pair(f"{theirs}.in_layers.2", f"{ours}.conv1", width, channels, 3, 3)
    yield from pair(f"{theirs}.emb_layers.1", f"{ours}.time_emb_proj", both * width, time)
    yield from pair(f"{theirs}.out_layers.0", f"{ours}.norm2", width)
    yield from pair(f"{theirs}.out_layers.3", f"{ours}.conv2", width, width, 3, 3)
    if channels != width:
        yield from pair(f"{theirs}.skip_connection", f"{ours}.conv_shortcut", width, channels, 1, 1)


def _transformer(theirs: str, ours: str, width: int, level: int | None, config: Config) -> Iterator[Row]:
    """A spatial transformer; below its own name both layouts agree. `level` None is the middle, which is built as the last level."""
    point = () if config.get("use_linear_projection", False) else (1, 1)
    where = -1 if level is None else level
    context = at(config, "cross_attention_dim", where)
    only = at(config, "only_cross_attention", where, False) if level is not None else _middle_only(config)
    yield from pair(f"{theirs}.norm", f"{ours}.norm", width)
    yield from pair(f"{theirs}.proj_in", f"{ours}.proj_in", width, width, *point)
    for k in range(at(config, "transformer_layers_per_block", where, 1)):
        a, b = f"{theirs}.transformer_blocks.{k}", f"{ours}.transformer_blocks.{k}"
        for name, source in (("attn1", context if only else width), ("attn2", context)):
            yield row(f"{a}.{name}.to_q.weight", f"{b}.{name}.to_q.weight", width, width)
            yield row(f"{a}.{name}.to_k.weight", f"{b}.{name}.to_k.weight", width, source)
            yield row(f"{a}.{name}.to_v.weight", f"{b}.{name}.to_v.weight", width, source)
            yield from pair(f"{a}.{name}.to_out.0", f"{b}.{name}.to_out.0", width, width)
        yield from pair(f"{a}.ff.net.0.proj", f"{b}.ff.net.0.proj", 8 * width, width)
        yield from pair(f"{a}.ff.net.2", f"{b}.ff.net.2", width, 4 * width)
        for k_norm in (1, 2, 3):
            yield from pair(f"{a}.norm{k_norm}", f"{b}.norm{k_norm}", width)
    yield from pair(f"{theirs}.proj_out", f"{ours}.proj_out", width, width, *point)


def _middle_only(config: Config) -> bool:
    """Whether the middle attends to tokens alone: its own field, else the one value that all levels share."""
    only, middle = config.get("only_cross_attention", False), config.get("mid_block_only_cross_attention")
    return (only if isinstance(only, bool) else False) if middle is None else middle
