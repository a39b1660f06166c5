"""Files with a diffusion transformer, alone or with the rest of its model, in parts; and parts as
such a file.

    model.diffusion_model.*   first_stage_model.* | vae.*   text_encoders.clip_l.transformer.*
                              text_encoders.clip_g.*  text_encoders.t5xxl.*

The network alone has its names without prefix, and so has an autoencoder alone (`ae.safetensors`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.checkpoints.families import VAES, Text
from sfumato.checkpoints.infer import Shapes, text_config, vae_config
from sfumato.checkpoints.infer_transformer import t5_config
from sfumato.checkpoints.lazily import Lazy, Table, lazily_ours, lazily_theirs, outlines
from sfumato.checkpoints.names.clip_text import PREFIX as CLIP
from sfumato.checkpoints.names.clip_text import clip_rows, projects
from sfumato.checkpoints.names.flux2 import BATCHES, flux2_vae_rows
from sfumato.checkpoints.names.ldm_vae import vae_rows
from sfumato.checkpoints.names.rows import Row, check, check_ours, under
from sfumato.checkpoints.names.t5 import TIED, t5_rows
from sfumato.checkpoints.transformer_files import (
    PREFIX,
    layout_of_class,
    layout_of_keys,
    noted_class,
    read_transformer,
    write_transformer,
)
from sfumato.errors import UserError, explained

TEXTS = "text_encoders."
TOWERS = {"sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}}
TOWERS |= {"flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}}
"""Folders of text encoders, and their names in the files of a family."""
LATENTS = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
"""Scale and shift of latents (diffusers' configs of the published folders), which no file holds."""
PROJECTION = "text_projection.weight"
Config = Mapping[str, Any]


@dataclass(frozen=True)
class LazyPart:
    """A network: its config in the fields of diffusers or transformers, its tensors in our
    names.
    """

    config: dict[str, Any]
    tensors: dict[str, Lazy]


def read_whole(
    table: Table,
    notes: Mapping[str, str],
    where: object,
    configs: Mapping[str, Config] | None = None,
    network: str | None = None,
) -> dict[str, LazyPart]:
    """Every part of a file: "transformer", "vae", "text_encoder", ... configs: what the caller
    knows of each. network: the transformer's class, where neither config nor notes tell it.

    `UserError` for a file of no known layout, and for one with keys that belong to no part.
    """
    configs, parts, taken = configs or {}, {}, set()
    found = layout_of_keys(
        table, configs.get("transformer", {}).get("_class_name") or noted_class(notes) or network
    )
    if found is not None:
        layout, prefix = found
        below = _below(table, prefix)
        parts["transformer"] = LazyPart(
            *read_transformer(layout, prefix, below, where, configs.get("transformer"), notes)
        )
        taken |= below.keys()
    family = found[0].name if found else ""
    prefix = next(
        (p for p in VAES if any(k.startswith(p) for k in table)), "" if found is None else None
    )
    if prefix is not None:
        if not any(k.startswith(f"{prefix}decoder.conv_in.") for k in table):
            shown = ", ".join(sorted(table)[:4]) or "none"
            raise UserError(
                f"{where} is of no known layout (its first keys: {shown}): expected a diffusion transformer (SD3, FLUX.1, FLUX.2, DiT, SiT, "
                "PixArt) or an autoencoder under its original names"
            )
        parts["vae"] = _read_vae(table, prefix, family, where, configs.get("vae"))
        taken |= {k for k in table if k.startswith(prefix)}
    for part, name in TOWERS.get(family, {}).items():
        start = f"{TEXTS}{name}.transformer."
        if any(k.startswith(start) for k in table):
            parts[part] = _read_text(table, start, name, family, where, configs.get(part))
            taken |= {k for k in table if k.startswith(start)} | {f"{TEXTS}{name}.logit_scale"}
    if odd := sorted(table.keys() - taken):
        raise UserError(
            f"{where} has {len(odd)} keys that belong to no part of it ({', '.join(odd[:8])}{', ...' if len(odd) > 8 else ''})"
        )
    return parts


def _below(table: Table, prefix: str) -> dict[str, Lazy]:
    """What may be the network's; without a prefix, what has another part's is not."""
    return {
        k: v
        for k, v in table.items()
        if k.startswith(prefix) and not (prefix == "" and k.startswith((*VAES, TEXTS)))
    }


def _vae_rows(config: Config) -> list[Row]:
    return (
        flux2_vae_rows(config)
        if config.get("_class_name") == "AutoencoderKLFlux2"
        else vae_rows(config)
    )


def _read_vae(
    table: Table, prefix: str, family: str, where: object, config: Config | None
) -> LazyPart:
    """An autoencoder. The scale of its latents is the family's; a file without a network does not
    tell it, but for FLUX.2's own.
    """
    theirs = {k: v for k, v in table.items() if k.startswith(prefix)}
    shapes = Shapes({k: v.shape for k, v in theirs.items()}, prefix, where)
    packed = shapes.has("bn.running_mean")
    if config is None and not packed and family not in LATENTS:
        raise UserError(
            f"{where} holds an autoencoder and does not tell the scale of its latents, which differs between models: give the folder of its "
            "config.json (--config)"
        )
    values = dict(config or (_flux2_vae_config(shapes) if packed else _vae_config(shapes, family)))
    with explained(str(where)):
        rows = _vae_rows(values)
    bare = {k.removeprefix(prefix): v for k, v in theirs.items()}
    _check(rows, bare, prefix, where, {BATCHES} if packed else ())
    tensors = lazily_ours(rows, bare)
    if packed:
        tensors[BATCHES] = bare.get(
            BATCHES, Lazy(torch.int64, (), lambda: torch.zeros((), dtype=torch.int64))
        )
    return LazyPart(values, tensors)


def _check(
    rows: list[Row], bare: Table, prefix: str, where: object, spare: Collection[str]
) -> None:
    """`rows.check` with the names of the file in its message."""
    check(
        under(rows, prefix),
        {prefix + k: v for k, v in outlines(bare).items()},
        where,
        {prefix + k for k in spare},
    )


def _vae_config(s: Shapes, family: str) -> dict[str, Any]:
    scale, shift = LATENTS[family]
    return vae_config(s, scale, 1024) | {"shift_factor": shift}


def _flux2_vae_config(s: Shapes) -> dict[str, Any]:
    """diffusers' fields of AutoencoderKLFlux2; the channels of its batch norm are packed two by
    two.
    """
    found = vae_config(s, 1.0, 1024)
    names = (
        "in_channels",
        "out_channels",
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
    )
    more = {
        "act_fn": "silu",
        "norm_num_groups": 32,
        "mid_block_add_attention": found["mid_block_add_attention"],
        "sample_size": 1024,
    }
    inside = {
        f"use_{name}": s.has(f"{half}.{name}.")
        for half, name in (("encoder", "quant_conv"), ("decoder", "post_quant_conv"))
    }
    own = {"batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "patch_size": [2, 2]}
    return {
        "_class_name": "AutoencoderKLFlux2",
        **{k: found[k] for k in names},
        **more,
        **inside,
        **own,
    }


def _read_text(
    table: Table, prefix: str, name: str, family: str, where: object, config: Config | None
) -> LazyPart:
    """A text encoder. `logit_scale`, beside them in some files, is not part of it."""
    bare = {k.removeprefix(prefix): v for k, v in table.items() if k.startswith(prefix)}
    shapes = Shapes({prefix + k: v.shape for k, v in bare.items()}, prefix, where)
    if name == "t5xxl":
        values = dict(config or t5_config(shapes))
        rows = t5_rows(values)
        _check(rows, bare, prefix, where, {TIED})
        return LazyPart(values, lazily_ours(rows, bare))
    values = dict(config or _clip_config(shapes, name, family))
    # CLIP L of SD3 is stored without: what it pools is not projected
    if projects(values) and PROJECTION not in bare:
        width = values["hidden_size"]
        bare[PROJECTION] = Lazy(torch.float32, (width, width), lambda: torch.eye(width))
    spare = {k for k in bare if k.endswith(".position_ids")} | (
        {PROJECTION} if not projects(values) else set()
    )
    rows = clip_rows(values, any(k.startswith(CLIP) for k in bare))
    _check(rows, bare, prefix, where, spare)
    return LazyPart(values, lazily_ours(rows, bare))


def _clip_config(s: Shapes, name: str, family: str) -> dict[str, Any]:
    """transformers' fields. SD3 takes what both towers pool through a projection, FLUX without
    one.
    """
    found = text_config(s, Text("", s.prefix, "clip"))
    if name == "clip_g":
        found["hidden_act"] = "gelu"
    if family == "sd3":
        found["architectures"] = ["CLIPTextModelWithProjection"]
        found["projection_dim"] = (
            s.size(PROJECTION, 0, 2) if s.has(PROJECTION) else found["hidden_size"]
        )
    return found


def write_whole(
    parts: Mapping[str, LazyPart], where: object
) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The parts under their original names, and the notes of their file: with prefixes, but for a
    network or an autoencoder alone.

    `UserError` for a part that has no place in a file of its family.
    """
    parts = dict(parts)
    alone = len(parts) == 1
    if alone and "vae" in parts:
        return _write_vae(parts["vae"], where), {}
    found = (
        layout_of_class(parts["transformer"].config.get("_class_name"))
        if "transformer" in parts
        else None
    )
    if found is None:
        raise UserError(
            f"{where} holds {' and '.join(sorted(parts)) or 'nothing'}: expected a diffusion transformer of a known class"
        )
    towers = TOWERS.get(found.name, {})
    odd = sorted(parts.keys() - {"transformer", "vae", *towers})
    if odd or (not alone and found.name not in LATENTS):
        which = odd[0] if odd else sorted(parts.keys() - {"transformer"})[0]
        raise UserError(
            f"{where}: {which} has no place in a single file with a {found.class_name}: convert the folders transformer and vae one by one"
        )
    theirs, notes = write_transformer(
        found, parts["transformer"].config, parts["transformer"].tensors, where
    )
    if alone:
        return theirs, notes
    table = {PREFIX + k: v for k, v in theirs.items()}
    if "vae" in parts:
        _check_latents(parts["vae"].config, found.name, where)
        table |= {VAES[0] + k: v for k, v in _write_vae(parts["vae"], where).items()}
    for part, name in towers.items():
        if part in parts:
            table |= {
                f"{TEXTS}{name}.transformer.{k}": v
                for k, v in _write_text(parts[part], name, where).items()
            }
    return table, notes


def _write_vae(part: LazyPart, where: object) -> dict[str, Lazy]:
    rows, packed = _vae_rows(part.config), BATCHES in part.tensors
    check_ours(rows, outlines({k: v for k, v in part.tensors.items() if k != BATCHES}), where)
    return lazily_theirs(rows, part.tensors) | ({BATCHES: part.tensors[BATCHES]} if packed else {})


def _check_latents(config: Config, family: str, where: object) -> None:
    given = tuple(config.get(k) for k in ("scaling_factor", "shift_factor"))
    if given != LATENTS[family]:
        raise UserError(
            f"{where}: a single file cannot tell that latents have scale and shift {given}: a reader would take {LATENTS[family]}"
        )


def _write_text(part: LazyPart, name: str, where: object) -> dict[str, Lazy]:
    if name == "t5xxl":
        tensors = {k: v for k, v in part.tensors.items() if k != TIED}
        rows = t5_rows(part.config)
    else:
        tensors = {
            _prefixed(k): v for k, v in part.tensors.items() if not k.endswith(".position_ids")
        }
        rows = clip_rows(part.config)
    check_ours(rows, outlines(tensors), where)
    theirs = lazily_theirs(rows, tensors)
    if name == "clip_l" and PROJECTION in theirs and _is_one(theirs[PROJECTION]):
        del theirs[PROJECTION]
    return theirs


def _prefixed(key: str) -> str:
    return key if key.startswith((CLIP, "text_projection.")) else CLIP + key


def _is_one(lazy: Lazy) -> bool:
    """Whether a projection leaves everything as it is."""
    rows, columns = lazy.shape
    return rows == columns and torch.equal(lazy.make().float(), torch.eye(rows))
