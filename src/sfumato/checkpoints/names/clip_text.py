"""CLIP's text tower (Radford et al. 2021, arXiv:2103.00020): transformers' CLIPTextModel <-> the
two layouts inside single files.

"clip" is transformers' own, behind a prefix: SD 1 and the first encoder of SDXL. "open_clip"
(Cherti et al. 2023, arXiv:2212.07143) is that of SD 2, SDXL's second encoder and the refiner's: q,
k and v stacked in `in_proj`, the projection a plain matrix that multiplies from the right. Our
names carry `text_model.`, as the files of diffusers' time do; transformers 5 reads them with it and
without.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.checkpoints.names.rows import Form, Row, pair, row

PREFIX = "text_model."
Config = Mapping[str, Any]


def projects(config: Config) -> bool:
    """Whether the config is a CLIPTextModelWithProjection's."""
    return "CLIPTextModelWithProjection" in (config.get("architectures") or ())


def clip_rows(config: Config, prefixed: bool = True) -> list[Row]:
    """transformers' layout, with `text_model.` in their names or (some old files) without."""
    names = PREFIX if prefixed else ""
    return [
        r._replace(theirs=names + r.theirs.removeprefix(PREFIX))
        if r.theirs.startswith(PREFIX)
        else r
        for r in _clip(config)
    ]


def _clip(config: Config) -> Iterator[Row]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    names = [
        ("embeddings.token_embedding.weight", (config["vocab_size"], width)),
        ("embeddings.position_embedding.weight", (config["max_position_embeddings"], width)),
    ]
    for name, shape in names:
        yield row(PREFIX + name, PREFIX + name, *shape)
    for k in range(config["num_hidden_layers"]):
        layer = f"{PREFIX}encoder.layers.{k}"
        parts = [(f"self_attn.{p}_proj", (width, width)) for p in ("q", "k", "v", "out")]
        parts += [
            ("layer_norm1", (width,)),
            ("layer_norm2", (width,)),
            ("mlp.fc1", (inner, width)),
            ("mlp.fc2", (width, inner)),
        ]
        for part, shape in parts:
            yield from pair(f"{layer}.{part}", f"{layer}.{part}", *shape)
    yield from pair(f"{PREFIX}final_layer_norm", f"{PREFIX}final_layer_norm", width)
    if projects(config):
        yield row(
            "text_projection.weight", "text_projection.weight", config["projection_dim"], width
        )


def open_clip_rows(config: Config) -> list[Row]:
    """open_clip's layout for the same tower."""
    return list(_open_clip(config))


def _open_clip(config: Config) -> Iterator[Row]:
    width, inner, embeddings = (
        config["hidden_size"],
        config["intermediate_size"],
        f"{PREFIX}embeddings",
    )
    yield row(
        "token_embedding.weight",
        f"{embeddings}.token_embedding.weight",
        config["vocab_size"],
        width,
    )
    yield row(
        "positional_embedding",
        f"{embeddings}.position_embedding.weight",
        config["max_position_embeddings"],
        width,
    )
    for k in range(config["num_hidden_layers"]):
        theirs, ours = f"transformer.resblocks.{k}", f"{PREFIX}encoder.layers.{k}"
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            stack = tuple(f"{ours}.self_attn.{p}_proj.{kind}" for p in ("q", "k", "v"))
            yield Row(f"{theirs}.attn.in_proj_{kind}", stack, shape, Form.STACKED)
        yield from pair(f"{theirs}.attn.out_proj", f"{ours}.self_attn.out_proj", width, width)
        yield from pair(f"{theirs}.ln_1", f"{ours}.layer_norm1", width)
        yield from pair(f"{theirs}.ln_2", f"{ours}.layer_norm2", width)
        yield from pair(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1", inner, width)
        yield from pair(f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2", width, inner)
    yield from pair("ln_final", f"{PREFIX}final_layer_norm", width)
    if projects(config):
        yield row(
            "text_projection",
            "text_projection.weight",
            config["projection_dim"],
            width,
            form=Form.TURNED,
        )
