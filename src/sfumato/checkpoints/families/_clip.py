"""CLIP's text tower in the two layouts of single files.

Radford et al. 2021, arXiv:2103.00020. `ClipTower` is transformers' own layout (CLIPTextModel)
behind a prefix: SD 1, the first encoder of SDXL, SD 3 and FLUX.1. `OpenClipTower` (Cherti et al.
2023, arXiv:2212.07143) is that of SD 2, SDXL's second encoder and the refiner's: q, k and v
concatenated in `in_proj`, the projection a plain matrix that multiplies from the right. Our names
begin with `text_model.`, as in older files; transformers 5 reads them with it and without.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import Config, Tower
from sfumato.checkpoints.families._layers import below, listed
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import END, clip_tokenizer
from sfumato.checkpoints.weight_map import Chunk, Transpose, WeightMap, linear, weight
from sfumato.errors import WRONG, explained
from sfumato.predict.text_encoders import clip
from sfumato.predict.text_encoders.clip import CLASSES, PREFIX

PROJECTION = "text_projection.weight"


def projects(config: Config) -> bool:
    """True for a CLIPTextModelWithProjection's config."""
    return CLASSES[True] in (config.get("architectures") or ())


def clip_config(
    shapes: Shapes, layers: int, names: Mapping[str, str], projection: int | None, activation: str
) -> dict[str, Any]:
    """Config in transformers' fields, with heads 64 wide as in all published towers.

    Args:
        shapes: Of the tensors below the tower's prefix.
        layers: The number of layers.
        names: The keys of the final "norm", the first "mlp" bias, "tokens" and "positions".
        projection: The width of the projection; None: there is none.
        activation: Of the MLPs.
    """
    width = shapes.size(names["norm"])
    return {
        "architectures": [CLASSES[projection is not None]],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": shapes.size(names["mlp"]),
        "num_hidden_layers": layers,
        "num_attention_heads": shapes.heads(width, 64) if width > 64 else 1,
        "vocab_size": shapes.size(names["tokens"], 0, 2),
        "max_position_embeddings": shapes.size(names["positions"], 0, 2),
        "projection_dim": width if projection is None else projection,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        # transformers' sign for: pool at the largest token id, which is CLIP's end of text
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


class _ClipTower(Tower):
    """A CLIP text tower."""

    decisive = ("architectures", "hidden_act", "layer_norm_eps", "num_attention_heads")
    tokenizer_class = "CLIPTokenizer"

    def named(self, tensors: LazyTensors) -> dict[str, LazyTensor]:
        """Names with `text_model.`, without positions."""
        return {
            key if key.startswith((PREFIX, PROJECTION)) else PREFIX + key: lazy
            for key, lazy in tensors.items()
            if not key.endswith(".position_ids")
        }

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> clip.ClipEncoder:
        """The encoder with the tokenizer of a folder, or with CLIP's."""
        path, projected = raw.path, projects(component.config)
        opened = None if tokenizer is None else clip.load_tokenizer(tokenizer)
        tensors = {
            k.removeprefix(PREFIX): lazy.load()
            for k, lazy in component.tensors.items()
            if not k.endswith(clip.POSITIONS)
        }
        model = clip.build_clip(component.config, tensors, projected, options.opened, path, path)
        # the libraries raise any exception for a damaged vocabulary
        with explained(path, (Exception,) if opened is None else WRONG):
            if opened is None:
                length = model.config.max_position_embeddings
                opened = clip_tokenizer(self.pad, length, options.tokenizer, raw.metadata, self.end)
            return clip.ClipEncoder(opened, model, projected)


@dataclass(frozen=True)
class ClipTower(_ClipTower):
    """The layout of transformers, with `text_model.` in the names or (some old files) without.

    Attributes:
        projected: Whether the encoder has a projection.
        droppable: Whether files leave out a projection that changes nothing (CLIP L of SD 3).
        activation: Of the MLPs.
    """

    projected: bool = False
    droppable: bool = False
    activation: str = "quick_gelu"
    pad = END

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in transformers' fields."""
        start = "" if self.is_bare(shapes) else PREFIX
        names = {
            "norm": f"{start}final_layer_norm.weight",
            "mlp": f"{start}encoder.layers.0.mlp.fc1.bias",
            "tokens": f"{start}embeddings.token_embedding.weight",
            "positions": f"{start}embeddings.position_embedding.weight",
        }
        width = None
        if self.projected and shapes.has(PROJECTION):
            width = shapes.size(PROJECTION, 0, 2)
        elif self.projected:
            width = shapes.size(names["norm"])
        layers = shapes.count(f"{start}encoder.layers.")
        return clip_config(shapes, layers, names, width, self.activation)

    def is_bare(self, shapes: Shapes) -> bool:
        """True for names without `text_model.`."""
        return not shapes.has(PREFIX)

    @listed
    def weight_map(self, config: Config, bare: bool = False) -> Iterator[WeightMap]:
        """Table with transformers' names."""
        start, width = "" if bare else PREFIX, config["hidden_size"]
        tables = (("token", config["vocab_size"]), ("position", config["max_position_embeddings"]))
        for name, rows in tables:
            key = f"embeddings.{name}_embedding.weight"
            yield weight(start + key, PREFIX + key, rows, width)
        for k in range(config["num_hidden_layers"]):
            layer = f"encoder.layers.{k}"
            yield from below(start + layer, PREFIX + layer, _layer(config))
        yield from linear(f"{start}final_layer_norm", f"{PREFIX}final_layer_norm", width)
        if projects(config):
            shape = (config["projection_dim"], width)
            # where files leave it out, the pooled state is not projected
            one = LazyTensor(torch.float32, (width, width), lambda: torch.eye(width))
            default = one if shape[0] == width else None
            targets, drop = (PROJECTION,), self.droppable
            yield WeightMap(PROJECTION, targets, shape, default=default, droppable=drop)

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """Positions, the scale of CLIP's loss, and a projection that is not used."""
        unused = {f"{self.prefix.removesuffix('transformer.')}logit_scale"}
        if not projects(config):
            unused.add(self.prefix + PROJECTION)
        own = (key for key in keys if key.startswith(self.prefix))
        return unused | {key for key in own if key.endswith(".position_ids")}


def _layer(config: Config) -> Iterator[WeightMap]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for a in ("q", "k", "v", "out"):
        yield from linear(f"self_attn.{a}_proj", f"self_attn.{a}_proj", width, width)
    yield from linear("layer_norm1", "layer_norm1", width)
    yield from linear("layer_norm2", "layer_norm2", width)
    yield from linear("mlp.fc1", "mlp.fc1", inner, width)
    yield from linear("mlp.fc2", "mlp.fc2", width, inner)


@dataclass(frozen=True)
class OpenClipTower(_ClipTower):
    """The layout of open_clip.

    Attributes:
        penultimate: Whether the file holds the whole tower, whose last layer and projection are
            never used (SD 2); the component leaves them out.
    """

    penultimate: bool = False
    pad = "!"

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Config in transformers' fields."""
        blocks = "transformer.resblocks."
        names = {
            "norm": "ln_final.weight",
            "mlp": f"{blocks}0.mlp.c_fc.bias",
            "tokens": "token_embedding.weight",
            "positions": "positional_embedding",
        }
        layers, projected = shapes.count(blocks), shapes.has("text_projection")
        width = shapes.size("text_projection", 1, 2) if projected and not self.penultimate else None
        # The unused layer is there with the projection, or where all 24 layers of ViT-H are there.
        unused = self.penultimate and (projected or layers == 24)
        return clip_config(shapes, layers - unused, names, width, "gelu")

    @listed
    def weight_map(self, config: Config, bare: bool = False) -> Iterator[WeightMap]:
        """Table with open_clip's names."""
        width, table = config["hidden_size"], f"{PREFIX}embeddings.{{}}_embedding.weight"
        tokens, positions = config["vocab_size"], config["max_position_embeddings"]
        yield weight("token_embedding.weight", table.format("token"), tokens, width)
        yield weight("positional_embedding", table.format("position"), positions, width)
        for k in range(config["num_hidden_layers"]):
            source, target = f"transformer.resblocks.{k}", f"{PREFIX}encoder.layers.{k}"
            yield from below(source, target, _open_clip_layer(config))
        yield from linear("ln_final", f"{PREFIX}final_layer_norm", width)
        if projects(config):
            shape = (config["projection_dim"], width)
            yield weight("text_projection", PROJECTION, *shape, op=Transpose())

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """Keys of SD 2's files after the penultimate layer."""
        if not self.penultimate:
            return set()
        last = f"{self.prefix}transformer.resblocks.{config['num_hidden_layers']}."
        return {key for key in keys if key.startswith((last, f"{self.prefix}text_projection"))}


def _open_clip_layer(config: Config) -> Iterator[WeightMap]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for kind, shape in (("weight", (width, width)), ("bias", (width,))):
        layers = tuple(f"self_attn.{a}_proj.{kind}" for a in "qkv")
        yield WeightMap(f"attn.in_proj_{kind}", layers, shape, Chunk())
    yield from linear("attn.out_proj", "self_attn.out_proj", width, width)
    yield from linear("ln_1", "layer_norm1", width)
    yield from linear("ln_2", "layer_norm2", width)
    yield from linear("mlp.c_fc", "mlp.fc1", inner, width)
    yield from linear("mlp.c_proj", "mlp.fc2", width, inner)
