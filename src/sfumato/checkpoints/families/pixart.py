"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) and PixArt-Sigma (Chen et al. 2024,
arXiv:2403.04692) on disk.

One modulation for all blocks (`t_block`), to which every block adds a table of its own. Two things
of the original are not in diffusers' network, and are left out both ways, as in diffusers:
`pos_embed`, a table of sines, and `y_embedder.y_embedding`, the tokens that stood for dropped
captions in training.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._transformer import SINUSOIDAL, TransformerFamily
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, linear, weight
from sfumato.errors import UserError
from sfumato.predict.conditioners.t5_text import T5Text

_HEAD = 72


class PixArt(TransformerFamily):
    """PixArt: networks alone."""

    name, title = "pixart", "PixArt"
    class_name, mark = "PixArtTransformer2DModel", "y_embedder.y_proj.fc1.weight"
    unread = ("pos_embed", "y_embedder.y_embedding")
    conditioner_class = T5Text
    pipelines: ClassVar = {"PixArt": {"steps": 20, "guidance": 4.5}}

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields. The size comes from the table of positions or, where only that can be,
        from embedding sizes.

        Sigma's captions are 300 tokens long and alpha's 120; its network for 256 pixels has half
        the steps between positions (Chen et al. 2024).
        """
        width, patch = (
            shapes.size("x_embedder.proj.bias"),
            shapes.size("x_embedder.proj.weight", 2, 4),
        )
        sized, tabled = shapes.has("csize_embedder."), shapes.has("pos_embed")
        if not sized and not tabled:
            raise UserError(
                f"{shapes.where} does not tell for which size of pictures its network is (PixArt without pos_embed): give its config.json (--config)"
            )
        side = patch * shapes.square("pos_embed", shapes.size("pos_embed", 1, 3)) if tabled else 128
        sigma = (
            shapes.has("y_embedder.y_embedding")
            and shapes.size("y_embedder.y_embedding", 0, 2) == 300
        )
        return {
            "_class_name": self.class_name,
            "num_attention_heads": shapes.heads(width, _HEAD),
            "attention_head_dim": _HEAD,
            "in_channels": shapes.size("x_embedder.proj.weight", 1, 4),
            "out_channels": shapes.size("final_layer.linear.bias") // patch**2,
            "num_layers": shapes.count("blocks."),
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

    def weight_map(self, config: Config) -> list[WeightMap]:
        """diffusers' names."""
        return list(_network(config))

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """By the length of prompts."""
        if not self.fits(network, conditioner):
            return None
        return (
            "PixArtAlphaPipeline"
            if conditioner.config.max_sequence_length <= 120
            else "PixArtSigmaPipeline"
        )


FAMILIES = (PixArt(),)


def has_sizes(config: Config) -> bool:
    """Whether the network embeds the image's size; by default only the one for 1024 pixels does."""
    given = config.get("use_additional_conditions")
    return config["sample_size"] == 128 if given is None else bool(given)


def _network(config: Config) -> Iterator[WeightMap]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, channels = config["patch_size"], config["in_channels"]
    yield from linear("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
    embedders = [("t", "timestep", width)]
    if has_sizes(config):
        embedders += [("csize", "resolution", width // 3), ("ar", "aspect_ratio", width // 3)]
    for source, target, wide in embedders:
        yield from linear(
            f"{source}_embedder.mlp.0",
            f"adaln_single.emb.{target}_embedder.linear_1",
            wide,
            SINUSOIDAL,
        )
        yield from linear(
            f"{source}_embedder.mlp.2", f"adaln_single.emb.{target}_embedder.linear_2", wide, wide
        )
    yield from linear("t_block.1", "adaln_single.linear", 6 * width, width)
    yield from linear(
        "y_embedder.y_proj.fc1", "caption_projection.linear_1", width, config["caption_channels"]
    )
    yield from linear("y_embedder.y_proj.fc2", "caption_projection.linear_2", width, width)
    for k in range(config["num_layers"]):
        yield from _block(f"blocks.{k}", f"transformer_blocks.{k}", width)
    yield weight("final_layer.scale_shift_table", "scale_shift_table", 2, width)
    yield from linear(
        "final_layer.linear",
        "proj_out",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )


def _block(source: str, target: str, width: int) -> Iterator[WeightMap]:
    yield weight(f"{source}.scale_shift_table", f"{target}.scale_shift_table", 6, width)
    yield from chunked(
        f"{source}.attn.qkv", [f"{target}.attn1.to_{a}" for a in "qkv"], width, width
    )
    yield from linear(f"{source}.attn.proj", f"{target}.attn1.to_out.0", width, width)
    yield from linear(f"{source}.cross_attn.q_linear", f"{target}.attn2.to_q", width, width)
    yield from chunked(
        f"{source}.cross_attn.kv_linear", [f"{target}.attn2.to_{a}" for a in "kv"], width, width
    )
    yield from linear(f"{source}.cross_attn.proj", f"{target}.attn2.to_out.0", width, width)
    yield from linear(f"{source}.mlp.fc1", f"{target}.ff.net.0.proj", 4 * width, width)
    yield from linear(f"{source}.mlp.fc2", f"{target}.ff.net.2", width, 4 * width)
