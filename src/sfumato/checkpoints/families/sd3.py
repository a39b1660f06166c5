"""Stable Diffusion 3 and 3.5 on disk (MMDiT, MMDiT-X; Esser et al. 2024, arXiv:2403.03206).

The original has one matrix for q, k and v. A block has two halves, `x_block` for the image and
`context_block` for the text; the last context block ends at its attention. Modulations of two
vectors, those of the last context block and of the final layer, hold (shift, scale) there and
(scale, shift) in diffusers; those of six and nine vectors are in the same order. `pos_embed` is a
table in both.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sfumato.checkpoints.families._base import ABSENT, Config
from sfumato.checkpoints.families._clip import ClipTower
from sfumato.checkpoints.families._t5 import T5Tower
from sfumato.checkpoints.families._transformer import FLOW, SINUSOIDAL, TransformerFamily
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, linear, swapped, weight
from sfumato.errors import UserError
from sfumato.predict.conditioners.sd3_text import Sd3Text, Sd3TextConfig

_HEAD = 64


class Sd3(TransformerFamily):
    """Stable Diffusion 3 and 3.5. T5 may be left out."""

    name, title = "sd3", "SD3"
    class_name, mark = "SD3Transformer2DModel", "joint_blocks.0.context_block.attn.qkv.weight"
    latents = (1.5305, 0.0609)
    towers = (
        ClipTower(
            "text_encoder", "text_encoders.clip_l.transformer.", projected=True, droppable=True
        ),
        ClipTower(
            "text_encoder_2", "text_encoders.clip_g.transformer.", projected=True, activation="gelu"
        ),
        T5Tower("text_encoder_3", "text_encoders.t5xxl.transformer."),
    )
    conditioner_class = Sd3Text
    even_times = False
    pipelines: ClassVar = {"StableDiffusion3": {"steps": 28, "guidance": 7.0}}
    optional = ("text_encoder_3",)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields. Heads are as wide as the norms of q and k say, or 64."""
        width, layers = shapes.size("x_embedder.proj.bias"), shapes.count("joint_blocks.")
        patch = shapes.size("x_embedder.proj.weight", 2, 4)
        normed = shapes.has("joint_blocks.0.x_block.attn.ln_q.")
        side = shapes.square("pos_embed", shapes.size("pos_embed", 1, 3))
        head = shapes.size("joint_blocks.0.x_block.attn.ln_q.weight") if normed else _HEAD
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
            "dual_attention_layers": [
                k for k in range(layers) if shapes.has(f"joint_blocks.{k}.x_block.attn2.")
            ],
            "qk_norm": "rms_norm" if normed else None,
        }

    def weight_map(self, config: Config) -> list[WeightMap]:
        """diffusers' names; `UserError` for what has no name there."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if config.get("qk_norm") not in (None, "rms_norm"):
            raise UserError(
                f"qk_norm {config['qk_norm']!r} has no name in SD3's original layout: expected 'rms_norm' or null"
            )
        if config["caption_projection_dim"] != width:
            raise UserError(
                f"caption_projection_dim {config['caption_projection_dim']} is not the width {width} of the blocks, to which the text is projected"
            )
        return list(_network(config, width))

    def scheduler(self, config: Config) -> dict[str, Any]:
        """A flow with shift 3 (section 5.3.2)."""
        return FLOW | {"shift": 3.0}

    def conditioner(self, encoders: Mapping[str, Any], network: Any, settings: Config) -> Sd3Text:
        """Both CLIPs, and T5 where it is there: without it the width of tokens is the network's."""
        wide = {} if "_3" in encoders else {"joint_attention_dim": network.token_width}
        return Sd3Text(
            encoders[""],
            encoders["_2"],
            encoders.get("_3"),
            Sd3TextConfig.from_dict({**wide, **settings}),
        )

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """One pipeline for all of them."""
        return "StableDiffusion3Pipeline" if self.fits(network, conditioner) else None

    def file_pipeline(self, config: Config, references: int) -> str:
        """One pipeline for all of them."""
        return "StableDiffusion3Pipeline"

    def extras(
        self, pipeline: str, guidance: Any, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Parts that these models do not have; T5 is named where it is left out, as diffusers wants
        it.
        """
        left_out = parts is not None and "text_encoder" in parts and "text_encoder_3" not in parts
        t5 = {"text_encoder_3": ABSENT, "tokenizer_3": ABSENT} if left_out else {}
        return {"image_encoder": ABSENT, "feature_extractor": ABSENT} | t5


FAMILIES = (Sd3(),)


def _network(config: Config, width: int) -> Iterator[WeightMap]:
    patch, channels = config["patch_size"], config["in_channels"]
    yield weight("pos_embed", "pos_embed.pos_embed", 1, config["pos_embed_max_size"] ** 2, width)
    yield from linear("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
    for source, target, taken in (
        ("t", "timestep", SINUSOIDAL),
        ("y", "text", config["pooled_projection_dim"]),
    ):
        yield from linear(
            f"{source}_embedder.mlp.0", f"time_text_embed.{target}_embedder.linear_1", width, taken
        )
        yield from linear(
            f"{source}_embedder.mlp.2", f"time_text_embed.{target}_embedder.linear_2", width, width
        )
    yield from linear("context_embedder", "context_embedder", width, config["joint_attention_dim"])
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
    yield from linear(
        "final_layer.linear",
        "proj_out",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _picture(
    source: str, target: str, width: int, dual: bool, config: Config
) -> Iterator[WeightMap]:
    """The picture's half of a block; dual: with a second attention, to itself alone (MMDiT-X)."""
    yield from linear(
        f"{source}.adaLN_modulation.1", f"{target}.norm1.linear", (9 if dual else 6) * width, width
    )
    for name in ("attn", "attn2") if dual else ("attn",):
        yield from chunked(
            f"{source}.{name}.qkv", [f"{target}.{name}.to_{a}" for a in "qkv"], width, width
        )
        yield from _norms(f"{source}.{name}", f"{target}.{name}.norm_{{}}", config)
        yield from linear(f"{source}.{name}.proj", f"{target}.{name}.to_out.0", width, width)
    yield from _forward(f"{source}.mlp", f"{target}.ff", width)


def _text(source: str, target: str, width: int, last: bool, config: Config) -> Iterator[WeightMap]:
    """The text's half; the last one modulates and attends only."""
    yield from chunked(
        f"{source}.attn.qkv", [f"{target}.attn.add_{a}_proj" for a in "qkv"], width, width
    )
    yield from _norms(f"{source}.attn", f"{target}.attn.norm_added_{{}}", config)
    if last:
        yield from swapped(
            f"{source}.adaLN_modulation.1", f"{target}.norm1_context.linear", 2 * width, width
        )
        return
    yield from linear(
        f"{source}.adaLN_modulation.1", f"{target}.norm1_context.linear", 6 * width, width
    )
    yield from linear(f"{source}.attn.proj", f"{target}.attn.to_add_out", width, width)
    yield from _forward(f"{source}.mlp", f"{target}.ff_context", width)


def _norms(source: str, target: str, config: Config) -> Iterator[WeightMap]:
    for a in "qk" if config.get("qk_norm") else "":
        yield weight(
            f"{source}.ln_{a}.weight", f"{target.format(a)}.weight", config["attention_head_dim"]
        )


def _forward(source: str, target: str, width: int) -> Iterator[WeightMap]:
    yield from linear(f"{source}.fc1", f"{target}.net.0.proj", 4 * width, width)
    yield from linear(f"{source}.fc2", f"{target}.net.2", width, 4 * width)
