"""FLUX.1 on disk (Black Forest Labs 2024, github.com/black-forest-labs/flux): dev, schnell, Fill,
Canny, Depth, Kontext.

A single block of the original has two layers: `linear1` holds q, k, v and the first layer of the
MLP on top of each other, `linear2` what follows both. The final layer's modulation holds (shift,
scale) there and (scale, shift) in diffusers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sfumato.checkpoints.families._base import ABSENT, Config
from sfumato.checkpoints.families._clip import ClipTower
from sfumato.checkpoints.families._t5 import T5Tower
from sfumato.checkpoints.families._transformer import FLOW, SINUSOIDAL, TransformerFamily, axes
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import Split, WeightMap, chunked, linear, swapped, weight
from sfumato.predict.conditioners.flux_text import SCHNELL, FluxText, FluxTextConfig

DYNAMIC = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""The shift of dev's times, which follows the number of tokens."""
STREAMS = (
    ("img", "to_{}", "norm_{}", "to_out.0"),
    ("txt", "add_{}_proj", "norm_added_{}", "to_add_out"),
)
"""The two halves of a double block: there, and here for q, k and v, their norms and what
follows."""
_PIPELINES = {0: "FluxPipeline", 16: "FluxControlPipeline", 80: "FluxFillPipeline"}
"""By channels beyond the latent's."""


class Flux(TransformerFamily):
    """FLUX.1."""

    name, title = "flux", "FLUX.1"
    class_name, mark = "FluxTransformer2DModel", "double_blocks.0.img_mod.lin.weight"
    latents = (0.3611, 0.1159)
    towers = (
        ClipTower("text_encoder", "text_encoders.clip_l.transformer."),
        T5Tower("text_encoder_2", "text_encoders.t5xxl.transformer."),
    )
    conditioner_class = FluxText
    even_times = True
    # Steps and guidance with which diffusers calls its pipelines; of models distilled to few steps
    # those of their cards.
    pipelines: ClassVar = {
        "Flux": {"steps": 28, "guidance": 1.0, "distilled_guidance": 3.5},
        "FluxFill": {"steps": 50, "guidance": 1.0, "distilled_guidance": 30.0},
        "FluxKontext": {
            "steps": 28,
            "guidance": 1.0,
            "distilled_guidance": 3.5,
            "max_reference_images": 1,
        },
    }

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields. Fill takes 384 channels in, Canny and Depth 128, the others 64."""
        width, head = (
            shapes.size("img_in.bias"),
            shapes.size("double_blocks.0.img_attn.norm.query_norm.scale"),
        )
        return {
            "_class_name": self.class_name,
            "patch_size": 1,
            "in_channels": shapes.size("img_in.weight", 1, 2),
            "out_channels": shapes.size("final_layer.linear.bias"),
            "num_layers": shapes.count("double_blocks."),
            "num_single_layers": shapes.count("single_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": shapes.heads(width, head),
            "joint_attention_dim": shapes.size("txt_in.weight", 1, 2),
            "pooled_projection_dim": shapes.size("vector_in.in_layer.weight", 1, 2),
            "guidance_embeds": shapes.has("guidance_in."),
            "axes_dims_rope": axes(shapes, head, [16, 56, 56]),  # base 10000
        }

    def weight_map(self, config: Config) -> list[WeightMap]:
        """diffusers' names."""
        return list(_network(config))

    def scheduler(self, config: Config) -> dict[str, Any]:
        """A shift that follows the number of tokens for dev, none for schnell."""
        return FLOW | (DYNAMIC if config.get("guidance_embeds") else {"shift": 1.0})

    def conditioner(self, encoders: Mapping[str, Any], network: Any, settings: Config) -> FluxText:
        """CLIP L and T5, with fewer positions for schnell."""
        shorter = {} if network.guidance_embeds else {"max_sequence_length": SCHNELL}
        return FluxText(
            encoders[""], encoders["_2"], FluxTextConfig.from_dict({**shorter, **settings})
        )

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """By what the network takes beside the latent: a masked image and a mask (Fill), a map
        (Control), or nothing.
        """
        return (
            _pipeline(network.in_channels - network.channels, references)
            if self.fits(network, conditioner)
            else None
        )

    def file_pipeline(self, config: Config, references: int) -> str:
        """By the channels of tokens, which are four of a latent's each."""
        channels = config.get("in_channels", 64)
        return (
            _pipeline((channels - (config.get("out_channels") or channels)) // 4, references)
            or "FluxPipeline"
        )

    def extras(
        self, pipeline: str, guidance: Any, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Parts that diffusers' pipelines may have and these models do not."""
        return (
            {"image_encoder": ABSENT, "feature_extractor": ABSENT}
            if pipeline in ("FluxPipeline", "FluxKontextPipeline")
            else {}
        )

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """schnell, which has no guidance embedding, takes four steps."""
        schnell = index.get("_class_name") == "FluxPipeline" and not learned_guidance
        return super().defaults(index, learned_guidance, scheduler) | (
            {"steps": 4} if schnell else {}
        )


FAMILIES = (Flux(),)


def _pipeline(beyond: int, references: int) -> str | None:
    name = _PIPELINES.get(beyond)
    return "FluxKontextPipeline" if name == "FluxPipeline" and references else name


def _network(config: Config) -> Iterator[WeightMap]:
    width, head = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["attention_head_dim"],
    )
    channels, patch = config["in_channels"], config.get("patch_size", 1)
    embedders = [
        ("time_in", "timestep_embedder", SINUSOIDAL),
        ("vector_in", "text_embedder", config["pooled_projection_dim"]),
    ]
    if config.get("guidance_embeds"):
        embedders.append(("guidance_in", "guidance_embedder", SINUSOIDAL))
    for source, target, taken in embedders:
        yield from linear(f"{source}.in_layer", f"time_text_embed.{target}.linear_1", width, taken)
        yield from linear(f"{source}.out_layer", f"time_text_embed.{target}.linear_2", width, width)
    yield from linear("img_in", "x_embedder", width, channels)
    yield from linear("txt_in", "context_embedder", width, config["joint_attention_dim"])
    for k in range(config["num_layers"]):
        yield from _double(f"double_blocks.{k}", f"transformer_blocks.{k}", width, head)
    for k in range(config["num_single_layers"]):
        yield from _single(f"single_blocks.{k}", f"single_transformer_blocks.{k}", width, head)
    yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width)
    yield from linear(
        "final_layer.linear",
        "proj_out",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _double(source: str, target: str, width: int, head: int) -> Iterator[WeightMap]:
    for side, layer, _, out in STREAMS:
        end = "" if side == "img" else "_context"
        yield from linear(
            f"{source}.{side}_mod.lin", f"{target}.norm1{end}.linear", 6 * width, width
        )
        yield from chunked(
            f"{source}.{side}_attn.qkv",
            [f"{target}.attn.{layer.format(a)}" for a in "qkv"],
            width,
            width,
        )
        yield from linear(f"{source}.{side}_attn.proj", f"{target}.attn.{out}", width, width)
        yield from linear(
            f"{source}.{side}_mlp.0", f"{target}.ff{end}.net.0.proj", 4 * width, width
        )
        yield from linear(f"{source}.{side}_mlp.2", f"{target}.ff{end}.net.2", width, 4 * width)
    yield from norms(source, target, head)


def norms(source: str, target: str, head: int) -> Iterator[WeightMap]:
    """Of q and k in both halves of a double block."""
    for side, _, norm, _ in STREAMS:
        for a, name in (("q", "query"), ("k", "key")):
            yield weight(
                f"{source}.{side}_attn.norm.{name}_norm.scale",
                f"{target}.attn.{norm.format(a)}.weight",
                head,
            )


def _single(source: str, target: str, width: int, head: int) -> Iterator[WeightMap]:
    yield from linear(f"{source}.modulation.lin", f"{target}.norm.linear", 3 * width, width)
    names = [*(f"{target}.attn.to_{a}" for a in "qkv"), f"{target}.proj_mlp"]
    sizes = (width, width, width, 4 * width)
    for kind, behind in (("weight", (width,)), ("bias", ())):
        targets = tuple(f"{name}.{kind}" for name in names)
        yield WeightMap(
            f"{source}.linear1.{kind}", targets, (sum(sizes), *behind), Split(sizes=sizes)
        )
    yield from linear(f"{source}.linear2", f"{target}.proj_out", width, 5 * width)
    for a, name in (("q", "query"), ("k", "key")):
        yield weight(f"{source}.norm.{name}_norm.scale", f"{target}.attn.norm_{a}.weight", head)
