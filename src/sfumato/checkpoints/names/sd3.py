"""SD3Transformer2DModel <-> the network of Stable Diffusion 3 and 3.5 (MMDiT, MMDiT-X; Esser et al.
2024, arXiv:2403.03206) as Stability AI publishes it.

Theirs has one matrix for q, k and v. A block has two halves, `x_block` for the picture and
`context_block` for the text; the last context block ends at its attention. Modulations of two
vectors, those of the last context block and of the final layer, hold (shift, scale) in theirs and
(scale, shift) in ours; those of six and nine vectors are in the same order. `pos_embed` is a table
in both.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Row, pair, row, stacked, swapped
from sfumato.errors import UserError

WAVES = 256
"""Numbers that a time becomes before the first layer of its embedding."""
Config = Mapping[str, Any]


def sd3_rows(config: Config) -> list[Row]:
    """The whole table for diffusers' config fields, without the prefix `model.diffusion_model.`;
    `UserError` for what has no name there.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise UserError(
            f"qk_norm {config['qk_norm']!r} has no name in SD3's original layout: expected 'rms_norm' or null"
        )
    if config["caption_projection_dim"] != width:
        raise UserError(
            f"caption_projection_dim {config['caption_projection_dim']} is not the width {width} of the blocks, to which the text is projected"
        )
    return list(_sd3(config, width))


def _sd3(config: Config, width: int) -> Iterator[Row]:
    patch, channels = config["patch_size"], config["in_channels"]
    yield row("pos_embed", "pos_embed.pos_embed", 1, config["pos_embed_max_size"] ** 2, width)
    yield from pair("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
    for theirs, ours, taken in (
        ("t", "timestep", WAVES),
        ("y", "text", config["pooled_projection_dim"]),
    ):
        yield from pair(
            f"{theirs}_embedder.mlp.0", f"time_text_embed.{ours}_embedder.linear_1", width, taken
        )
        yield from pair(
            f"{theirs}_embedder.mlp.2", f"time_text_embed.{ours}_embedder.linear_2", width, width
        )
    yield from pair("context_embedder", "context_embedder", width, config["joint_attention_dim"])
    last = config["num_layers"] - 1
    for k in range(last + 1):
        dual = k in config.get("dual_attention_layers", ())
        yield from _picture(
            f"joint_blocks.{k}.x_block", f"transformer_blocks.{k}", width, dual, config
        )
        yield from _text(
            f"joint_blocks.{k}.context_block", f"transformer_blocks.{k}", width, k == last, config
        )
    yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width)
    yield from pair(
        "final_layer.linear",
        "proj_out",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _picture(theirs: str, ours: str, width: int, dual: bool, config: Config) -> Iterator[Row]:
    """The picture's half of a block; dual: with a second attention, to itself alone (MMDiT-X)."""
    yield from pair(
        f"{theirs}.adaLN_modulation.1", f"{ours}.norm1.linear", (9 if dual else 6) * width, width
    )
    for name in ("attn", "attn2") if dual else ("attn",):
        yield from stacked(
            f"{theirs}.{name}.qkv", [f"{ours}.{name}.to_{a}" for a in "qkv"], width, width
        )
        yield from _norms(f"{theirs}.{name}", f"{ours}.{name}.norm_{{}}", config)
        yield from pair(f"{theirs}.{name}.proj", f"{ours}.{name}.to_out.0", width, width)
    yield from _forward(f"{theirs}.mlp", f"{ours}.ff", width)


def _text(theirs: str, ours: str, width: int, last: bool, config: Config) -> Iterator[Row]:
    """The text's half; the last one modulates and attends only."""
    yield from stacked(
        f"{theirs}.attn.qkv", [f"{ours}.attn.add_{a}_proj" for a in "qkv"], width, width
    )
    yield from _norms(f"{theirs}.attn", f"{ours}.attn.norm_added_{{}}", config)
    if last:
        yield from swapped(
            f"{theirs}.adaLN_modulation.1", f"{ours}.norm1_context.linear", 2 * width, width
        )
        return
    yield from pair(
        f"{theirs}.adaLN_modulation.1", f"{ours}.norm1_context.linear", 6 * width, width
    )
    yield from pair(f"{theirs}.attn.proj", f"{ours}.attn.to_add_out", width, width)
    yield from _forward(f"{theirs}.mlp", f"{ours}.ff_context", width)


def _norms(theirs: str, ours: str, config: Config) -> Iterator[Row]:
    for a in "qk" if config.get("qk_norm") else "":
        yield row(
            f"{theirs}.ln_{a}.weight", f"{ours.format(a)}.weight", config["attention_head_dim"]
        )


def _forward(theirs: str, ours: str, width: int) -> Iterator[Row]:
    yield from pair(f"{theirs}.fc1", f"{ours}.net.0.proj", 4 * width, width)
    yield from pair(f"{theirs}.fc2", f"{ours}.net.2", width, 4 * width)
