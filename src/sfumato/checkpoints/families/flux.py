"""FLUX.1 on disk: dev, schnell, Fill, Canny, Depth, Kontext.

Black Forest Labs 2024, github.com/black-forest-labs/flux. A single block of the original has two
layers: `linear1` holds q, k, v and the first layer of the MLP on top of each other, `linear2` is
the layer after both. The final layer's modulation holds (shift, scale) there and (scale, shift) in
diffusers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sfumato.checkpoints.families._base import ABSENT, Config, Encoders
from sfumato.checkpoints.families._clip import ClipTower
from sfumato.checkpoints.families._layers import below, embedder, listed, mlp
from sfumato.checkpoints.families._t5 import T5Tower
from sfumato.checkpoints.families._transformer import (
    FLOW,
    SINUSOIDAL,
    TEXTS,
    TransformerFamily,
    axes,
)
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import Split, WeightMap, chunked, linear, swapped, weight
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.flux_text import SCHNELL, FluxText, FluxTextConfig
from sfumato.predict.networks.base import Network

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
    ("img", "", "to_{}", "norm", "to_out.0"),
    ("txt", "_context", "add_{}_proj", "norm_added", "to_add_out"),
)
"""The two halves of a double block.

Each is the original's name, then diffusers' names: the ending of modulation and MLP, the layers of
q, k and v, their norms, and the output of the attention.
"""
HEAD = "double_blocks.0.img_attn.norm.query_norm.scale"
"""A tensor as long as a head is wide."""
_PIPELINES = {0: "FluxPipeline", 16: "FluxControlPipeline", 80: "FluxFillPipeline"}
"""By channels beyond the latent's."""
_DEV = {"steps": 28, "guidance": 1.0, "distilled_guidance": 3.5}


class Flux(TransformerFamily):
    """FLUX.1."""

    name, title = "flux", "FLUX.1"
    class_name, mark = "FluxTransformer2DModel", "double_blocks.0.img_mod.lin.weight"
    latents = (0.3611, 0.1159)
    towers = (
        ClipTower("text_encoder", f"{TEXTS}clip_l.transformer."),
        T5Tower("text_encoder_2", f"{TEXTS}t5xxl.transformer."),
    )
    conditioner_class = FluxText
    even_times = True
    # Steps and guidance with which diffusers calls its pipelines; of models distilled to few steps
    # those of their cards.
    pipelines: ClassVar = {
        "Flux": _DEV,
        "FluxFill": {"steps": 50, "guidance": 1.0, "distilled_guidance": 30.0},
        "FluxKontext": _DEV | {"max_reference_images": 1},
    }

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in diffusers' fields.

        Fill takes 384 channels in, Canny and Depth 128, the others 64.
        """
        width, outputs = shapes.size("img_in.bias"), shapes.size("final_layer.linear.bias")
        return {
            "_class_name": self.class_name,
            **stream_fields(shapes, width, outputs),
            "pooled_projection_dim": shapes.size("vector_in.in_layer.weight", 1, 2),
            "guidance_embeds": shapes.has("guidance_in."),
            "axes_dims_rope": axes(shapes, shapes.size(HEAD), [16, 56, 56]),  # base 10000
        }

    @listed
    def weight_map(self, config: Config) -> Iterator[WeightMap]:
        """Table with diffusers' names."""
        width, head = self.width(config), config["attention_head_dim"]
        embedders = [
            ("time_in", "timestep", SINUSOIDAL),
            ("vector_in", "text", config["pooled_projection_dim"]),
        ]
        if config.get("guidance_embeds"):
            embedders.append(("guidance_in", "guidance", SINUSOIDAL))
        for source, name, inputs in embedders:
            target, layers = f"time_text_embed.{name}_embedder", ("in_layer", "out_layer")
            yield from embedder(source, target, width, inputs, layers)
        yield from linear("img_in", "x_embedder", width, config["in_channels"])
        yield from linear("txt_in", "context_embedder", width, config["joint_attention_dim"])
        for k in range(config["num_layers"]):
            yield from below(f"double_blocks.{k}", f"transformer_blocks.{k}", _double(width, head))
        for k in range(config["num_single_layers"]):
            target = f"single_transformer_blocks.{k}"
            yield from below(f"single_blocks.{k}", target, _single(width, head))
        yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width)
        yield from linear("final_layer.linear", "proj_out", self.outputs(config), width)

    def scheduler(self, config: Config) -> dict[str, Any]:
        """A shift that follows the number of tokens for dev, none for schnell."""
        return FLOW | (DYNAMIC if config.get("guidance_embeds") else {"shift": 1.0})

    def conditioner(self, encoders: Encoders, network: Network, settings: Config) -> FluxText:
        """CLIP L and T5, with fewer positions for schnell."""
        shorter = {} if network.guidance_embeds else {"max_sequence_length": SCHNELL}
        values = FluxTextConfig.from_dict({**shorter, **settings})
        return FluxText(encoders[""], encoders["_2"], values)

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """By the network's inputs beside the latent.

        They are a masked image and a mask (Fill), a map (Control), or nothing.
        """
        if not self.fits(network, conditioner):
            return None
        return _pipeline(network.in_channels - network.channels, references)

    def file_pipeline(self, config: Config, references: int) -> str:
        """By the channels of tokens, which are four of a latent's each."""
        channels = config.get("in_channels", 64)
        extra = (channels - (config.get("out_channels") or channels)) // 4
        return _pipeline(extra, references) or "FluxPipeline"

    def extras(
        self, pipeline: str, guidance: object, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Parts that diffusers' pipelines may have and these models do not."""
        if pipeline not in ("FluxPipeline", "FluxKontextPipeline"):
            return {}
        return {"image_encoder": ABSENT, "feature_extractor": ABSENT}

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """Four steps for schnell, which has no guidance embedding."""
        schnell = index.get("_class_name") == "FluxPipeline" and not learned_guidance
        return super().defaults(index, learned_guidance, scheduler) | (
            {"steps": 4} if schnell else {}
        )


FAMILIES = (Flux(),)


def _pipeline(extra: int, references: int) -> str | None:
    name = _PIPELINES.get(extra)
    return "FluxKontextPipeline" if name == "FluxPipeline" and references else name


def stream_fields(shapes: Shapes, width: int, outputs: int) -> dict[str, Any]:
    """The fields that FLUX.1's and FLUX.2's networks share."""
    head = shapes.size(HEAD)
    return {
        "patch_size": 1,
        "in_channels": shapes.size("img_in.weight", 1, 2),
        "out_channels": outputs,
        "num_layers": shapes.count("double_blocks."),
        "num_single_layers": shapes.count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": shapes.heads(width, head),
        "joint_attention_dim": shapes.size("txt_in.weight", 1, 2),
    }


def _double(width: int, head: int) -> Iterator[WeightMap]:
    for side, end, layer, _, output in STREAMS:
        layers = [f"attn.{layer.format(a)}" for a in "qkv"]
        yield from linear(f"{side}_mod.lin", f"norm1{end}.linear", 6 * width, width)
        yield from chunked(f"{side}_attn.qkv", layers, width, width)
        yield from linear(f"{side}_attn.proj", f"attn.{output}", width, width)
        yield from mlp(f"{side}_mlp", f"ff{end}", width, ("0", "2"))
    for side, _, _, norm, _ in STREAMS:
        yield from norms(f"{side}_attn.norm", f"attn.{norm}", head)


def norms(source: str, target: str, head: int) -> Iterator[WeightMap]:
    """The norms of q and k."""
    yield weight(f"{source}.query_norm.scale", f"{target}_q.weight", head)
    yield weight(f"{source}.key_norm.scale", f"{target}_k.weight", head)


def _single(width: int, head: int) -> Iterator[WeightMap]:
    yield from linear("modulation.lin", "norm.linear", 3 * width, width)
    names, sizes = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (width,) * 3 + (4 * width,)
    for kind, shape in (("weight", (7 * width, width)), ("bias", (7 * width,))):
        targets = tuple(f"{name}.{kind}" for name in names)
        yield WeightMap(f"linear1.{kind}", targets, shape, Split(sizes=sizes))
    yield from linear("linear2", "proj_out", width, 5 * width)
    yield from norms("norm", "attn.norm", head)
