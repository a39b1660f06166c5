"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) and PixArt-Sigma on disk.

PixArt-Sigma is Chen et al. 2024, arXiv:2403.04692. One modulation serves all blocks (`t_block`), to
which every block adds a table of its own. Two tensors of the original are not in diffusers'
network, and are left out both ways, as in diffusers: `pos_embed`, a table of sines, and
`y_embedder.y_embedding`, the tokens that stood for dropped captions in training.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._layers import attention, below, embedder, listed, mlp
from sfumato.checkpoints.families._transformer import SINUSOIDAL, TransformerFamily, patch_fields
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, linear, weight
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.t5_text import T5Text
from sfumato.predict.networks.base import Network

_HEAD = 72


class PixArt(TransformerFamily):
    """PixArt: networks alone."""

    name, title = "pixart", "PixArt"
    class_name, mark = "PixArtTransformer2DModel", "y_embedder.y_proj.fc1.weight"
    unread = ("pos_embed", "y_embedder.y_embedding")
    conditioner_class = T5Text
    pipelines: ClassVar = {"PixArt": {"steps": 20, "guidance": 4.5}}

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in diffusers' fields.

        The size follows from the table of positions; without one, embedded sizes mean 1024 pixels.
        Sigma's captions are 300 tokens long and alpha's 120; its network for 256 pixels has half
        the steps between positions (Chen et al. 2024).
        """
        width = shapes.size("x_embedder.proj.bias")
        patch = shapes.size("x_embedder.proj.weight", 2, 4)
        sized, tabled = shapes.has("csize_embedder."), shapes.has("pos_embed")
        if not sized and not tabled:
            raise shapes.error(
                "PixArt without pos_embed has no image size: give its config.json (--config)"
            )
        side = patch * shapes.square("pos_embed") if tabled else 128
        caption = "y_embedder.y_embedding"
        sigma = shapes.has(caption) and shapes.size(caption, 0, 2) == 300
        return {
            "_class_name": self.class_name,
            **patch_fields(shapes, width, _HEAD),
            "cross_attention_dim": width,
            "sample_size": side,
            "patch_size": patch,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "interpolation_scale": 0.5 if sigma and side == 32 else max(side // 64, 1),
            "use_additional_conditions": sized,
            "caption_channels": shapes.size("y_embedder.y_proj.fc1.weight", 1, 2),
        }

    @listed
    def weight_map(self, config: Config) -> Iterator[WeightMap]:
        """Table with diffusers' names."""
        width, patch, channels = self.width(config), config["patch_size"], config["in_channels"]
        yield from linear("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
        embedders = [("t", "timestep", width)]
        if has_sizes(config):
            embedders += [("csize", "resolution", width // 3), ("ar", "aspect_ratio", width // 3)]
        for source, name, wide in embedders:
            target = f"adaln_single.emb.{name}_embedder"
            yield from embedder(f"{source}_embedder", target, wide, SINUSOIDAL)
        yield from linear("t_block.1", "adaln_single.linear", 6 * width, width)
        inputs, layers = config["caption_channels"], ("fc1", "fc2")
        yield from embedder("y_embedder.y_proj", "caption_projection", width, inputs, layers)
        for k in range(config["num_layers"]):
            yield from below(f"blocks.{k}", f"transformer_blocks.{k}", _block(width))
        yield weight("final_layer.scale_shift_table", "scale_shift_table", 2, width)
        yield from linear("final_layer.linear", "proj_out", self.outputs(config), width)

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """By the length of prompts."""
        if not isinstance(conditioner, T5Text) or not self.fits(network, conditioner):
            return None
        alpha = conditioner.config.max_sequence_length <= 120
        return "PixArtAlphaPipeline" if alpha else "PixArtSigmaPipeline"


FAMILIES = (PixArt(),)


def has_sizes(config: Config) -> bool:
    """True where the network embeds the image's size; by default the one for 1024 pixels does."""
    sized = config.get("use_additional_conditions")
    return config["sample_size"] == 128 if sized is None else bool(sized)


def _block(width: int) -> Iterator[WeightMap]:
    yield weight("scale_shift_table", "scale_shift_table", 6, width)
    yield from attention("attn", "attn1", width)
    yield from linear("cross_attn.q_linear", "attn2.to_q", width, width)
    yield from chunked("cross_attn.kv_linear", ["attn2.to_k", "attn2.to_v"], width, width)
    yield from linear("cross_attn.proj", "attn2.to_out.0", width, width)
    yield from mlp("mlp", "ff", width)
