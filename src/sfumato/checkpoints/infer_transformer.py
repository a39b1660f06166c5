"""The config of a diffusion transformer in its original layout, read from keys and shapes alone;
T5's inside such files too.

What leaves no trace is what all published files have: heads 64 wide in SD3, 72 in PixArt, in DiT 72
where the width has such heads and 64 elsewhere (Peebles & Xie 2022, table 1), 128 in FLUX (or what
the norms of q and k say); rotary angles of FLUX over (16, 56, 56) channels with base 10000, of
FLUX.2 over four times 32 with base 2000.
"""

from math import isqrt
from typing import Any

from sfumato.checkpoints.infer import Shapes
from sfumato.errors import UserError

SD3_HEAD = 64


def _heads(s: Shapes, width: int, head: int) -> int:
    if head < 1 or width % head:
        raise UserError(
            f"{s.where}: width {width} does not divide into heads {head} wide: it may be damaged, or is of no known kind"
        )
    return width // head


def _square(s: Shapes, key: str, cells: int) -> int:
    side = isqrt(cells)
    if side * side != cells:
        raise UserError(
            f"{s.where}: {s.prefix}{key} has {cells} places, which are no square: it may be damaged, or is of no known kind"
        )
    return side


def sd3_config(s: Shapes) -> dict[str, Any]:
    """diffusers' fields of SD3Transformer2DModel."""
    width, layers = s.size("x_embedder.proj.bias"), s.count("joint_blocks.")
    patch = s.size("x_embedder.proj.weight", 2, 4)
    normed = s.has("joint_blocks.0.x_block.attn.ln_q.")
    side = _square(s, "pos_embed", s.size("pos_embed", 1, 3))
    head = s.size("joint_blocks.0.x_block.attn.ln_q.weight") if normed else SD3_HEAD
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": s.size("x_embedder.proj.weight", 1, 4),
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": _heads(s, width, head),
        "joint_attention_dim": s.size("context_embedder.weight", 1, 2),
        "caption_projection_dim": s.size("context_embedder.bias"),
        "pooled_projection_dim": s.size("y_embedder.mlp.0.weight", 1, 2),
        "out_channels": s.size("final_layer.linear.bias") // patch**2,
        "pos_embed_max_size": side,
        "dual_attention_layers": [
            k for k in range(layers) if s.has(f"joint_blocks.{k}.x_block.attn2.")
        ],
        "qk_norm": "rms_norm" if normed else None,
    }


def flux_config(s: Shapes) -> dict[str, Any]:
    """diffusers' fields of FluxTransformer2DModel. Fill takes 384 channels in, Canny and Depth 128,
    the others 64.
    """
    width, head = s.size("img_in.bias"), s.size("double_blocks.0.img_attn.norm.query_norm.scale")
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": s.size("img_in.weight", 1, 2),
        "out_channels": s.size("final_layer.linear.bias"),
        "num_layers": s.count("double_blocks."),
        "num_single_layers": s.count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": _heads(s, width, head),
        "joint_attention_dim": s.size("txt_in.weight", 1, 2),
        "pooled_projection_dim": s.size("vector_in.in_layer.weight", 1, 2),
        "guidance_embeds": s.has("guidance_in."),
        "axes_dims_rope": _axes(s, head, [16, 56, 56]),
    }


def flux2_config(s: Shapes) -> dict[str, Any]:
    """diffusers' fields of Flux2Transformer2DModel."""
    width, head = (
        s.size("img_in.weight", 0, 2),
        s.size("double_blocks.0.img_attn.norm.query_norm.scale"),
    )
    inner = s.size("double_blocks.0.img_mlp.2.weight", 1, 2)
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": s.size("img_in.weight", 1, 2),
        "out_channels": s.size("final_layer.linear.weight", 0, 2),
        "num_layers": s.count("double_blocks."),
        "num_single_layers": s.count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": _heads(s, width, head),
        "joint_attention_dim": s.size("txt_in.weight", 1, 2),
        "timestep_guidance_channels": s.size("time_in.in_layer.weight", 1, 2),
        "mlp_ratio": inner / width,
        "axes_dims_rope": _axes(s, head, [32, 32, 32, 32]),
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": s.has("guidance_in."),
    }


def _axes(s: Shapes, head: int, published: list[int]) -> list[int]:
    """The published split of a head's channels among the axes, in proportion where heads are
    narrower; angles take channels in pairs.
    """
    axes = [head * a // sum(published) for a in published]
    if sum(axes) != head or any(a % 2 for a in axes):
        raise UserError(
            f"{s.where}: heads {head} wide do not divide among the axes as {published} do: give its config.json (--config)"
        )
    return axes


def dit_config(s: Shapes) -> dict[str, Any]:
    """diffusers' fields of DiTTransformer2DModel."""
    width, patch = s.size("x_embedder.proj.bias"), s.size("x_embedder.proj.weight", 2, 4)
    head = 72 if width % 72 == 0 else 64
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": _heads(s, width, head),
        "attention_head_dim": head,
        "in_channels": s.size("x_embedder.proj.weight", 1, 4),
        "out_channels": s.size("final_layer.linear.bias") // patch**2,
        "num_layers": s.count("blocks."),
        "sample_size": patch * _square(s, "pos_embed", s.size("pos_embed", 1, 3)),
        "patch_size": patch,
        "num_embeds_ada_norm": s.size("y_embedder.embedding_table.weight", 0, 2) - 1,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def sit_config(s: Shapes) -> dict[str, Any]:
    """The same fields, for SiT."""
    return {**dit_config(s), "_class_name": "SfumatoSiT"}


def pixart_config(s: Shapes) -> dict[str, Any]:
    """diffusers' fields of PixArtTransformer2DModel. Its size comes from the table of places or,
    where only that can be, from its being told sizes.

    Sigma's captions are 300 tokens long and alpha's 120; its network for 256 pixels has half the
    steps between places (Chen et al. 2024).
    """
    width, patch = s.size("x_embedder.proj.bias"), s.size("x_embedder.proj.weight", 2, 4)
    told, tabled = s.has("csize_embedder."), s.has("pos_embed")
    if not told and not tabled:
        raise UserError(
            f"{s.where} does not tell for which size of pictures its network is (PixArt without pos_embed): give its config.json (--config)"
        )
    side = patch * _square(s, "pos_embed", s.size("pos_embed", 1, 3)) if tabled else 128
    sigma = s.has("y_embedder.y_embedding") and s.size("y_embedder.y_embedding", 0, 2) == 300
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": _heads(s, width, 72),
        "attention_head_dim": 72,
        "in_channels": s.size("x_embedder.proj.weight", 1, 4),
        "out_channels": s.size("final_layer.linear.bias") // patch**2,
        "num_layers": s.count("blocks."),
        "cross_attention_dim": width,
        "sample_size": side,
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": 0.5 if sigma and side == 32 else max(side // 64, 1),
        "use_additional_conditions": told,
        "caption_channels": s.size("y_embedder.y_proj.fc1.weight", 1, 2),
    }


def t5_config(s: Shapes) -> dict[str, Any]:
    """transformers' fields of T5EncoderModel, version 1.1 (gated MLPs)."""
    first = "encoder.block.0.layer"
    inner = s.size(f"{first}.0.SelfAttention.q.weight", 0, 2)
    buckets, heads = (
        s.size(f"{first}.0.SelfAttention.relative_attention_bias.weight", axis, 2)
        for axis in (0, 1)
    )
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": s.size("encoder.final_layer_norm.weight"),
        "d_kv": inner // max(heads, 1),
        "d_ff": s.size(f"{first}.1.DenseReluDense.wi_0.weight", 0, 2),
        "num_heads": heads,
        "num_layers": s.count("encoder.block."),
        "vocab_size": s.size("shared.weight", 0, 2),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
