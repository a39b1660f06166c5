"""Fields of configs that do not survive a single file in the original layout."""

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._unet_config import PLAIN_STANDARD
from sfumato.checkpoints.families._unet_config import STANDARD as UNET_STANDARD
from sfumato.checkpoints.families._unet_map import is_plain
from sfumato.checkpoints.families._vae import KL_STANDARD, VQ_STANDARD
from sfumato.checkpoints.families._vae import STANDARD as VAE_STANDARD
from sfumato.checkpoints.schedulers import betas

_FREE = {"sample_size", "dropout", "upcast_attention", "force_upcast", "num_train_timesteps"}
"""Fields that do not change a network's output, or that the tensors were held against."""
_UNET = UNET_STANDARD | {
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
_PLAIN = PLAIN_STANDARD | {"attention_head_dim": 8}
_VAE = VAE_STANDARD | {"mid_block_add_attention": True, "scaling_factor": 0.18215}
_CLIP = {
    "hidden_act": "quick_gelu",
    "num_attention_heads": 8,
    "layer_norm_eps": 1e-5,
    "num_hidden_layers": 12,
    "architectures": ["CLIPTextModel"],
}
"""Decisive fields with the defaults of diffusers and transformers."""


def unrepresentable_fields(checkpoint: Checkpoint, again: Checkpoint) -> list[str]:
    """One clause for each field that is lost on the way through a file.

    Args:
        checkpoint: The model.
        again: The same, read back from its file's tensors.
    """
    lost: list[str] = []
    for name, part in checkpoint.components.items():
        config, inferred = dict(part.config), again.components[name].config
        if name in ("unet", "vae"):
            lost += _lost_fields(name, _defaults(name, config, inferred) | config, inferred)
            continue
        if inferred.get("model_type") == "clip_text_model":
            projected = inferred["architectures"] == ["CLIPTextModelWithProjection"]
            fields = [*_CLIP, "projection_dim"] if projected else [*_CLIP]
            values = _CLIP | config
        else:
            fields = [*inferred]
            values = inferred | {k: v for k, v in config.items() if v is not None}
        changed = [field for field in fields if values.get(field) != inferred[field]]
        lost += [_clause(name, field, values.get(field), inferred[field]) for field in changed]
    written, read = (c.schedulers.get("scheduler") for c in (checkpoint, again))
    return lost if written is None or read is None else lost + _lost_schedule(written, read)


def _clause(part: str, field: str, value: Any, inferred: Any) -> str:
    return f"{part}'s {field}={value!r} (a reader would take {inferred!r})"


def _defaults(name: str, config: Config, inferred: Config) -> dict[str, Any]:
    """The values of fields that a config leaves out."""
    if name == "unet":
        return _PLAIN if is_plain(config) else _UNET
    kind = inferred["_class_name"]
    own = KL_STANDARD if kind == "AutoencoderKL" else VQ_STANDARD
    return _VAE | own | {"_class_name": kind}


def _lost_fields(part: str, config: Mapping[str, Any], inferred: Config) -> list[str]:
    lost = []
    for field, value in config.items():
        if field in _FREE or (field.startswith("_") and field != "_class_name"):
            continue
        if field not in inferred:
            lost.append(f"{part}'s {field}={value!r}")
        elif not _same(field, value, inferred[field], config):
            lost.append(_clause(part, field, value, inferred[field]))
    return lost


def _same(field: str, value: Any, other: Any, config: Config) -> bool:
    if field == "vq_embed_dim" and value is None:
        return other == config["latent_channels"]
    levels = len(config["block_out_channels"])
    a, b = _spread(value, levels), _spread(other, levels)
    if field in ("transformer_layers_per_block", "only_cross_attention") and len(a) == levels:
        # levels that do not attend have neither; the middle has the last level's blocks
        used = ["CrossAttn" in kind for kind in config["down_block_types"]]
        used[-1] |= field == "transformer_layers_per_block"
        return all(x == y for x, y, u in zip(a, b, used, strict=True) if u)
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= 1e-6 * abs(value)
    return a == b


def _spread(value: Any, levels: int) -> list[Any]:
    """One value a level, of one for all levels or one a level."""
    if not isinstance(value, list | tuple):
        return [value] * levels
    return [list(v) if isinstance(v, list | tuple) else v for v in value]


def _lost_schedule(config: Config, inferred: Config) -> list[str]:
    a, b = betas.table(config), betas.table(inferred)
    same = len(a) == len(b) and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    lost = [] if same else ["the scheduler's betas"]
    for field, default in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False)):
        value, other = config.get(field, default), inferred.get(field, default)
        lost += [] if value == other else [_clause("scheduler", field, value, other)]
    return lost
