"""Stable Diffusion 3 and 3.5 on disk (MMDiT, MMDiT-X).

Esser et al. 2024, arXiv:2403.03206. The original has one matrix for q, k and v. A block has
two halves, `x_block` for the image and `context_block` for the text; the last context block ends at
its attention. Modulations of two vectors, those of the last context block and of the final layer,
hold (shift, scale) there and (scale, shift) in diffusers; those of six and nine vectors are in the
same order. `pos_embed` is a table in both.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sfumato.checkpoints.families._base import ABSENT, Config, Encoders
from sfumato.checkpoints.families._clip import ClipTower
from sfumato.checkpoints.families._layers import below, embedder, listed, mlp, unnamed
from sfumato.checkpoints.families._t5 import T5Tower
from sfumato.checkpoints.families._transformer import FLOW, SINUSOIDAL, TEXTS, TransformerFamily
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, linear, swapped, weight
from sfumato.predict.conditioners.sd3_text import Sd3Text, Sd3TextConfig
from sfumato.predict.networks.base import Network

_HEAD = 64
_NORM = "joint_blocks.0.x_block.attn.ln_q."
_CLIP_L, _CLIP_G = f"{TEXTS}clip_l.transformer.", f"{TEXTS}clip_g.transformer."


class Sd3(TransformerFamily):
    """Stable Diffusion 3 and 3.5. T5 may be left out."""

    name, title = "sd3", "SD3"
    class_name, mark = "SD3Transformer2DModel", "joint_blocks.0.context_block.attn.qkv.weight"
    latents = (1.5305, 0.0609)
    towers = (
        ClipTower("text_encoder", _CLIP_L, projected=True, droppable=True),
        ClipTower("text_encoder_2", _CLIP_G, projected=True, activation="gelu"),
        T5Tower("text_encoder_3", f"{TEXTS}t5xxl.transformer."),
    )
    conditioner_class = Sd3Text
    even_times = False
    pipelines: ClassVar = {"StableDiffusion3": {"steps": 28, "guidance": 7.0}}
    optional = ("text_encoder_3",)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in diffusers' fields. Heads are as wide as the norms of q and k, or 64."""
        width, layers = shapes.size("x_embedder.proj.bias"), shapes.count("joint_blocks.")
        patch, side = shapes.size("x_embedder.proj.weight", 2, 4), shapes.square("pos_embed")
        normed = shapes.has(_NORM)
        head = shapes.size(f"{_NORM}weight") if normed else _HEAD
        dual = [k for k in range(layers) if shapes.has(f"joint_blocks.{k}.x_block.attn2.")]
        return {
            "_class_name": self.class_name,
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": shapes.size("x_embedder.proj.weight", 1, 4),
            "num_layers": layers,
            "attention_head_dim": head,
            "num_attention_heads": shapes.heads(width, head),
            "joint_attention_dim": shapes.size("context_embedder.weight", 1, 2),
            "caption_projection_dim": shapes.size("context_embedder.bias"),
            "pooled_projection_dim": shapes.size("y_embedder.mlp.0.weight", 1, 2),
            "out_channels": shapes.size("final_layer.linear.bias") // patch**2,
            "pos_embed_max_size": side,
            "dual_attention_layers": dual,
            "qk_norm": "rms_norm" if normed else None,
        }

    @listed
    def weight_map(self, config: Config) -> Iterator[WeightMap]:
        """Table with diffusers' names; `UserError` for a config without names there."""
        width, patch, channels = self.width(config), config["patch_size"], config["in_channels"]
        if config.get("qk_norm") not in (None, "rms_norm"):
            raise unnamed(f"qk_norm {config['qk_norm']!r}", "'rms_norm' or null")
        if (text_width := config["caption_projection_dim"]) != width:
            raise unnamed(
                f"caption_projection_dim {text_width}", f"{width}, the width of the blocks"
            )
        cells, text = config["pos_embed_max_size"] ** 2, config["joint_attention_dim"]
        pooled, last = config["pooled_projection_dim"], config["num_layers"] - 1
        yield weight("pos_embed", "pos_embed.pos_embed", 1, cells, width)
        yield from linear("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
        for source, name, inputs in (("t", "timestep", SINUSOIDAL), ("y", "text", pooled)):
            target = f"time_text_embed.{name}_embedder"
            yield from embedder(f"{source}_embedder", target, width, inputs)
        yield from linear("context_embedder", "context_embedder", width, text)
        for k in range(last + 1):
            source, target = f"joint_blocks.{k}", f"transformer_blocks.{k}"
            dual = k in config.get("dual_attention_layers", ())
            yield from below(f"{source}.x_block", target, _image(width, dual, config))
            yield from below(f"{source}.context_block", target, _text(width, k == last, config))
        yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width)
        yield from linear("final_layer.linear", "proj_out", self.outputs(config), width)

    def scheduler(self, config: Config) -> dict[str, Any]:
        """A flow with shift 3 (section 5.3.2)."""
        return FLOW | {"shift": 3.0}

    def conditioner(self, encoders: Encoders, network: Network, settings: Config) -> Sd3Text:
        """Both CLIPs, and T5. Without it the width of tokens is the network's."""
        wide = {} if "_3" in encoders else {"joint_attention_dim": network.token_width}
        values = Sd3TextConfig.from_dict({**wide, **settings})
        return Sd3Text(encoders[""], encoders["_2"], encoders.get("_3"), values)

    def file_pipeline(self, config: Config, references: int) -> str:
        """One pipeline for all of them."""
        return "StableDiffusion3Pipeline"

    def extras(
        self, pipeline: str, guidance: object, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Parts that these models do not have, and T5 where it is left out."""
        left_out = parts is not None and "text_encoder" in parts and "text_encoder_3" not in parts
        t5 = {"text_encoder_3": ABSENT, "tokenizer_3": ABSENT} if left_out else {}
        return {"image_encoder": ABSENT, "feature_extractor": ABSENT} | t5


FAMILIES = (Sd3(),)


def _image(width: int, dual: bool, config: Config) -> Iterator[WeightMap]:
    """The image's half of a block; `dual`: with a second attention, to itself alone (MMDiT-X)."""
    yield from linear("adaLN_modulation.1", "norm1.linear", (9 if dual else 6) * width, width)
    for name in ("attn", "attn2") if dual else ("attn",):
        yield from chunked(f"{name}.qkv", [f"{name}.to_{a}" for a in "qkv"], width, width)
        yield from _norms(name, f"{name}.norm", config)
        yield from linear(f"{name}.proj", f"{name}.to_out.0", width, width)
    yield from mlp("mlp", "ff", width)


def _text(width: int, last: bool, config: Config) -> Iterator[WeightMap]:
    """The text's half of a block; the last one modulates and attends only."""
    yield from chunked("attn.qkv", [f"attn.add_{a}_proj" for a in "qkv"], width, width)
    yield from _norms("attn", "attn.norm_added", config)
    if last:
        yield from swapped("adaLN_modulation.1", "norm1_context.linear", 2 * width, width)
        return
    yield from linear("adaLN_modulation.1", "norm1_context.linear", 6 * width, width)
    yield from linear("attn.proj", "attn.to_add_out", width, width)
    yield from mlp("mlp", "ff_context", width)


def _norms(source: str, target: str, config: Config) -> Iterator[WeightMap]:
    for a in "qk" if config.get("qk_norm") else "":
        head = config["attention_head_dim"]
        yield weight(f"{source}.ln_{a}.weight", f"{target}_{a}.weight", head)
