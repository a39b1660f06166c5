"""DiT on disk (Peebles & Xie 2022, arXiv:2212.09748), and its layout, which SiT shares.

The original embeds time and class once; diffusers' network does so in every block, with the same
numbers. `pos_embed` is a table of sines there and not stored in diffusers' files:

    table[y, x] = [sin(x w), cos(x w), sin(y w), cos(y w)],  w[k] = 10000^(-k / (D/4)),  k < D/4
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._layers import attention, below, listed, mlp
from sfumato.checkpoints.families._transformer import SINUSOIDAL, TransformerFamily, patch_fields
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import Broadcast, Constant, WeightMap, linear
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.class_labels import ClassLabels
from sfumato.predict.networks.base import Network

TABLE = "pos_embed"


class Dit(TransformerFamily):
    """DiT: networks alone."""

    name, title = "dit", "DiT"
    class_name, mark = "DiTTransformer2DModel", "y_embedder.embedding_table.weight"
    conditioner_class: type | None = ClassLabels
    pipelines: ClassVar = {"DiT": {"steps": 50, "guidance": 4.0}}

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in diffusers' fields.

        Heads are 72 wide where 72 divides the width, else 64 (table 1).
        """
        width = shapes.size("x_embedder.proj.bias")
        patch = shapes.size("x_embedder.proj.weight", 2, 4)
        return {
            "_class_name": self.class_name,
            **patch_fields(shapes, width, 72 if width % 72 == 0 else 64),
            "sample_size": patch * shapes.square(TABLE),
            "patch_size": patch,
            "num_embeds_ada_norm": shapes.size(self.mark, 0, 2) - 1,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        }

    @listed
    def weight_map(self, config: Config) -> Iterator[WeightMap]:
        """Table with diffusers' names, and the table of positions, which the config determines."""
        width, patch, layers = self.width(config), config["patch_size"], range(config["num_layers"])
        classes, channels = config["num_embeds_ada_norm"] + 1, config["in_channels"]
        yield from linear("x_embedder.proj", "pos_embed.proj", width, channels, patch, patch)
        for source, target, shape in (
            ("t_embedder.mlp.0.weight", "timestep_embedder.linear_1.weight", (width, SINUSOIDAL)),
            ("t_embedder.mlp.0.bias", "timestep_embedder.linear_1.bias", (width,)),
            ("t_embedder.mlp.2.weight", "timestep_embedder.linear_2.weight", (width, width)),
            ("t_embedder.mlp.2.bias", "timestep_embedder.linear_2.bias", (width,)),
            (self.mark, "class_embedder.embedding_table.weight", (classes, width)),
        ):
            targets = tuple(f"transformer_blocks.{k}.norm1.emb.{target}" for k in layers)
            yield WeightMap(source, targets, shape, Broadcast())
        for k in layers:
            yield from below(f"blocks.{k}", f"transformer_blocks.{k}", _block(width))
        yield from linear("final_layer.adaLN_modulation.1", "proj_out_1", 2 * width, width)
        yield from linear("final_layer.linear", "proj_out_2", self.outputs(config), width)
        side = config["sample_size"] // patch
        table = Constant(value=lambda: grid_table(width, side))
        yield WeightMap(TABLE, (), (1, side * side, width), table)

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """A pipeline for ImageNet's thousand classes alone: class 1000 is none."""
        fits = self.fits(network, conditioner) and network.classes == 1001
        return "DiTPipeline" if fits else None

    def index(self, pipeline: str, conditioner: ClassLabels, guidance: object) -> dict[str, Any]:
        """The labels of the classes."""
        return {"id2label": conditioner.to_id2label()}

    def folder_conditioner(self, index: Config, network: Network) -> ClassLabels | None:
        """Labels of model_index.json, which diffusers leaves out when it saves."""
        if network.classes <= 1:
            return None
        return ClassLabels.from_id2label(index.get("id2label"), network.classes - 1)


FAMILIES = (Dit(),)


def _block(width: int) -> Iterator[WeightMap]:
    yield from linear("adaLN_modulation.1", "norm1.linear", 6 * width, width)
    yield from attention("attn", "attn1", width)
    yield from mlp("mlp", "ff", width)


def grid_table(width: int, side: int) -> Tensor:
    """(1, side * side, width) in float32: the table above, row by row of the grid."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    x, y = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([x, y], -1).reshape(1, side * side, width).float()
