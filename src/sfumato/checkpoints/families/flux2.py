"""FLUX.2 on disk (Black Forest Labs 2025, github.com/black-forest-labs/flux2): dev and klein.

No layer of the transformer has a bias. Its blocks share three modulations; MLPs are gated (twice
the width in, half of it the gate), and in a single block q, k, v and the MLP's first layer are one
layer there and in diffusers. The final layer's modulation holds (shift, scale) there and (scale,
shift) in diffusers. In the autoencoder's file the convolutions around the latent belong to the
encoder and the decoder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from sfumato.checkpoints.checkpoint import Component
from sfumato.checkpoints.families._base import AUTOENCODERS, Config, Section
from sfumato.checkpoints.families._transformer import SINUSOIDAL, TransformerFamily, axes
from sfumato.checkpoints.families._vae import vae_config, vae_map
from sfumato.checkpoints.families.flux import STREAMS, norms
from sfumato.checkpoints.lazy_tensor import LazyTensor
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, swapped, weight
from sfumato.errors import UserError
from sfumato.predict.conditioners.flux2_text import Flux2Text

AUTOENCODER = "AutoencoderKLFlux2"
BATCHES = "bn.num_batches_tracked"
"""How often the autoencoder's batch norm was run while it was trained: a whole number that nothing
reads."""
_NORM = "bn.running_mean"


class Flux2(TransformerFamily):
    """FLUX.2, networks and autoencoders alone: there are no whole files."""

    name, title = "flux2", "FLUX.2"
    class_name, mark = "Flux2Transformer2DModel", "double_stream_modulation_img.lin.weight"
    conditioner_class = Flux2Text
    even_times = True
    shift_rule = "flux2"
    # Steps and guidance with which diffusers calls its pipelines.
    pipelines: ClassVar = {
        "Flux2": {
            "steps": 50,
            "guidance": 1.0,
            "distilled_guidance": 4.0,
            "max_reference_images": 10,
        },
        "Flux2Klein": {"steps": 50, "guidance": 4.0, "max_reference_images": 4},
    }

    def detect(self, shapes: Shapes) -> bool:
        """The network's mark, or the autoencoder's batch norm."""
        return super().detect(shapes) or any(
            prefix + _NORM in shapes.table for prefix in ("", *AUTOENCODERS)
        )

    def holds(self, components: Mapping[str, Component]) -> bool:
        """Whether the network is of this class, or the autoencoder alone."""
        lone = (
            components.keys() == {"vae"}
            and components["vae"].config.get("_class_name") == AUTOENCODER
        )
        return lone or super().holds(components)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields."""
        width, head = (
            shapes.size("img_in.weight", 0, 2),
            shapes.size("double_blocks.0.img_attn.norm.query_norm.scale"),
        )
        inner = shapes.size("double_blocks.0.img_mlp.2.weight", 1, 2)
        return {
            "_class_name": self.class_name,
            "patch_size": 1,
            "in_channels": shapes.size("img_in.weight", 1, 2),
            "out_channels": shapes.size("final_layer.linear.weight", 0, 2),
            "num_layers": shapes.count("double_blocks."),
            "num_single_layers": shapes.count("single_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": shapes.heads(width, head),
            "joint_attention_dim": shapes.size("txt_in.weight", 1, 2),
            "timestep_guidance_channels": shapes.size("time_in.in_layer.weight", 1, 2),
            "mlp_ratio": inner / width,
            "axes_dims_rope": axes(shapes, head, [32, 32, 32, 32]),
            "rope_theta": 2000,
            "eps": 1e-6,
            "guidance_embeds": shapes.has("guidance_in."),
        }

    def weight_map(self, config: Config) -> list[WeightMap]:
        """diffusers' names."""
        return list(_network(config))

    def autoencoder(self, shapes: Shapes, config: Config | None) -> Section:
        """The statistics of its latents are in the file, so that it can stand alone."""
        known = config or (self.autoencoder_config(shapes) if shapes.has(_NORM) else None)
        return super().autoencoder(shapes, known)

    def autoencoder_config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields; the channels of its batch norm are packed two by two."""
        values = vae_config(shapes, 1.0, 1024)
        shared = (
            "in_channels",
            "out_channels",
            "down_block_types",
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
        )
        return {
            "_class_name": AUTOENCODER,
            **{key: values[key] for key in (*shared, "latent_channels")},
            "act_fn": "silu",
            "norm_num_groups": 32,
            "mid_block_add_attention": values["mid_block_add_attention"],
            "sample_size": 1024,
            "use_quant_conv": shapes.has("encoder.quant_conv."),
            "use_post_quant_conv": shapes.has("decoder.post_quant_conv."),
            "batch_norm_eps": 1e-4,
            "batch_norm_momentum": 0.1,
            "patch_size": [2, 2],
        }

    def autoencoder_map(self, config: Config) -> list[WeightMap]:
        """The table of its own class; others as in other families."""
        return (
            _autoencoder_map(config)
            if config.get("_class_name") == AUTOENCODER
            else super().autoencoder_map(config)
        )

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """By the language model that reads the prompts: Mistral for dev, Qwen for klein."""
        if not self.fits(network, conditioner):
            return None
        return (
            "Flux2Pipeline"
            if "Mistral" in conditioner.index()["text_encoder"][1]
            else "Flux2KleinPipeline"
        )

    def extras(
        self, pipeline: str, guidance: Any, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Whether klein was distilled, so that it runs without guidance."""
        return {"is_distilled": guidance == 1} if pipeline == "Flux2KleinPipeline" else {}

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """A distilled klein takes four steps, as on its card."""
        distilled = str(index.get("_class_name")).startswith("Flux2Klein") and index.get(
            "is_distilled"
        )
        return super().defaults(index, learned_guidance, scheduler) | (
            {"steps": 4, "guidance": 1.0} if distilled else {}
        )


FAMILIES = (Flux2(),)


def _network(config: Config) -> Iterator[WeightMap]:
    width, head = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["attention_head_dim"],
    )
    channels, patch, inner = (
        config["in_channels"],
        config.get("patch_size", 1),
        int(width * config.get("mlp_ratio", 3.0)),
    )
    sinusoidal = config.get("timestep_guidance_channels", SINUSOIDAL)
    embedders = ["timestep", "guidance"] if config.get("guidance_embeds", True) else ["timestep"]
    for name in embedders:
        source, target = f"{name.removesuffix('step')}_in", f"time_guidance_embed.{name}_embedder"
        yield weight(f"{source}.in_layer.weight", f"{target}.linear_1.weight", width, sinusoidal)
        yield weight(f"{source}.out_layer.weight", f"{target}.linear_2.weight", width, width)
    for name, vectors in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        yield weight(f"{name}.lin.weight", f"{name}.linear.weight", vectors * width, width)
    yield weight("img_in.weight", "x_embedder.weight", width, channels)
    yield weight("txt_in.weight", "context_embedder.weight", width, config["joint_attention_dim"])
    for k in range(config["num_layers"]):
        yield from _double(f"double_blocks.{k}", f"transformer_blocks.{k}", width, inner, head)
    for k in range(config["num_single_layers"]):
        source, target = f"single_blocks.{k}", f"single_transformer_blocks.{k}.attn"
        yield weight(
            f"{source}.linear1.weight",
            f"{target}.to_qkv_mlp_proj.weight",
            3 * width + 2 * inner,
            width,
        )
        yield weight(f"{source}.linear2.weight", f"{target}.to_out.weight", width, width + inner)
        for a, name in (("q", "query"), ("k", "key")):
            yield weight(f"{source}.norm.{name}_norm.scale", f"{target}.norm_{a}.weight", head)
    yield from swapped(
        "final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, width, bias=False
    )
    yield weight(
        "final_layer.linear.weight",
        "proj_out.weight",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _double(source: str, target: str, width: int, inner: int, head: int) -> Iterator[WeightMap]:
    for side, layer, _, out in STREAMS:
        end = "" if side == "img" else "_context"
        yield from chunked(
            f"{source}.{side}_attn.qkv",
            [f"{target}.attn.{layer.format(a)}" for a in "qkv"],
            width,
            width,
            bias=False,
        )
        yield weight(
            f"{source}.{side}_attn.proj.weight", f"{target}.attn.{out}.weight", width, width
        )
        yield weight(
            f"{source}.{side}_mlp.0.weight", f"{target}.ff{end}.linear_in.weight", 2 * inner, width
        )
        yield weight(
            f"{source}.{side}_mlp.2.weight", f"{target}.ff{end}.linear_out.weight", width, inner
        )
    yield from norms(source, target, head)


def _autoencoder_map(config: Config) -> list[WeightMap]:
    """The autoencoder's table; `UserError` for a decoder of other widths than the encoder, which
    has no names there.
    """
    widths = list(config["block_out_channels"])
    if list(config.get("decoder_block_out_channels") or widths) != widths:
        raise UserError(
            f"decoder_block_out_channels {config['decoder_block_out_channels']} beside block_out_channels {widths} has no name in the "
            "original layout: expected the same widths"
        )
    halves = {"quant_conv.": "encoder.", "post_quant_conv.": "decoder."}
    maps = [
        replace(
            m, source=next((p for k, p in halves.items() if m.source.startswith(k)), "") + m.source
        )
        for m in vae_map(config)
    ]
    patch = config.get("patch_size", (2, 2))
    packed = config["latent_channels"] * patch[0] * patch[1]
    batches = LazyTensor(torch.int64, (), lambda: torch.zeros((), dtype=torch.int64))
    norm = [weight(f"bn.running_{name}", f"bn.running_{name}", packed) for name in ("mean", "var")]
    return maps + norm + [WeightMap(BATCHES, (BATCHES,), (), default=batches)]
