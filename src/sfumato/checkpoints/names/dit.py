"""DiTTransformer2DModel <-> the files of DiT (Peebles & Xie 2022, arXiv:2212.09748) and SiT (Ma et
al. 2024, arXiv:2401.08740), which have one layout.

Theirs embeds time and class once; ours, as diffusers' network does, in every block, with the same
numbers. `pos_embed` is a table of sines in theirs and not stored in ours:

    table[y, x] = [sin(x w), cos(x w), sin(y w), cos(y w)],   w[k] = 10000^(-k / (D/4)),   k = 0 ...
    D/4 - 1
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.names.rows import Form, Row, pair, stacked

WAVES = 256
"""Numbers that a time becomes before the first layer of its embedding."""
TABLE = "pos_embed"
Config = Mapping[str, Any]


def dit_rows(config: Config) -> list[Row]:
    """The whole table for diffusers' config fields, but for `TABLE`."""
    return list(_dit(config))


def _dit(config: Config) -> Iterator[Row]:
    width, layers = (
        config["num_attention_heads"] * config["attention_head_dim"],
        range(config["num_layers"]),
    )
    patch, channels = config["patch_size"], config["in_channels"]
    yield from pair("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
    for theirs, ours, taken in (("mlp.0", "linear_1", WAVES), ("mlp.2", "linear_2", width)):
        yield from _shared(
            f"t_embedder.{theirs}", f"timestep_embedder.{ours}", layers, "weight", width, taken
        )
        yield from _shared(
            f"t_embedder.{theirs}", f"timestep_embedder.{ours}", layers, "bias", width
        )
    classes = config["num_embeds_ada_norm"] + 1
    yield from _shared(
        "y_embedder.embedding_table",
        "class_embedder.embedding_table",
        layers,
        "weight",
        classes,
        width,
    )
    for k in layers:
        theirs, ours = f"blocks.{k}", f"transformer_blocks.{k}"
        yield from pair(f"{theirs}.adaLN_modulation.1", f"{ours}.norm1.linear", 6 * width, width)
        yield from stacked(
            f"{theirs}.attn.qkv", [f"{ours}.attn1.to_{a}" for a in "qkv"], width, width
        )
        yield from pair(f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0", width, width)
        yield from pair(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj", 4 * width, width)
        yield from pair(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2", width, 4 * width)
    yield from pair("final_layer.adaLN_modulation.1", "proj_out_1", 2 * width, width)
    yield from pair(
        "final_layer.linear",
        "proj_out_2",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _shared(theirs: str, ours: str, layers: range, kind: str, *shape: int) -> Iterator[Row]:
    yield Row(
        f"{theirs}.{kind}",
        tuple(f"transformer_blocks.{k}.norm1.emb.{ours}.{kind}" for k in layers),
        shape,
        Form.SHARED,
    )


def grid_table(width: int, side: int) -> Tensor:
    """(1, side * side, width) in float32: the table above, row by row of the grid."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([waves.sin(), waves.cos()], 1)
    x, y = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([x, y], -1).reshape(1, side * side, width).float()
