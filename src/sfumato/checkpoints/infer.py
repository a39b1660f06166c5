"""The config of every part of a single file, read from its keys and shapes alone.

Widths come from one-dimensional tensors (norms, biases), which cannot be transposed. Two things
leave no trace and are assumed: norms have 32 groups, and attention has as many heads as the
family's rule says (SD 1: 8; SD 2 and SDXL: heads 64 wide; CLIP: 64 wide).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.checkpoints.families import Family, Text
from sfumato.errors import UserError
from sfumato.predict.networks.unet import FIXED

# What the original layout stands for, in diffusers' fields: a config that says otherwise cannot be
# told by a file.
UNET_STANDARD: dict[str, Any] = FIXED | {
    "_class_name": "UNet2DConditionModel",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_only_cross_attention": None,
    "only_cross_attention": False,
    "downsample_padding": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
}
VAE_STANDARD: dict[str, Any] = {"act_fn": "silu", "norm_num_groups": 32}
KL_STANDARD: dict[str, Any] = {"shift_factor": None, "latents_mean": None, "latents_std": None}
VQ_STANDARD: dict[str, Any] = {"norm_type": "group", "lookup_from_codebook": False}


@dataclass(frozen=True)
class Shapes:
    """The shapes of a file's tensors below one prefix."""

    table: Mapping[str, tuple[int, ...]]
    prefix: str
    where: object

    def has(self, start: str) -> bool:
        """Whether any key starts so."""
        return any(k.startswith(self.prefix + start) for k in self.table)

    def size(self, key: str, axis: int = 0, rank: int = 1) -> int:
        """One side of a tensor of `rank` dimensions; `UserError` where it is missing or has another
        number of them.
        """
        if self.rank(key) != rank:
            shape = self.table[self.prefix + key]
            raise UserError(
                f"{self.where}: {self.prefix + key} has shape {shape}: expected {rank} dimensions; it may be damaged"
            )
        return self.table[self.prefix + key][axis]

    def rank(self, key: str) -> int:
        """The number of dimensions of one tensor; `UserError` where it is missing."""
        if self.prefix + key not in self.table:
            raise UserError(
                f"{self.where} lacks {self.prefix + key}, which tells its architecture: it may be damaged; copy it again"
            )
        return len(self.table[self.prefix + key])

    def count(self, start: str) -> int:
        """One more than the largest number that follows `start` in any key; 0 where none does."""
        pattern = re.compile(re.escape(self.prefix + start) + r"(\d{1,4})\.")
        return 1 + max((int(m[1]) for k in self.table if (m := pattern.match(k))), default=-1)


def one_or_all(values: list[Any]) -> Any:
    """One value where all levels agree."""
    return values[0] if all(v == values[0] for v in values) else values


def unet_config(
    s: Shapes, kind: Family, heads: int | None, head_width: int | None
) -> dict[str, Any]:
    """diffusers' config of the U-Net below `model.diffusion_model.`; `UserError` where heads cannot
    be known.
    """
    levels = _levels(s)
    widths = [s.size(f"input_blocks.{blocks[0]}.0.out_layers.0.weight") for blocks in levels]
    attends = [s.has(f"input_blocks.{blocks[0]}.1.") for blocks in levels]
    middle = "middle_block.1"
    if not s.has(f"{middle}.transformer_blocks."):
        raise UserError(
            f"{s.where}: a U-Net whose middle attends neither to tokens nor to itself is not supported"
        )
    depth = s.count(f"{middle}.transformer_blocks.")
    depths = [
        s.count(f"input_blocks.{b[0]}.1.transformer_blocks.") if a else None
        for b, a in zip(levels, attends, strict=True)
    ]
    if attends[-1] and depths[-1] != depth:
        raise UserError(
            f"{s.where}: its middle has {depth} transformer blocks and its last level {depths[-1]}: expected as many"
        )
    if all(d in (None, depth) for d in depths):
        # levels that do not attend have none, whatever is said of them
        depths = [depth] * len(widths)
    depths[-1] = depth
    context = s.size(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 1, 2)
    only = [
        a and s.size(f"input_blocks.{b[0]}.1.transformer_blocks.0.attn1.to_k.weight", 1, 2) != w
        for b, a, w in zip(levels, attends, widths, strict=True)
    ]
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    shift = s.size("input_blocks.1.0.emb_layers.1.bias") == 2 * widths[0]
    return UNET_STANDARD | {
        "sample_size": kind.sample_size,
        "in_channels": s.size("input_blocks.0.0.weight", 1, 4),
        "out_channels": s.size("out.2.bias"),
        "down_block_types": down,
        "up_block_types": [k.replace("Down", "Up") for k in reversed(down)],
        "block_out_channels": widths,
        "layers_per_block": one_or_all([len(b) for b in levels]),
        "cross_attention_dim": context,
        "transformer_layers_per_block": one_or_all([1 if d is None else d for d in depths]),
        "attention_head_dim": _heads(s, widths, heads, head_width),
        "use_linear_projection": s.rank(f"{middle}.proj_in.weight") == 2,
        "only_cross_attention": [bool(o) for o in only] if any(only) else False,
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        **_labels(s, kind),
    }


def _levels(s: Shapes) -> list[list[int]]:
    """The numbers of the residual blocks on the way down, one list a level."""
    levels: list[list[int]] = [[]]
    for n in range(1, s.count("input_blocks.")):
        if s.has(f"input_blocks.{n}.0.op."):
            levels.append([])
        else:
            levels[-1].append(n)
    if not all(levels):
        raise UserError(
            f"{s.where}: its U-Net has levels without residual blocks: it may be damaged; copy it again"
        )
    return levels


def _heads(
    s: Shapes, widths: list[int], heads: int | None, head_width: int | None
) -> int | list[int]:
    if heads is not None:
        return heads
    if head_width is None:
        raise UserError(
            f"{s.where} does not tell how many heads its attention has, and files of its kind differ: give heads, or its YAML"
        )
    wrong = [w for w in widths if w % head_width]
    if wrong:
        raise UserError(
            f"{s.where}: width {wrong[0]} does not divide into heads {head_width} wide: give heads, or its YAML"
        )
    return [w // head_width for w in widths]


def _labels(s: Shapes, kind: Family) -> dict[str, Any]:
    """What joins the time embedding."""
    if s.has("label_emb.weight"):
        return {"num_class_embeds": s.size("label_emb.weight", 0, 2)}
    if not s.has("label_emb.0."):
        return {}
    width = s.size("label_emb.0.0.weight", 1, 2)
    if not kind.sizes:
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    text = kind.texts[-1].prefix + "text_projection"
    shape = s.table.get(text)
    waves, rest = (
        divmod(width - shape[1], kind.sizes) if shape is not None and len(shape) == 2 else (256, 0)
    )
    if waves <= 0 or rest:
        raise UserError(
            f"{s.where}: a vector of {width} numbers is not a pooled text of {shape and shape[1]} and {kind.sizes} sizes"
        )
    named = {"addition_embed_type": "text_time", "addition_time_embed_dim": waves}
    return named | {"projection_class_embeddings_input_dim": width}


def vae_config(s: Shapes, scaling_factor: float, sample_size: int = 512) -> dict[str, Any]:
    """diffusers' config of the autoencoder below the prefix: AutoencoderKL, or VQModel where there
    is a codebook.
    """
    levels = s.count("encoder.down.")
    if not levels:
        raise UserError(
            f"{s.where} lacks {s.prefix}encoder.down.*: an autoencoder without its encoder is not supported"
        )
    attends = [s.has(f"encoder.down.{k}.attn.") for k in range(levels)]
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends]
    vq = s.has("quantize.")
    moments = s.size("encoder.conv_out.bias")
    config: dict[str, Any] = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        **VAE_STANDARD,
        "in_channels": s.size("encoder.conv_in.weight", 1, 4),
        "out_channels": s.size("decoder.conv_out.bias"),
        "down_block_types": down,
        "up_block_types": [k.replace("DownEncoder", "UpDecoder") for k in reversed(down)],
        "block_out_channels": [
            s.size(f"encoder.down.{k}.block.0.norm2.weight") for k in range(levels)
        ],
        "layers_per_block": s.count("encoder.down.0.block."),
        "latent_channels": moments if vq else moments // 2,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "mid_block_add_attention": s.has("encoder.mid.attn_1."),
    }
    if vq:
        codes = {axis: s.size("quantize.embedding.weight", axis, 2) for axis in (0, 1)}
        return config | {"num_vq_embeddings": codes[0], "vq_embed_dim": codes[1], **VQ_STANDARD}
    return (
        config
        | KL_STANDARD
        | {"use_quant_conv": s.has("quant_conv."), "use_post_quant_conv": s.has("post_quant_conv.")}
    )


def text_config(s: Shapes, text: Text) -> dict[str, Any]:
    """The config of a conditioner: transformers' CLIP fields, diffusers' LDMBert fields, or those
    of a table of classes.
    """
    if text.layout == "classes":
        n, width = (s.size("embedding.weight", axis, 2) for axis in (0, 1))
        return {"_class_name": "ClassEmbedder", "n_classes": n, "embed_dim": width}
    return _bert(s) if text.layout == "bert" else _clip(s, text)


def _bert(s: Shapes) -> dict[str, Any]:
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "d_model": s.size("norm.weight"),
        "encoder_layers": s.count("attn_layers.layers.") // 2,
        # x-transformers' default, with heads of one eighth of the inner width
        "encoder_attention_heads": 8,
        "head_dim": s.size("attn_layers.layers.0.1.to_q.weight", 0, 2) // 8,
        "encoder_ffn_dim": s.size("attn_layers.layers.1.1.net.0.0.bias"),
        "vocab_size": s.size("token_emb.weight", 0, 2),
        "max_position_embeddings": s.size("pos_emb.emb.weight", 0, 2),
        "activation_function": "gelu",
        "scale_embedding": False,
        "pad_token_id": 0,
    }


def _clip(s: Shapes, text: Text) -> dict[str, Any]:
    if text.layout == "open_clip":
        layers, blocks = s.count("transformer.resblocks."), "transformer.resblocks.0.mlp.c_fc.bias"
        norm, tokens, positions = (
            "ln_final.weight",
            "token_embedding.weight",
            "positional_embedding",
        )
    else:
        start = "text_model." if s.has("text_model.") else ""
        layers, blocks = s.count(f"{start}encoder.layers."), f"{start}encoder.layers.0.mlp.fc1.bias"
        norm, tokens = (
            f"{start}final_layer_norm.weight",
            f"{start}embeddings.token_embedding.weight",
        )
        positions = f"{start}embeddings.position_embedding.weight"
    width = s.size(norm)
    if width > 64 and width % 64:
        raise UserError(
            f"{s.where}: a text encoder of width {width} does not divide into heads 64 wide: it is of no known kind"
        )
    whole = text.layout == "open_clip" and s.has("text_projection")
    projecting = whole and not text.penultimate
    return {
        "architectures": ["CLIPTextModelWithProjection" if projecting else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": s.size(blocks),
        "num_hidden_layers": layers - 1 if text.penultimate and _whole_tower(s, layers) else layers,
        "num_attention_heads": max(1, width // 64),
        "vocab_size": s.size(tokens, 0, 2),
        "max_position_embeddings": s.size(positions, 0, 2),
        "projection_dim": s.size("text_projection", 1, 2) if projecting else width,
        "hidden_act": "gelu" if text.layout == "open_clip" else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        # transformers' sign for: pool at the largest token id, which is CLIP's end of text
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _whole_tower(s: Shapes, layers: int) -> bool:
    """Whether a file of SD 2 holds the layer that is never used: it does with the projection, or
    where all of ViT-H's 24 layers are there.
    """
    return s.has("text_projection") or layers == 24
