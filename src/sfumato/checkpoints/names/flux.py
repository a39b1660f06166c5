"""FluxTransformer2DModel <-> the network of FLUX.1 (Black Forest Labs 2024,
github.com/black-forest-labs/flux), dev, schnell, Fill, Canny, Depth.

A single block there has two layers: `linear1` holds q, k, v and the first layer of the MLP on top
of each other, `linear2` what follows both. The final layer's modulation holds (shift, scale) in
theirs and (scale, shift) in ours.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Form, Row, pair, row, stacked, swapped

WAVES = 256
"""Numbers that a time becomes before the first layer of its embedding."""
Config = Mapping[str, Any]
STREAMS = (
    ("img", "to_{}", "norm_{}", "to_out.0"),
    ("txt", "add_{}_proj", "norm_added_{}", "to_add_out"),
)
"""The two halves of a double block: theirs, and ours for q, k and v, their norms and what
follows."""


def flux_rows(config: Config) -> list[Row]:
    """The whole table for diffusers' config fields, without the prefix `model.diffusion_model.`."""
    return list(_flux(config))


def _flux(config: Config) -> Iterator[Row]:
    width, head = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["attention_head_dim"],
    )
    channels, patch = config["in_channels"], config.get("patch_size", 1)
    embedders = [
        ("time_in", "timestep_embedder", WAVES),
        ("vector_in", "text_embedder", config["pooled_projection_dim"]),
    ]
    if config.get("guidance_embeds"):
        embedders.append(("guidance_in", "guidance_embedder", WAVES))
    for theirs, ours, taken in embedders:
        yield from pair(f"{theirs}.in_layer", f"time_text_embed.{ours}.linear_1", width, taken)
        yield from pair(f"{theirs}.out_layer", f"time_text_embed.{ours}.linear_2", width, width)
    yield from pair("img_in", "x_embedder", width, channels)
    yield from pair("txt_in", "context_embedder", width, config["joint_attention_dim"])
    for k in range(config["num_layers"]):
        yield from _double(f"double_blocks.{k}", f"transformer_blocks.{k}", width, head)
    for k in range(config["num_single_layers"]):
        yield from _single(f"single_blocks.{k}", f"single_transformer_blocks.{k}", width, head)
    yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width)
    yield from pair(
        "final_layer.linear",
        "proj_out",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _double(theirs: str, ours: str, width: int, head: int) -> Iterator[Row]:
    for side, layer, _, out in STREAMS:
        end = "" if side == "img" else "_context"
        yield from pair(f"{theirs}.{side}_mod.lin", f"{ours}.norm1{end}.linear", 6 * width, width)
        yield from stacked(
            f"{theirs}.{side}_attn.qkv",
            [f"{ours}.attn.{layer.format(a)}" for a in "qkv"],
            width,
            width,
        )
        yield from pair(f"{theirs}.{side}_attn.proj", f"{ours}.attn.{out}", width, width)
        yield from pair(f"{theirs}.{side}_mlp.0", f"{ours}.ff{end}.net.0.proj", 4 * width, width)
        yield from pair(f"{theirs}.{side}_mlp.2", f"{ours}.ff{end}.net.2", width, 4 * width)
    yield from norms(theirs, ours, head)


def norms(theirs: str, ours: str, head: int) -> Iterator[Row]:
    """Of q and k in both halves of a double block."""
    for side, _, norm, _ in STREAMS:
        for a, name in (("q", "query"), ("k", "key")):
            yield row(
                f"{theirs}.{side}_attn.norm.{name}_norm.scale",
                f"{ours}.attn.{norm.format(a)}.weight",
                head,
            )


def _single(theirs: str, ours: str, width: int, head: int) -> Iterator[Row]:
    yield from pair(f"{theirs}.modulation.lin", f"{ours}.norm.linear", 3 * width, width)
    names = [*(f"{ours}.attn.to_{a}" for a in "qkv"), f"{ours}.proj_mlp"]
    heights = (width, width, width, 4 * width)
    for kind, behind in (("weight", (width,)), ("bias", ())):
        pile = tuple(f"{name}.{kind}" for name in names)
        yield Row(
            f"{theirs}.linear1.{kind}", pile, (sum(heights), *behind), Form.PILED, heights=heights
        )
    yield from pair(f"{theirs}.linear2", f"{ours}.proj_out", width, 5 * width)
    for a, name in (("q", "query"), ("k", "key")):
        yield row(f"{theirs}.norm.{name}_norm.scale", f"{ours}.attn.norm_{a}.weight", head)
