"""FLUX.2 on disk: dev and klein.

Black Forest Labs 2025, github.com/black-forest-labs/flux2. No layer of the transformer has a bias.
Its blocks share three modulations. MLPs are gated: the first layer is twice as wide, and half of it
is the gate. In a single block q, k, v and the MLP's first layer are one layer there and in
diffusers. The final layer's modulation holds (shift, scale) there and (scale, shift) in diffusers.
In the autoencoder's file the convolutions around the latent belong to the encoder and the decoder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from sfumato.checkpoints.families._base import AUTOENCODERS, Components, Config, Section
from sfumato.checkpoints.families._layers import below, listed, matrix, unnamed
from sfumato.checkpoints.families._transformer import SINUSOIDAL, TransformerFamily, axes
from sfumato.checkpoints.families._vae import vae_config, vae_map
from sfumato.checkpoints.families.flux import HEAD, STREAMS, norms, stream_fields
from sfumato.checkpoints.lazy_tensor import LazyTensor
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, swapped, weight
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.flux2_text import Flux2Text
from sfumato.predict.guidance.settings import Guidance
from sfumato.predict.networks.base import Network

AUTOENCODER = "AutoencoderKLFlux2"
BATCHES = "bn.num_batches_tracked"
"""Training steps of the autoencoder's batch norm: a whole number that nothing reads."""
_NORM = "bn.running_mean"
_VAE_FIELDS = (
    *("in_channels", "out_channels", "down_block_types", "up_block_types"),
    *("block_out_channels", "layers_per_block", "latent_channels"),
)
_MODULATIONS = {
    "double_stream_modulation_img": 6,
    "double_stream_modulation_txt": 6,
    "single_stream_modulation": 3,
}
"""Vectors of each modulation."""
_DEV = {"steps": 50, "guidance": 1.0, "distilled_guidance": 4.0}


class Flux2(TransformerFamily):
    """FLUX.2, networks and autoencoders alone: there are no whole files."""

    name, title = "flux2", "FLUX.2"
    class_name, mark = "Flux2Transformer2DModel", "double_stream_modulation_img.lin.weight"
    conditioner_class = Flux2Text
    even_times = True
    shift_rule = "flux2"
    # Steps and guidance with which diffusers calls its pipelines.
    pipelines: ClassVar = {
        "Flux2": _DEV | {"max_reference_images": 10},
        "Flux2Klein": {"steps": 50, "guidance": 4.0, "max_reference_images": 4},
    }

    def detect(self, shapes: Shapes) -> bool:
        """True for the network's mark, and for the autoencoder's batch norm."""
        normed = any(prefix + _NORM in shapes.table for prefix in ("", *AUTOENCODERS))
        return normed or super().detect(shapes)

    def holds(self, components: Components) -> bool:
        """True where the network is of this class, or the autoencoder alone is FLUX.2's."""
        alone = components.keys() == {"vae"}
        return super().holds(components) or (
            alone and components["vae"].config.get("_class_name") == AUTOENCODER
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in diffusers' fields."""
        width, outputs = (
            shapes.size(f"{layer}.weight", 0, 2) for layer in ("img_in", "final_layer.linear")
        )
        return {
            "_class_name": self.class_name,
            **stream_fields(shapes, width, outputs),
            "timestep_guidance_channels": shapes.size("time_in.in_layer.weight", 1, 2),
            "mlp_ratio": shapes.size("double_blocks.0.img_mlp.2.weight", 1, 2) / width,
            "axes_dims_rope": axes(shapes, shapes.size(HEAD), [32, 32, 32, 32]),
            "rope_theta": 2000,
            "eps": 1e-6,
            "guidance_embeds": shapes.has("guidance_in."),
        }

    @listed
    def weight_map(self, config: Config) -> Iterator[WeightMap]:
        """Table with diffusers' names."""
        width, head = self.width(config), config["attention_head_dim"]
        inner = int(width * config.get("mlp_ratio", 3.0))
        sinusoidal = config.get("timestep_guidance_channels", SINUSOIDAL)
        for name in (
            ["timestep", "guidance"] if config.get("guidance_embeds", True) else ["timestep"]
        ):
            source = f"{name.removesuffix('step')}_in"
            target = f"time_guidance_embed.{name}_embedder"
            yield matrix(f"{source}.in_layer", f"{target}.linear_1", width, sinusoidal)
            yield matrix(f"{source}.out_layer", f"{target}.linear_2", width, width)
        for name, vectors in _MODULATIONS.items():
            yield matrix(f"{name}.lin", f"{name}.linear", vectors * width, width)
        yield matrix("img_in", "x_embedder", width, config["in_channels"])
        yield matrix("txt_in", "context_embedder", width, config["joint_attention_dim"])
        for k in range(config["num_layers"]):
            block = _double(width, inner, head)
            yield from below(f"double_blocks.{k}", f"transformer_blocks.{k}", block)
        for k in range(config["num_single_layers"]):
            source, target = f"single_blocks.{k}", f"single_transformer_blocks.{k}.attn"
            joined = 3 * width + 2 * inner
            yield matrix(f"{source}.linear1", f"{target}.to_qkv_mlp_proj", joined, width)
            yield matrix(f"{source}.linear2", f"{target}.to_out", width, width + inner)
            yield from norms(f"{source}.norm", f"{target}.norm", head)
        final = "final_layer.adaLN_modulation.1"
        yield from swapped(final, "norm_out.linear", 2 * width, width, bias=False)
        yield matrix("final_layer.linear", "proj_out", self.outputs(config), width)

    def autoencoder(self, shapes: Shapes, config: Config | None) -> Section:
        """The autoencoder's section; the file holds the statistics of its latents."""
        if config is None and shapes.has(_NORM):
            config = self.autoencoder_config(shapes)
        return super().autoencoder(shapes, config)

    def autoencoder_config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in diffusers' fields; the channels of its batch norm are packed two by two."""
        values = vae_config(shapes, 1.0, 1024)
        return {
            "_class_name": AUTOENCODER,
            **{field: values[field] for field in _VAE_FIELDS},
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
        own = config.get("_class_name") == AUTOENCODER
        return _autoencoder_map(config) if own else super().autoencoder_map(config)

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """By the language model that encodes the prompts: Mistral for dev, Qwen for klein."""
        if not self.fits(network, conditioner):
            return None
        dev = "Mistral" in conditioner.index()["text_encoder"][1]
        return "Flux2Pipeline" if dev else "Flux2KleinPipeline"

    def extras(
        self, pipeline: str, guidance: object, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """A note whether klein was distilled, so that it runs without guidance."""
        if pipeline != "Flux2KleinPipeline":
            return {}
        return {"is_distilled": Guidance.parse(guidance).off}

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """Four steps for a distilled klein, as on its card."""
        klein = str(index.get("_class_name")).startswith("Flux2Klein")
        distilled = {"steps": 4, "guidance": 1.0} if klein and index.get("is_distilled") else {}
        return super().defaults(index, learned_guidance, scheduler) | distilled


FAMILIES = (Flux2(),)


def _double(width: int, inner: int, head: int) -> Iterator[WeightMap]:
    for side, end, layer, _, output in STREAMS:
        layers = [f"attn.{layer.format(a)}" for a in "qkv"]
        yield from chunked(f"{side}_attn.qkv", layers, width, width, bias=False)
        yield matrix(f"{side}_attn.proj", f"attn.{output}", width, width)
        yield matrix(f"{side}_mlp.0", f"ff{end}.linear_in", 2 * inner, width)
        yield matrix(f"{side}_mlp.2", f"ff{end}.linear_out", width, inner)
    for side, _, _, norm, _ in STREAMS:
        yield from norms(f"{side}_attn.norm", f"attn.{norm}", head)


def _autoencoder_map(config: Config) -> list[WeightMap]:
    """The autoencoder's table; `UserError` for a decoder of other widths than the encoder."""
    widths = list(config["block_out_channels"])
    decoder = list(config.get("decoder_block_out_channels") or widths)
    if decoder != widths:
        raise unnamed(f"decoder_block_out_channels {decoder}", f"{widths}, the block_out_channels")
    halves = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}
    maps = [
        replace(m, source=halves.get(m.source.partition(".")[0], "") + m.source)
        for m in vae_map(config)
    ]
    patch = config.get("patch_size", (2, 2))
    packed = config["latent_channels"] * patch[0] * patch[1]
    batches = LazyTensor(torch.int64, (), lambda: torch.zeros((), dtype=torch.int64))
    norm = [weight(f"bn.running_{name}", f"bn.running_{name}", packed) for name in ("mean", "var")]
    return maps + norm + [WeightMap(BATCHES, (BATCHES,), (), default=batches)]
