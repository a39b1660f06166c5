"""Diffusion transformers in the layouts of their first publication: which is which, and its table
of names.

    SD3     joint_blocks.*    model.diffusion_model. before the names, or nothing        FLUX.1,
            FLUX.2    double_blocks.*  single_blocks.*
    DiT, SiT, PixArt    blocks.*; the keys of SiT are DiT's, and its class must be named

A file may hold the network alone, or the autoencoder and text encoders too (`whole_files.py`).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.infer import Shapes
from sfumato.checkpoints.infer_transformer import (
    dit_config,
    flux2_config,
    flux_config,
    pixart_config,
    sd3_config,
    sit_config,
)
from sfumato.checkpoints.lazily import Lazy, Table, lazily_ours, lazily_theirs, outlines
from sfumato.checkpoints.names import dit, pixart
from sfumato.checkpoints.names.dit import dit_rows
from sfumato.checkpoints.names.flux import flux_rows
from sfumato.checkpoints.names.flux2 import flux2_rows
from sfumato.checkpoints.names.pixart import pixart_rows
from sfumato.checkpoints.names.rows import Row, check, check_ours, under
from sfumato.checkpoints.names.sd3 import sd3_rows
from sfumato.errors import UserError, explained

NOTE = "sfumato.transformer"
"""Metadata of files that sfumato wrote: fields of the config, as JSON, where keys and shapes tell
others or none."""
PREFIX = "model.diffusion_model."
Config = Mapping[str, Any]


def _nothing(config: Config) -> dict[str, Tensor]:
    return {}


def _places(config: Config) -> dict[str, Tensor]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {dit.TABLE: dit.grid_table(width, config["sample_size"] // config["patch_size"])}


@dataclass(frozen=True)
class Layout:
    """A kind of transformer: diffusers' class, a key that it alone has, its table, its config from
    shapes.

    made: what a file holds and a config tells. dropped: keys that may be there and are not read.
    """

    name: str
    class_name: str
    mark: str
    rows: Callable[[Config], list[Row]]
    config: Callable[[Shapes], dict[str, Any]]
    made: Callable[[Config], dict[str, Tensor]] = field(default=_nothing)
    dropped: tuple[str, ...] = ()


LAYOUTS = (
    Layout(
        "sd3",
        "SD3Transformer2DModel",
        "joint_blocks.0.context_block.attn.qkv.weight",
        sd3_rows,
        sd3_config,
    ),
    Layout(
        "flux",
        "FluxTransformer2DModel",
        "double_blocks.0.img_mod.lin.weight",
        flux_rows,
        flux_config,
    ),
    Layout(
        "flux2",
        "Flux2Transformer2DModel",
        "double_stream_modulation_img.lin.weight",
        flux2_rows,
        flux2_config,
    ),
    Layout(
        "dit",
        "DiTTransformer2DModel",
        "y_embedder.embedding_table.weight",
        dit_rows,
        dit_config,
        _places,
    ),
    Layout("sit", "SfumatoSiT", "y_embedder.embedding_table.weight", dit_rows, sit_config, _places),
    Layout(
        "pixart",
        "PixArtTransformer2DModel",
        "y_embedder.y_proj.fc1.weight",
        pixart_rows,
        pixart_config,
        dropped=pixart.DROPPED,
    ),
)


def layout_of_keys(keys: Iterable[str], named: object = None) -> tuple[Layout, str] | None:
    """The kind of transformer in a file and the prefix of its names; None where there is none.

    named: the class of its config, which tells SiT from DiT, whose keys are the same; without it
    they are DiT's.
    """
    keys = set(keys)
    found = [(k, p) for p in (PREFIX, "") for k in LAYOUTS if p + k.mark in keys]
    return next(
        (pair for pair in found if pair[0].class_name == named), found[0] if found else None
    )


def noted_class(notes: Mapping[str, str]) -> object:
    """The class of the network in a file that sfumato wrote, where keys do not tell it; None: they
    do, or the note is no table.
    """
    try:
        found = json.loads(notes.get(NOTE, "{}"))
    except ValueError:
        return None
    return found.get("_class_name") if isinstance(found, dict) else None


def layout_named(name: str) -> Layout:
    """By its own name, such as "sit"."""
    return next(k for k in LAYOUTS if k.name == name)


def layout_of_class(name: object) -> Layout | None:
    """By diffusers' name of the class."""
    return next((k for k in LAYOUTS if k.class_name == name), None)


def read_transformer(
    layout: Layout,
    prefix: str,
    theirs: Table,
    where: object,
    config: Config | None = None,
    notes: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """Config and tensors, in our names, of the network whose names begin with `prefix`; other keys
    of the table are not looked at.

    config: what the caller knows; else it is told by keys, shapes and the file's notes. `UserError`
    for a file that does not fit.
    """
    table = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
    shapes = {prefix + k: v.shape for k, v in table.items()}
    values = _config(layout, Shapes(shapes, prefix, where), config, notes or {})
    with explained(str(where)):
        rows, made = layout.rows(values), layout.made(values)
    table = _without_ones(rows, table)
    known = {prefix + k for k in (*made, *layout.dropped)}
    check(under(rows, prefix), {prefix + k: v for k, v in outlines(table).items()}, where, known)
    for key, value in made.items():
        if key in table and not _same(table[key].make(), value):
            raise UserError(
                f"{where}: {prefix}{key} is not the table that its config makes, and ours has no place for another: it cannot be read"
            )
    return values, lazily_ours(rows, table)


def _config(
    layout: Layout, s: Shapes, config: Config | None, notes: Mapping[str, str]
) -> dict[str, Any]:
    if config is not None:
        held = noted_class(notes) or layout.class_name
        if config.get("_class_name", held) != held:
            raise UserError(
                f"{s.where} holds a {held}, and the given config is of a {config['_class_name']}: give its own config"
            )
        return {"_class_name": layout.class_name, **config}
    try:
        noted = json.loads(notes.get(NOTE, "{}"))
    except ValueError as error:
        raise UserError(
            f"{s.where}: its note {NOTE} is not JSON ({error}): it may be damaged; copy it again"
        ) from error
    if not isinstance(noted, dict):
        raise UserError(
            f"{s.where}: its note {NOTE} is a {type(noted).__name__}: expected fields of a config; it may be damaged; copy it again"
        )
    if "num_layers" in noted:  # the whole config
        return {"_class_name": layout.class_name, **noted}
    return layout.config(s) | noted


def _same(found: Tensor, made: Tensor) -> bool:
    # what eight bits of mantissa leave of sines
    return found.shape == made.shape and torch.allclose(found.float(), made, atol=2e-2)


def _without_ones(rows: Iterable[Row], table: Table) -> dict[str, Lazy]:
    """Some writers of GGUF leave out sizes of 1 on the outside."""
    found = dict(table)
    for r in rows:
        lazy = found.get(r.theirs)
        if (
            lazy is not None
            and lazy.shape != r.stored
            and (1,) * (len(r.stored) - len(lazy.shape)) + lazy.shape == r.stored
        ):
            found[r.theirs] = _reshaped(lazy, r.stored)
    return found


def _reshaped(lazy: Lazy, shape: tuple[int, ...]) -> Lazy:
    return Lazy(lazy.dtype, shape, lambda: lazy.make().reshape(shape))


def write_transformer(
    layout: Layout, config: Config, ours: Table, where: object
) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The network under its original names, without prefix, and the notes that its file needs
    (`NOTE`), mostly none: what of the config a reader would not find out from the tensors.
    `UserError` for weights that do not fit the config.
    """
    rows = layout.rows(config)
    check_ours(rows, outlines(ours), where)
    made = {
        k: Lazy(torch.float32, tuple(v.shape), lambda v=v: v)
        for k, v in layout.made(config).items()
    }
    theirs = lazily_theirs(rows, ours) | made
    try:
        told = layout.config(Shapes({k: v.shape for k, v in theirs.items()}, "", "the single file"))
    except UserError:  # of no published kind: its config is the note
        told = {}
    untold = {
        k: v
        for k, v in config.items()
        if not k.startswith("_") and _differ(v, told.get(k)) and (not told or k in told)
    }
    if layout_of_keys(theirs) != (layout, ""):
        untold["_class_name"] = layout.class_name
    return theirs, {NOTE: json.dumps(untold, sort_keys=True)} if untold else {}


def _differ(given: Any, told: Any) -> bool:
    if given is None:  # the default, which depends on the other fields as what is told does
        return False
    if isinstance(given, int | float) and isinstance(told, int | float):
        return abs(given - told) > 1e-6 * abs(told)
    return (list(given) if isinstance(given, tuple) else given) != told
