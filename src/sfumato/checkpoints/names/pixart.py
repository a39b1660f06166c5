"""PixArtTransformer2DModel <-> the files of PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) and
PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692).

One modulation for all blocks (`t_block`), to which every block adds a table of its own. Two things
of theirs are not in ours, and are left out both ways, as in diffusers: `pos_embed`, a table of
sines, and `y_embedder.y_embedding`, the tokens that stood for dropped captions in training.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Row, pair, row, stacked

WAVES = 256
"""Numbers that a time, or a side of the picture, becomes before the first layer of its
embedding."""
DROPPED = ("pos_embed", "y_embedder.y_embedding")
Config = Mapping[str, Any]


def with_sizes(config: Config) -> bool:
    """Whether the network is told the picture's size; by default only the one for 1024 pixels
    is.
    """
    given = config.get("use_additional_conditions")
    return config["sample_size"] == 128 if given is None else bool(given)


def pixart_rows(config: Config) -> list[Row]:
    """The whole table for diffusers' config fields, but for `DROPPED`."""
    return list(_pixart(config))


def _pixart(config: Config) -> Iterator[Row]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, channels = config["patch_size"], config["in_channels"]
    yield from pair("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
    embedders = [("t", "timestep", width)]
    if with_sizes(config):
        embedders += [("csize", "resolution", width // 3), ("ar", "aspect_ratio", width // 3)]
    for theirs, ours, wide in embedders:
        yield from pair(
            f"{theirs}_embedder.mlp.0", f"adaln_single.emb.{ours}_embedder.linear_1", wide, WAVES
        )
        yield from pair(
            f"{theirs}_embedder.mlp.2", f"adaln_single.emb.{ours}_embedder.linear_2", wide, wide
        )
    yield from pair("t_block.1", "adaln_single.linear", 6 * width, width)
    yield from pair(
        "y_embedder.y_proj.fc1", "caption_projection.linear_1", width, config["caption_channels"]
    )
    yield from pair("y_embedder.y_proj.fc2", "caption_projection.linear_2", width, width)
    for k in range(config["num_layers"]):
        yield from _block(f"blocks.{k}", f"transformer_blocks.{k}", width)
    yield row("final_layer.scale_shift_table", "scale_shift_table", 2, width)
    yield from pair(
        "final_layer.linear",
        "proj_out",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _block(theirs: str, ours: str, width: int) -> Iterator[Row]:
    yield row(f"{theirs}.scale_shift_table", f"{ours}.scale_shift_table", 6, width)
    yield from stacked(f"{theirs}.attn.qkv", [f"{ours}.attn1.to_{a}" for a in "qkv"], width, width)
    yield from pair(f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0", width, width)
    yield from pair(f"{theirs}.cross_attn.q_linear", f"{ours}.attn2.to_q", width, width)
    yield from stacked(
        f"{theirs}.cross_attn.kv_linear", [f"{ours}.attn2.to_{a}" for a in "kv"], width, width
    )
    yield from pair(f"{theirs}.cross_attn.proj", f"{ours}.attn2.to_out.0", width, width)
    yield from pair(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj", 4 * width, width)
    yield from pair(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2", width, 4 * width)
