"""CLIP's text tower (Radford et al. 2021, arXiv:2103.00020): transformers' CLIPTextModel and the
two layouts inside single files.

`ClipTower` is transformers' own layout behind a prefix: SD 1, the first encoder of SDXL, SD 3 and
FLUX.1. `OpenClipTower` (Cherti et al. 2023, arXiv:2212.07143) is that of SD 2, SDXL's second
encoder and the refiner's: q, k and v concatenated in `in_proj`, the projection a plain matrix that
multiplies from the right. Our names carry `text_model.`, as the files of diffusers' time do;
transformers 5 reads them with it and without.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import Config, Tower
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import END, clip_tokenizer
from sfumato.checkpoints.weight_map import Chunk, Transpose, WeightMap, linear, weight
from sfumato.errors import UserError, explained
from sfumato.predict.text_encoders.clip import (
    CLASSES,
    POSITIONS,
    PREFIX,
    ClipEncoder,
    build_clip,
    load_tokenizer,
)

PROJECTION = "text_projection.weight"


def projects(config: Config) -> bool:
    """Whether the config is a CLIPTextModelWithProjection's."""
    return CLASSES[True] in (config.get("architectures") or ())


def clip_config(
    shapes: Shapes, layers: int, names: Mapping[str, str], projection: int | None, activation: str
) -> dict[str, Any]:
    """transformers' fields of a tower whose heads are 64 wide, as all published ones are.

    Args:
        shapes: of the tensors below the tower's prefix
        layers: how many there are
        names: the keys of the final "norm", the first "mlp" bias, "tokens" and "positions"
        projection: the width of the projection; None: there is none
        activation: of the MLPs
    """
    width = shapes.size(names["norm"])
    if width > 64 and width % 64:
        raise UserError(
            f"{shapes.where}: a text encoder of width {width} does not divide into heads 64 wide: it is of no known kind"
        )
    return {
        "architectures": [CLASSES[projection is not None]],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": shapes.size(names["mlp"]),
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
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
    """A CLIP text tower. pad: the token that fills up prompts, as it was trained."""

    decisive = ("architectures", "hidden_act", "layer_norm_eps", "num_attention_heads")
    tokenizer_class = "CLIPTokenizer"
    pad: ClassVar[str]

    def named(self, tensors: LazyTensors) -> dict[str, LazyTensor]:
        """Names with `text_model.`, without positions."""
        return {
            key if key.startswith((PREFIX, PROJECTION)) else PREFIX + key: lazy
            for key, lazy in tensors.items()
            if not key.endswith(".position_ids")
        }

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> ClipEncoder:
        """The encoder with the tokenizer of a folder, or with CLIP's."""
        path, projected = raw.path, projects(component.config)
        opened = None if tokenizer is None else load_tokenizer(tokenizer)
        tensors = {
            k.removeprefix(PREFIX): lazy.load()
            for k, lazy in component.tensors.items()
            if not k.endswith(POSITIONS)
        }
        model = build_clip(component.config, tensors, projected, options.opened, path, path)
        if opened is not None:
            with explained(path):
                return ClipEncoder(opened, model, projected)
        # the libraries raise anything about a vocabulary that is none
        with explained(path, (Exception,)):
            length = model.config.max_position_embeddings
            return ClipEncoder(
                clip_tokenizer(self.pad, length, options.tokenizer, raw.metadata), model, projected
            )


@dataclass(frozen=True)
class ClipTower(_ClipTower):
    """transformers' layout, with `text_model.` in the names or (some old files) without.

    Attributes:
        projected: whether the encoder has a projection
        droppable: whether a projection that changes nothing is left out of files (CLIP L of SD 3)
        activation: of the MLPs
    """

    projected: bool = False
    droppable: bool = False
    activation: str = "quick_gelu"
    pad = END

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """transformers' fields."""
        start = "" if self.is_bare(shapes) else PREFIX
        names = {
            "norm": f"{start}final_layer_norm.weight",
            "mlp": f"{start}encoder.layers.0.mlp.fc1.bias",
        }
        names |= {
            kind: f"{start}embeddings.{name}_embedding.weight"
            for kind, name in (("tokens", "token"), ("positions", "position"))
        }
        width = None
        if self.projected:
            width = (
                shapes.size(PROJECTION, 0, 2)
                if shapes.has(PROJECTION)
                else shapes.size(names["norm"])
            )
        return clip_config(
            shapes, shapes.count(f"{start}encoder.layers."), names, width, self.activation
        )

    def is_bare(self, shapes: Shapes) -> bool:
        """Whether the names are without `text_model.`."""
        return not shapes.has(PREFIX)

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """transformers' names."""
        return list(_clip(config, "" if bare else PREFIX, self.droppable))

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """Positions, the scale of CLIP's loss, and a projection that is not used."""
        start = self.prefix.removesuffix("transformer.")
        return {
            f"{start}logit_scale",
            *(set() if projects(config) else {self.prefix + PROJECTION}),
        } | {key for key in keys if key.startswith(self.prefix) and key.endswith(".position_ids")}


def _clip(config: Config, start: str, droppable: bool) -> Iterator[WeightMap]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for name, rows in (
        ("token", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
    ):
        yield weight(
            f"{start}embeddings.{name}_embedding.weight",
            f"{PREFIX}embeddings.{name}_embedding.weight",
            rows,
            width,
        )
    for k in range(config["num_hidden_layers"]):
        layers = [(f"self_attn.{p}_proj", (width, width)) for p in ("q", "k", "v", "out")]
        layers += [
            ("layer_norm1", (width,)),
            ("layer_norm2", (width,)),
            ("mlp.fc1", (inner, width)),
            ("mlp.fc2", (width, inner)),
        ]
        for layer, shape in layers:
            yield from linear(
                f"{start}encoder.layers.{k}.{layer}", f"{PREFIX}encoder.layers.{k}.{layer}", *shape
            )
    yield from linear(f"{start}final_layer_norm", f"{PREFIX}final_layer_norm", width)
    if projects(config):
        shape = (config["projection_dim"], width)
        one = LazyTensor(
            torch.float32, (width, width), lambda: torch.eye(width)
        )  # where files leave it out: what is pooled is not projected
        yield WeightMap(
            PROJECTION,
            (PROJECTION,),
            shape,
            default=one if shape[0] == width else None,
            droppable=droppable,
        )


@dataclass(frozen=True)
class OpenClipTower(_ClipTower):
    """open_clip's layout.

    penultimate: the file holds the whole tower, whose last layer and projection are never used
    (SD 2); the component leaves them out.
    """

    penultimate: bool = False
    pad = "!"

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """transformers' fields."""
        blocks = "transformer.resblocks."
        names = {"norm": "ln_final.weight", "mlp": f"{blocks}0.mlp.c_fc.bias"}
        names |= {"tokens": "token_embedding.weight", "positions": "positional_embedding"}
        layers, projected = shapes.count(blocks), shapes.has("text_projection")
        width = shapes.size("text_projection", 1, 2) if projected and not self.penultimate else None
        # The unused layer is there with the projection, or where all of ViT-H's 24 layers are
        # there.
        unused = self.penultimate and (projected or layers == 24)
        return clip_config(shapes, layers - unused, names, width, "gelu")

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """open_clip's names."""
        return list(_open_clip(config))

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """What SD 2's files hold beyond the penultimate layer."""
        if not self.penultimate:
            return set()
        beyond = (
            f"{self.prefix}transformer.resblocks.{config['num_hidden_layers']}.",
            f"{self.prefix}text_projection",
        )
        return {key for key in keys if key.startswith(beyond)}


def _open_clip(config: Config) -> Iterator[WeightMap]:
    width, inner, embeddings = (
        config["hidden_size"],
        config["intermediate_size"],
        f"{PREFIX}embeddings",
    )
    yield weight(
        "token_embedding.weight",
        f"{embeddings}.token_embedding.weight",
        config["vocab_size"],
        width,
    )
    yield weight(
        "positional_embedding",
        f"{embeddings}.position_embedding.weight",
        config["max_position_embeddings"],
        width,
    )
    for k in range(config["num_hidden_layers"]):
        source, target = f"transformer.resblocks.{k}", f"{PREFIX}encoder.layers.{k}"
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            layers = tuple(f"{target}.self_attn.{p}_proj.{kind}" for p in ("q", "k", "v"))
            yield WeightMap(f"{source}.attn.in_proj_{kind}", layers, shape, Chunk())
        yield from linear(f"{source}.attn.out_proj", f"{target}.self_attn.out_proj", width, width)
        yield from linear(f"{source}.ln_1", f"{target}.layer_norm1", width)
        yield from linear(f"{source}.ln_2", f"{target}.layer_norm2", width)
        yield from linear(f"{source}.mlp.c_fc", f"{target}.mlp.fc1", inner, width)
        yield from linear(f"{source}.mlp.c_proj", f"{target}.mlp.fc2", width, inner)
    yield from linear("ln_final", f"{PREFIX}final_layer_norm", width)
    if projects(config):
        yield weight("text_projection", PROJECTION, config["projection_dim"], width, op=Transpose())
