"""The config of a U-Net, detected from its keys and shapes alone.

Two things leave no trace and are assumed: norms have 32 groups, and attention has as many heads as
the family's rule says, or the caller, the YAML or the file's metadata. A U-Net without tokens
(unconditional Latent Diffusion, diffusers' UNet2DModel) has steps that may be residual blocks. They
are detected on the way up, where one stands behind another block.
"""

from typing import Any

from sfumato.checkpoints.shapes import Shapes, one_or_all
from sfumato.predict.networks.unet import FIXED
from sfumato.predict.networks.unet_2d import OWN_CLASS

_SHARED: dict[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
}
STANDARD = {
    **FIXED,
    **_SHARED,
    "_class_name": "UNet2DConditionModel",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_only_cross_attention": None,
    "only_cross_attention": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_cond_proj_dim": None,
}
"""Diffusers' fields that are the same for all files of the original layout with tokens."""
PLAIN_STANDARD = {
    **_SHARED,
    "_class_name": "UNet2DModel",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "add_attention": True,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "attn_norm_num_groups": None,
}
"""The same of a U-Net without tokens."""
PLAIN_MARK = "middle_block.1.qkv."
"""Attention of the middle to itself, without tokens."""
_HEAD_WIDTH, _HEADS = 32, 8
"""Heads of U-Nets without tokens.

They are 32 wide (CelebA-HQ, FFHQ, LSUN bedrooms); with residual blocks as steps there are 8 of them
(LSUN churches).
"""
Heads = tuple[int | None, int | None]
"""The number of heads of every attention, or the width of each."""


# ---- with tokens ---------------------------------------------------------------------------------


def unet_config(
    shapes: Shapes, sample_size: int, heads: Heads, sizes: int, pooled: str
) -> dict[str, Any]:
    """The config of UNet2DConditionModel in diffusers' fields, below the network's prefix.

    Args:
        shapes: Of the file's tensors.
        sample_size: The side of latents that the family was trained at.
        heads: Of attention.
        sizes: Numbers beside the pooled text in the vector; 0: there is none.
        pooled: The key of the projection of the text that is pooled.

    Raises:
        UserError: A U-Net of no known kind, or one whose heads are undecided.
    """
    levels, deepest = _levels(shapes), "middle_block.1.transformer_blocks."
    widths, attends = _widths(shapes, levels)
    if not shapes.has(deepest):
        raise shapes.error("a U-Net without attention in its middle is not supported")
    depth = shapes.count(deepest)
    blocks = [f"input_blocks.{level[0]}.1.transformer_blocks." for level in levels]
    depths = [shapes.count(b) if a else None for b, a in zip(blocks, attends, strict=True)]
    if attends[-1] and depths[-1] != depth:
        raise shapes.damaged(
            f"its middle has {depth} transformer blocks, its last level {depths[-1]}"
        )
    if all(d in (None, depth) for d in depths):
        # levels that do not attend have none, whatever the config holds
        depths = [depth] * len(widths)
    depths[-1] = depth
    only = [
        a and shapes.size(f"{b}0.attn1.to_k.weight", 1, 2) != w
        for b, a, w in zip(blocks, attends, widths, strict=True)
    ]
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    return STANDARD | {
        "sample_size": sample_size,
        **_shared_fields(shapes, levels, widths, down, [k.replace("Down", "Up") for k in down]),
        "cross_attention_dim": shapes.size(f"{deepest}0.attn2.to_k.weight", 1, 2),
        "transformer_layers_per_block": one_or_all([1 if d is None else d for d in depths]),
        "attention_head_dim": _heads(shapes, widths, *heads),
        "use_linear_projection": shapes.rank("middle_block.1.proj_in.weight") == 2,
        "only_cross_attention": only if any(only) else False,
        **_labels(shapes, sizes, pooled),
    }


def _levels(shapes: Shapes) -> list[list[int]]:
    """The numbers of the residual blocks on the way down, one list a level."""
    levels: list[list[int]] = [[]]
    for n in range(1, shapes.count("input_blocks.")):
        if shapes.has(f"input_blocks.{n}.0.op."):
            levels.append([])
        else:
            levels[-1].append(n)
    if not all(levels):
        raise shapes.damaged("its U-Net has levels without residual blocks")
    return levels


def _widths(shapes: Shapes, levels: list[list[int]]) -> tuple[list[int], list[bool]]:
    """The width of each level, and True where it attends."""
    first = [f"input_blocks.{blocks[0]}" for blocks in levels]
    widths = [shapes.size(f"{block}.0.out_layers.0.weight") for block in first]
    return widths, [shapes.has(f"{block}.1.") for block in first]


def _shared_fields(
    shapes: Shapes, levels: list[list[int]], widths: list[int], down: list[str], up: list[str]
) -> dict[str, Any]:
    """The fields of all U-Nets; `down` and `up`: the block types of each level."""
    shift = shapes.size("input_blocks.1.0.emb_layers.1.bias") == 2 * widths[0]
    return {
        "in_channels": shapes.size("input_blocks.0.0.weight", 1, 4),
        "out_channels": shapes.size("out.2.bias"),
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": widths,
        "layers_per_block": one_or_all([len(blocks) for blocks in levels]),
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
    }


def _heads(
    shapes: Shapes, widths: list[int], heads: int | None, head_width: int | None
) -> int | list[int]:
    if heads is not None:
        return heads
    if head_width is None:
        raise shapes.error("heads of attention do not follow from keys: give heads, or its YAML")
    _check_widths(shapes, widths, head_width, f"heads {head_width} wide")
    return [w // head_width for w in widths]


def _check_widths(shapes: Shapes, widths: list[int], divisor: int, parts: str) -> None:
    faults = [w for w in widths if w % divisor]
    if faults:
        fault = f"width {faults[0]} does not divide into {parts}"
        raise shapes.error(f"{fault}: give heads, or its YAML")


def _labels(shapes: Shapes, sizes: int, pooled: str) -> dict[str, Any]:
    """The fields of the layers that join the time embedding."""
    if shapes.has("label_emb.weight"):
        return {"num_class_embeds": shapes.size("label_emb.weight", 0, 2)}
    if not shapes.has("label_emb.0."):
        return {}
    width = shapes.size("label_emb.0.0.weight", 1, 2)
    if not sizes:
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    shape = shapes.table.get(pooled)
    sinusoidal, rest = 256, 0
    if shape is not None and len(shape) == 2:
        sinusoidal, rest = divmod(width - shape[1], sizes)
    if sinusoidal <= 0 or rest:
        raise shapes.damaged(
            f"its {width} numbers are no pooled text ({shape and shape[1]}) and {sizes} sizes"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sinusoidal,
        "projection_class_embeddings_input_dim": width,
    }


# ---- without tokens ------------------------------------------------------------------------------


def plain_config(shapes: Shapes, heads: int | None, head_width: int | None) -> dict[str, Any]:
    """The config of UNet2DModel in diffusers' fields, below the network's prefix.

    Args:
        shapes: Of the file's tensors.
        heads: The number of heads of every attention.
        head_width: The width of each; both None: those of the published models.

    Raises:
        UserError: A U-Net that is damaged, or that embeds a class.
    """
    if shapes.has("label_emb."):
        raise shapes.error("UNet2DModel conditioned on a class (label_emb) is not supported")
    levels, steps = _plain_levels(shapes)
    widths, attends = _widths(shapes, levels)
    by_block = any(steps)
    if by_block and not all(steps):
        raise shapes.damaged("some of its U-Net's steps down are residual blocks, others are not")
    step = "resnet" if by_block else "conv"
    down, up = ("ResnetDownsample", "ResnetUpsample") if by_block else ("Down", "Up")
    down_types = [f"{'AttnDown' if a else down}Block2D" for a in attends]
    up_types = [f"{'AttnUp' if a else up}Block2D" for a in attends]
    fields = _shared_fields(shapes, levels, widths, down_types, up_types)
    shift = fields["resnet_time_scale_shift"] == "scale_shift"
    attending = [w for w, a in zip(widths, attends, strict=True) if a] + widths[-1:]
    return PLAIN_STANDARD | {
        **fields,
        "downsample_type": step,
        "upsample_type": step,
        # diffusers leaves out the norm of the middle's attention unless its groups are given
        "attn_norm_num_groups": 32 if shift else None,
        **_plain_heads(shapes, attending, heads, head_width, by_block),
    }


def _plain_levels(shapes: Shapes) -> tuple[list[list[int]], list[bool]]:
    """The numbers of the residual blocks on the way down, one list a level.

    And for each step between levels, True where it is a residual block.
    """
    counts = [0]
    for n in range(shapes.count("output_blocks.")):
        counts[-1] += 1
        if any(shapes.has(f"output_blocks.{n}.{step}.") for step in ("1.conv", "1.in_layers", "2")):
            counts.append(0)
    levels, steps, n = [], [], 1
    for level, blocks in enumerate(reversed(counts)):  # one block more than on the way down
        levels.append([*range(n, n + blocks - 1)])
        n += blocks - 1
        if level < len(counts) - 1:
            steps.append(shapes.has(f"input_blocks.{n}.0.in_layers."))
            n += 1
    count = shapes.count("input_blocks.")
    if n != count or not all(levels):
        raise shapes.damaged(
            f"its U-Net has {count} blocks on the way down, the way up has room for {n}"
        )
    return levels, steps


def _plain_heads(
    shapes: Shapes, widths: list[int], heads: int | None, head_width: int | None, by_block: bool
) -> dict[str, Any]:
    """The fields of the heads; `widths`: of the levels that attend."""
    if heads is None and head_width is None:
        heads, head_width = (_HEADS, None) if by_block else (None, _HEAD_WIDTH)
    parts = f"{heads} heads" if heads else f"heads {head_width} wide"
    _check_widths(shapes, widths, heads or head_width or 1, parts)
    if heads is None:
        return {"attention_head_dim": head_width}
    if heads == 1:
        return {"attention_head_dim": None}
    each = {w // heads for w in widths}
    if len(each) == 1:
        return {"attention_head_dim": each.pop()}
    return {"_class_name": OWN_CLASS, "attention_head_dim": None, "num_attention_heads": heads}
