"""UNet2DConditionModel and UNet2DModel inside single files: the U-Net of Latent Diffusion.

Rombach et al. 2022, arXiv:2112.10752. The original counts blocks from input to output:
input_blocks.N is the first convolution (N = 0), a residual block (.0) with its transformer (.1), or
a step down (.0.op); output_blocks.N is a residual block (.0), its transformer (.1) and, at the end
of a level, a step up (.1 or .2). diffusers counts levels. The table follows from the config alone.
Linear and 1x1 projections are what they are in both.

Without tokens (UNet2DModel) .1 is plain attention: norm, one convolution for q, k and v, and one
behind. Its 3 C channels hold, head by head, q, k and v of the head ("legacy"), or with
`use_new_attention_order` all of q, then k, then v. A step down or up may be a residual block
(`resblock_updown`): input_blocks.N.0 as others, without attention, and output_blocks.N.1 or .2.
"""

from collections.abc import Iterator
from typing import Any

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.weight_map import Chunk, Conv1d, WeightMap, linear, weight
from sfumato.errors import UserError
from sfumato.predict.networks.unet_2d import OWN_CLASS

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
PLAIN_DOWN = {"DownBlock2D": False, "ResnetDownsampleBlock2D": False, "AttnDownBlock2D": True}
PLAIN_UP = {"UpBlock2D": False, "ResnetUpsampleBlock2D": False, "AttnUpBlock2D": True}
PLAIN = ("UNet2DModel", OWN_CLASS)


def is_plain(config: Config) -> bool:
    """Whether the config is of a U-Net without tokens."""
    return config.get("_class_name") in PLAIN


def at(config: Config, field: str, level: int, default: Any = None) -> Any:
    """A field that holds one value, or one a level."""
    value = config.get(field, default)
    return value[level] if isinstance(value, list | tuple) else value


def _refuse(config: Config) -> None:
    """`UserError` for what the original layout has no names for."""
    plain = is_plain(config)
    down, up = (PLAIN_DOWN, PLAIN_UP) if plain else (DOWN, UP)
    kinds = [k for k in config["down_block_types"] if k not in down] + [
        k for k in config["up_block_types"] if k not in up
    ]
    if kinds:
        raise UserError(
            f"block type {kinds[0]!r} has no name in the original layout: expected one of {', '.join((*down, *up))}"
        )
    n = len(config["block_out_channels"])
    if (len(config["down_block_types"]), len(config["up_block_types"])) != (n, n):
        raise UserError(
            f"a U-Net of {n} block_out_channels needs {n} down_block_types and {n} up_block_types"
        )
    if [down[k] for k in config["down_block_types"]] != [up[k] for k in config["up_block_types"]][
        ::-1
    ]:
        raise UserError(
            "up_block_types that are not the reverse of down_block_types have no name in the original layout"
        )
    middle = "UNetMidBlock2D" if plain else "UNetMidBlock2DCrossAttn"
    if config.get("mid_block_type", middle) != middle or not config.get("add_attention", True):
        raise UserError(
            f"mid_block_type {config.get('mid_block_type')!r} has no name in the original layout: expected {middle} with attention"
        )
    if plain and len(set(_steps(config))) > 1:
        raise UserError(
            "steps of which some are residual blocks have no name in the original layout: expected all of them, or none"
        )


def _steps(config: Config) -> list[bool]:
    """Of each step down and up of a U-Net without tokens, whether it is a residual block."""
    last = len(config["block_out_channels"]) - 1
    found = []
    for way in ("down", "up"):
        for kind in config[f"{way}_block_types"][:last]:
            own = kind.startswith("Attn") and config.get(f"{way}sample_type", "conv") == "resnet"
            found.append(own or kind.startswith("Resnet"))
    return found


def heads_at(config: Config, width: int) -> int:
    """How many heads the attention of a U-Net without tokens has where it is so wide."""
    return config.get("num_attention_heads") or width // (
        config.get("attention_head_dim", 8) or width
    )


def unet_map(config: Config, new_order: bool = False) -> list[WeightMap]:
    """The table for diffusers' config fields, without prefix; `UserError` for what has no name
    there.

    new_order: of q, k and v, for U-Nets without tokens.
    """
    _refuse(config)
    return list(_unet(config, new_order))


def _unet(config: Config, new_order: bool) -> Iterator[WeightMap]:
    by_block = is_plain(config) and any(_steps(config))
    attending = [(DOWN | PLAIN_DOWN)[kind] for kind in config["down_block_types"]]
    widths = list(config["block_out_channels"])
    time, last = 4 * widths[0], len(widths) - 1
    yield from linear("time_embed.0", "time_embedding.linear_1", time, widths[0])
    yield from linear("time_embed.2", "time_embedding.linear_2", time, time)
    yield from _labels(config, time)
    yield from linear("input_blocks.0.0", "conv_in", widths[0], config["in_channels"], 3, 3)
    skips, count, channels = [widths[0]], 1, widths[0]
    for level, width in enumerate(widths):
        for layer in range(at(config, "layers_per_block", level)):
            source, target = f"input_blocks.{count}", f"down_blocks.{level}"
            yield from _resnet(
                f"{source}.0", f"{target}.resnets.{layer}", channels, width, time, config
            )
            if attending[level]:
                yield from _attends(
                    f"{source}.1", f"{target}.attentions.{layer}", width, level, config, new_order
                )
            channels, count = width, count + 1
            skips.append(width)
        if level < last:
            source, target = f"input_blocks.{count}.0", f"down_blocks.{level}.downsamplers.0"
            if by_block:
                yield from _resnet(source, target, width, width, time, config)
            else:
                yield from linear(f"{source}.op", f"{target}.conv", width, width, 3, 3)
            count += 1
            skips.append(width)
    yield from _resnet("middle_block.0", "mid_block.resnets.0", channels, channels, time, config)
    yield from _attends(
        "middle_block.1", "mid_block.attentions.0", channels, None, config, new_order
    )
    yield from _resnet("middle_block.2", "mid_block.resnets.1", channels, channels, time, config)
    count = 0
    for level in reversed(range(len(widths))):
        width, target, attends = widths[level], f"up_blocks.{last - level}", attending[level]
        for layer in range(at(config, "layers_per_block", level) + 1):
            source = f"output_blocks.{count}"
            yield from _resnet(
                f"{source}.0",
                f"{target}.resnets.{layer}",
                channels + skips.pop(),
                width,
                time,
                config,
            )
            if attends:
                yield from _attends(
                    f"{source}.1", f"{target}.attentions.{layer}", width, level, config, new_order
                )
            channels, count = width, count + 1
        if level:
            step, target = (
                f"output_blocks.{count - 1}.{2 if attends else 1}",
                f"{target}.upsamplers.0",
            )
            if by_block:
                yield from _resnet(step, target, width, width, time, config)
            else:
                yield from linear(f"{step}.conv", f"{target}.conv", width, width, 3, 3)
    yield from linear("out.0", "conv_norm_out", widths[0])
    yield from linear("out.2", "conv_out", config["out_channels"], widths[0], 3, 3)


def _labels(config: Config, time: int) -> Iterator[WeightMap]:
    """What joins the time embedding: SDXL's pooled text and sizes, a vector of features, or a table
    of classes or noise levels.
    """
    width = config.get("projection_class_embeddings_input_dim")
    addition, kind = config.get("addition_embed_type"), config.get("class_embed_type")
    if (addition, kind) in (("text_time", None), (None, "projection")):
        target = "add_embedding" if addition else "class_embedding"
        yield from linear("label_emb.0.0", f"{target}.linear_1", time, int(width or 0))
        yield from linear("label_emb.0.2", f"{target}.linear_2", time, time)
    elif (addition, kind) != (None, None):
        raise UserError(
            f"addition_embed_type {addition!r} with class_embed_type {kind!r} has no name in the original layout"
        )
    elif config.get("num_class_embeds") is not None:
        yield weight("label_emb.weight", "class_embedding.weight", config["num_class_embeds"], time)


def _resnet(
    source: str, target: str, channels: int, width: int, time: int, config: Config
) -> Iterator[WeightMap]:
    both = 2 if config.get("resnet_time_scale_shift", "default") == "scale_shift" else 1
    yield from linear(f"{source}.in_layers.0", f"{target}.norm1", channels)
    yield from linear(f"{source}.in_layers.2", f"{target}.conv1", width, channels, 3, 3)
    yield from linear(f"{source}.emb_layers.1", f"{target}.time_emb_proj", both * width, time)
    yield from linear(f"{source}.out_layers.0", f"{target}.norm2", width)
    yield from linear(f"{source}.out_layers.3", f"{target}.conv2", width, width, 3, 3)
    if channels != width:
        yield from linear(
            f"{source}.skip_connection", f"{target}.conv_shortcut", width, channels, 1, 1
        )


def _attends(
    source: str, target: str, width: int, level: int | None, config: Config, new_order: bool
) -> Iterator[WeightMap]:
    if is_plain(config):
        yield from _attention(source, target, width, 1 if new_order else heads_at(config, width))
    else:
        yield from _transformer(source, target, width, level, config)


def _attention(source: str, target: str, width: int, heads: int) -> Iterator[WeightMap]:
    """Plain attention. heads: by which q, k and v are interleaved, see `Chunk`."""
    yield from linear(f"{source}.norm", f"{target}.group_norm", width)
    for kind, shape, trailing in (("weight", (width, width), (1,)), ("bias", (width,), ())):
        yield WeightMap(
            f"{source}.qkv.{kind}",
            tuple(f"{target}.to_{a}.{kind}" for a in "qkv"),
            shape,
            Chunk(trailing, heads),
        )
    yield weight(
        f"{source}.proj_out.weight", f"{target}.to_out.0.weight", width, width, op=Conv1d()
    )
    yield weight(f"{source}.proj_out.bias", f"{target}.to_out.0.bias", width)


def _transformer(
    source: str, target: str, width: int, level: int | None, config: Config
) -> Iterator[WeightMap]:
    """A spatial transformer; below its own name both layouts agree. `level` None is the middle,
    which is built as the last level.
    """
    point = () if config.get("use_linear_projection", False) else (1, 1)
    where = -1 if level is None else level
    context = at(config, "cross_attention_dim", where)
    only = (
        at(config, "only_cross_attention", where, False)
        if level is not None
        else _middle_only(config)
    )
    yield from linear(f"{source}.norm", f"{target}.norm", width)
    yield from linear(f"{source}.proj_in", f"{target}.proj_in", width, width, *point)
    for k in range(at(config, "transformer_layers_per_block", where, 1)):
        a, b = f"{source}.transformer_blocks.{k}", f"{target}.transformer_blocks.{k}"
        for name, taken in (("attn1", context if only else width), ("attn2", context)):
            yield weight(f"{a}.{name}.to_q.weight", f"{b}.{name}.to_q.weight", width, width)
            yield weight(f"{a}.{name}.to_k.weight", f"{b}.{name}.to_k.weight", width, taken)
            yield weight(f"{a}.{name}.to_v.weight", f"{b}.{name}.to_v.weight", width, taken)
            yield from linear(f"{a}.{name}.to_out.0", f"{b}.{name}.to_out.0", width, width)
        yield from linear(f"{a}.ff.net.0.proj", f"{b}.ff.net.0.proj", 8 * width, width)
        yield from linear(f"{a}.ff.net.2", f"{b}.ff.net.2", width, 4 * width)
        for k_norm in (1, 2, 3):
            yield from linear(f"{a}.norm{k_norm}", f"{b}.norm{k_norm}", width)
    yield from linear(f"{source}.proj_out", f"{target}.proj_out", width, width, *point)


def _middle_only(config: Config) -> bool:
    """Whether the middle attends to tokens alone: its own field, else the one value that all levels
    share.
    """
    only, middle = (
        config.get("only_cross_attention", False),
        config.get("mid_block_only_cross_attention"),
    )
    return (only if isinstance(only, bool) else False) if middle is None else middle
