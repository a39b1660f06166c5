"""The config of a U-Net without tokens (unconditional Latent Diffusion), read from its keys and
shapes: diffusers' UNet2DModel.

A step down that is a residual block looks like any other; the way up tells, where it stands behind
another block. Heads leave no trace. The published models have two rules, which are taken where
nobody says otherwise: heads 32 wide (CelebA-HQ, FFHQ, LSUN bedrooms), or, with residual blocks as
steps, 8 heads (LSUN churches).
"""

from typing import Any

from sfumato.checkpoints.infer import Shapes, one_or_all
from sfumato.errors import UserError
from sfumato.predict.networks.unet_2d import OWN_CLASS

PLAIN_STANDARD: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2D",
    "add_attention": True,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
}
_HEAD_WIDTH, _HEADS = 32, 8
_ATTENTION = "middle_block.1.qkv."


def is_plain(s: Shapes) -> bool:
    """Whether the middle attends to itself and to no tokens."""
    return s.has(_ATTENTION)


def plain_config(s: Shapes, heads: int | None, head_width: int | None) -> dict[str, Any]:
    """diffusers' config of the U-Net below `model.diffusion_model.`; `UserError` for one that is
    not whole, or that is told a class.
    """
    if s.has("label_emb."):
        raise UserError(
            f"{s.where}: a U-Net without tokens that is told a class (label_emb) is not supported"
        )
    levels, steps = _levels(s)
    widths = [s.size(f"input_blocks.{blocks[0]}.0.out_layers.0.weight") for blocks in levels]
    attends = [s.has(f"input_blocks.{blocks[0]}.1.") for blocks in levels]
    by_block = any(steps)
    if by_block and not all(steps):
        raise UserError(
            f"{s.where}: of its U-Net's steps down some are residual blocks: expected all of them, or none"
        )
    rest = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if by_block
        else ("DownBlock2D", "UpBlock2D")
    )
    step, shift = (
        "resnet" if by_block else "conv",
        s.size("input_blocks.1.0.emb_layers.1.bias") == 2 * widths[0],
    )
    return PLAIN_STANDARD | {
        "in_channels": s.size("input_blocks.0.0.weight", 1, 4),
        "out_channels": s.size("out.2.bias"),
        "down_block_types": ["AttnDownBlock2D" if a else rest[0] for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else rest[1] for a in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": one_or_all([len(blocks) for blocks in levels]),
        "downsample_type": step,
        "upsample_type": step,
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        # without a word diffusers leaves out the norm of the middle's attention there
        "attn_norm_num_groups": 32 if shift else None,
        **_heads(
            s,
            [w for w, a in zip(widths, attends, strict=True) if a] + widths[-1:],
            heads,
            head_width,
            by_block,
        ),
    }


def _levels(s: Shapes) -> tuple[list[list[int]], list[bool]]:
    """The numbers of the residual blocks on the way down, one list a level; and of each step
    between, whether it is a residual block.
    """
    counts = [0]
    for n in range(s.count("output_blocks.")):
        counts[-1] += 1
        if any(s.has(f"output_blocks.{n}.{step}.") for step in ("1.conv", "1.in_layers", "2")):
            counts.append(0)
    levels, steps, n = [], [], 1
    for level, blocks in enumerate(reversed(counts)):  # one block more than on the way down
        levels.append([*range(n, n + blocks - 1)])
        n += blocks - 1
        if level < len(counts) - 1:
            steps.append(s.has(f"input_blocks.{n}.0.in_layers."))
            n += 1
    if n != s.count("input_blocks.") or not all(levels):
        raise UserError(
            f"{s.where}: its U-Net has {s.count('input_blocks.')} blocks on the way down, the way up has room for {n}: it may be damaged"
        )
    return levels, steps


def _heads(
    s: Shapes, widths: list[int], heads: int | None, head_width: int | None, by_block: bool
) -> dict[str, Any]:
    """`widths`: where it attends."""
    if heads is None and head_width is None:
        heads, head_width = (_HEADS, None) if by_block else (None, _HEAD_WIDTH)
    by = heads or head_width or 1
    wrong = [w for w in widths if w % by]
    if wrong:
        what = f"{heads} heads" if heads else f"heads {head_width} wide"
        raise UserError(
            f"{s.where}: width {wrong[0]} does not divide into {what}: give heads, or its YAML"
        )
    if heads is None:
        return {"attention_head_dim": head_width}
    if heads == 1:
        return {"attention_head_dim": None}
    each = {w // heads for w in widths}
    if len(each) == 1:
        return {"attention_head_dim": each.pop()}
    return {"_class_name": OWN_CLASS, "attention_head_dim": None, "num_attention_heads": heads}
