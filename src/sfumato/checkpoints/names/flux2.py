"""Flux2Transformer2DModel and AutoencoderKLFlux2 <-> FLUX.2's files (Black Forest Labs 2025,
github.com/black-forest-labs/flux2), dev and klein.

No layer of the transformer has a bias. Its blocks share three modulations; MLPs are gated (twice
the width in, half of it the gate), and in a single block q, k, v and the MLP's first layer are one
layer in theirs and in ours. The final layer's modulation holds (shift, scale) in theirs and (scale,
shift) in ours. In the autoencoder's file the convolutions around the latent belong to the encoder
and the decoder.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.flux import STREAMS, WAVES, norms
from sfumato.checkpoints.names.ldm_vae import vae_rows
from sfumato.checkpoints.names.rows import Row, row, stacked, swapped
from sfumato.errors import UserError

Config = Mapping[str, Any]
BATCHES = "bn.num_batches_tracked"
"""How often the autoencoder's batch norm was run while it was trained: a whole number that nothing
reads."""


def flux2_rows(config: Config) -> list[Row]:
    """The transformer's table for diffusers' config fields, without the prefix
    `model.diffusion_model.`.
    """
    return list(_flux2(config))


def _flux2(config: Config) -> Iterator[Row]:
    width, head = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["attention_head_dim"],
    )
    channels, patch, inner = (
        config["in_channels"],
        config.get("patch_size", 1),
        int(width * config.get("mlp_ratio", 3.0)),
    )
    waves = config.get("timestep_guidance_channels", WAVES)
    embedders = ["timestep", "guidance"] if config.get("guidance_embeds", True) else ["timestep"]
    for name in embedders:
        theirs, ours = f"{name.removesuffix('step')}_in", f"time_guidance_embed.{name}_embedder"
        yield row(f"{theirs}.in_layer.weight", f"{ours}.linear_1.weight", width, waves)
        yield row(f"{theirs}.out_layer.weight", f"{ours}.linear_2.weight", width, width)
    for name, vectors in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        yield row(f"{name}.lin.weight", f"{name}.linear.weight", vectors * width, width)
    yield row("img_in.weight", "x_embedder.weight", width, channels)
    yield row("txt_in.weight", "context_embedder.weight", width, config["joint_attention_dim"])
    for k in range(config["num_layers"]):
        yield from _double(f"double_blocks.{k}", f"transformer_blocks.{k}", width, inner, head)
    for k in range(config["num_single_layers"]):
        theirs, ours = f"single_blocks.{k}", f"single_transformer_blocks.{k}.attn"
        yield row(
            f"{theirs}.linear1.weight",
            f"{ours}.to_qkv_mlp_proj.weight",
            3 * width + 2 * inner,
            width,
        )
        yield row(f"{theirs}.linear2.weight", f"{ours}.to_out.weight", width, width + inner)
        for a, name in (("q", "query"), ("k", "key")):
            yield row(f"{theirs}.norm.{name}_norm.scale", f"{ours}.norm_{a}.weight", head)
    yield from swapped(
        "final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width, bias=False
    )
    yield row(
        "final_layer.linear.weight",
        "proj_out.weight",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _double(theirs: str, ours: str, width: int, inner: int, head: int) -> Iterator[Row]:
    for side, layer, _, out in STREAMS:
        end = "" if side == "img" else "_context"
        yield from stacked(
            f"{theirs}.{side}_attn.qkv",
            [f"{ours}.attn.{layer.format(a)}" for a in "qkv"],
            width,
            width,
            bias=False,
        )
        yield row(f"{theirs}.{side}_attn.proj.weight", f"{ours}.attn.{out}.weight", width, width)
        yield row(
            f"{theirs}.{side}_mlp.0.weight", f"{ours}.ff{end}.linear_in.weight", 2 * inner, width
        )
        yield row(
            f"{theirs}.{side}_mlp.2.weight", f"{ours}.ff{end}.linear_out.weight", width, inner
        )
    yield from norms(theirs, ours, head)


def flux2_vae_rows(config: Config) -> list[Row]:
    """The autoencoder's table, but for `BATCHES`; `UserError` for a decoder of other widths than
    the encoder, which is not known there.
    """
    widths = list(config["block_out_channels"])
    if list(config.get("decoder_block_out_channels") or widths) != widths:
        raise UserError(
            f"decoder_block_out_channels {config['decoder_block_out_channels']} beside block_out_channels {widths} has no name in the "
            "original layout: expected the same widths"
        )
    halves = {"quant_conv.": "encoder.", "post_quant_conv.": "decoder."}
    rows = [
        r._replace(
            theirs=next((p for k, p in halves.items() if r.theirs.startswith(k)), "") + r.theirs
        )
        for r in vae_rows(config)
    ]
    patch = config.get("patch_size", (2, 2))
    packed = config["latent_channels"] * patch[0] * patch[1]
    return rows + [
        row(f"bn.running_{name}", f"bn.running_{name}", packed) for name in ("mean", "var")
    ]
