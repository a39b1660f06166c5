"""DiT on disk (Peebles & Xie 2022, arXiv:2212.09748), and its layout, which SiT has too.

The original embeds time and class once; diffusers' network does so in every block, with the same
numbers. `pos_embed` is a table of sines there and not stored in diffusers' files:

    table[y, x] = [sin(x w), cos(x w), sin(y w), cos(y w)],   w[k] = 10000^(-k / (D/4)),   k = 0 ...
    D/4 - 1
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._transformer import SINUSOIDAL, TransformerFamily
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import Broadcast, Constant, WeightMap, chunked, linear
from sfumato.predict.conditioners.class_labels import ClassLabels

TABLE = "pos_embed"


class Dit(TransformerFamily):
    """DiT: networks alone."""

    name, title = "dit", "DiT"
    class_name, mark = "DiTTransformer2DModel", "y_embedder.embedding_table.weight"
    conditioner_class: type | None = ClassLabels
    pipelines: ClassVar = {"DiT": {"steps": 50, "guidance": 4.0}}

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """diffusers' fields. Heads are 72 wide where the width has such heads, and 64 elsewhere
        (table 1).
        """
        width, patch = (
            shapes.size("x_embedder.proj.bias"),
            shapes.size("x_embedder.proj.weight", 2, 4),
        )
        head = 72 if width % 72 == 0 else 64
        return {
            "_class_name": self.class_name,
            "num_attention_heads": shapes.heads(width, head),
            "attention_head_dim": head,
            "in_channels": shapes.size("x_embedder.proj.weight", 1, 4),
            "out_channels": shapes.size("final_layer.linear.bias") // patch**2,
            "num_layers": shapes.count("blocks."),
            "sample_size": patch * shapes.square(TABLE, shapes.size(TABLE, 1, 3)),
            "patch_size": patch,
            "num_embeds_ada_norm": shapes.size(self.mark, 0, 2) - 1,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        }

    def weight_map(self, config: Config) -> list[WeightMap]:
        """diffusers' names, and the table of positions, which the config determines."""
        return list(_network(config))

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """diffusers' pipeline knows ImageNet's thousand classes: class 1000 is none."""
        return (
            "DiTPipeline" if self.fits(network, conditioner) and network.classes == 1001 else None
        )

    def index(self, pipeline: str, conditioner: Any, guidance: Any) -> dict[str, Any]:
        """The labels of the classes."""
        return {"id2label": conditioner.to_id2label()}

    def folder_conditioner(self, index: Config, network: Any) -> ClassLabels | None:
        """Labels of model_index.json, which diffusers leaves out when it saves."""
        return (
            ClassLabels.from_id2label(index.get("id2label"), network.classes - 1)
            if network.classes > 1
            else None
        )


FAMILIES = (Dit(),)


def _network(config: Config) -> Iterator[WeightMap]:
    width, layers = (
        config["num_attention_heads"] * config["attention_head_dim"],
        range(config["num_layers"]),
    )
    patch, channels = config["patch_size"], config["in_channels"]
    yield from linear("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
    for source, target, taken in (("mlp.0", "linear_1", SINUSOIDAL), ("mlp.2", "linear_2", width)):
        yield from _shared(
            f"t_embedder.{source}", f"timestep_embedder.{target}", layers, "weight", width, taken
        )
        yield from _shared(
            f"t_embedder.{source}", f"timestep_embedder.{target}", layers, "bias", width
        )
    classes = config["num_embeds_ada_norm"] + 1
    yield from _shared(
        "y_embedder.embedding_table",
        "class_embedder.embedding_table",
        layers,
        "weight",
        classes,
        width,
    )
    for k in layers:
        source, target = f"blocks.{k}", f"transformer_blocks.{k}"
        yield from linear(
            f"{source}.adaLN_modulation.1", f"{target}.norm1.linear", 6 * width, width
        )
        yield from chunked(
            f"{source}.attn.qkv", [f"{target}.attn1.to_{a}" for a in "qkv"], width, width
        )
        yield from linear(f"{source}.attn.proj", f"{target}.attn1.to_out.0", width, width)
        yield from linear(f"{source}.mlp.fc1", f"{target}.ff.net.0.proj", 4 * width, width)
        yield from linear(f"{source}.mlp.fc2", f"{target}.ff.net.2", width, 4 * width)
    yield from linear("final_layer.adaLN_modulation.1", "proj_out_1", 2 * width, width)
    yield from linear(
        "final_layer.linear",
        "proj_out_2",
        patch * patch * (config.get("out_channels") or channels),
        width,
    )
    side = config["sample_size"] // config["patch_size"]
    yield WeightMap(
        TABLE, (), (1, side * side, width), Constant(value=lambda: grid_table(width, side))
    )


def _shared(source: str, target: str, layers: range, kind: str, *shape: int) -> Iterator[WeightMap]:
    yield WeightMap(
        f"{source}.{kind}",
        tuple(f"transformer_blocks.{k}.norm1.emb.{target}.{kind}" for k in layers),
        shape,
        Broadcast(),
    )


def grid_table(width: int, side: int) -> Tensor:
    """(1, side * side, width) in float32: the table above, row by row of the grid."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    x, y = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([x, y], -1).reshape(1, side * side, width).float()
