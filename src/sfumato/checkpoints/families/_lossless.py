"""Fields of configs that a single file in the original layout would not tell its reader."""

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.families._unet_config import PLAIN_STANDARD
from sfumato.checkpoints.families._unet_config import STANDARD as UNET_STANDARD
from sfumato.checkpoints.families._unet_map import is_plain
from sfumato.checkpoints.families._vae import KL_STANDARD, VQ_STANDARD
from sfumato.checkpoints.families._vae import STANDARD as VAE_STANDARD
from sfumato.checkpoints.schedulers import betas

# Fields that do not change what a network computes from given weights, or that the tensors
# themselves were held against.
_FREE = {"sample_size", "dropout", "upcast_attention", "force_upcast", "num_train_timesteps"}
_DEFAULTS: dict[str, Any] = {
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
_CLIP = (
    "hidden_act",
    "num_attention_heads",
    "layer_norm_eps",
    "num_hidden_layers",
    "architectures",
    "projection_dim",
)
_CLIP_DEFAULTS = {
    "hidden_act": "quick_gelu",
    "num_attention_heads": 8,
    "layer_norm_eps": 1e-5,
    "num_hidden_layers": 12,
}


def unrepresentable_fields(checkpoint: Checkpoint, again: Checkpoint) -> list[str]:
    """One clause for each field that `again`, read back from the file's tensors, has otherwise or
    not at all.
    """
    lost: list[str] = []
    for name, part in checkpoint.components.items():
        config, told = part.config, again.components[name].config
        if name == "unet":
            standard = (
                PLAIN_STANDARD | {"attention_head_dim": 8}
                if is_plain(config)
                else UNET_STANDARD | _DEFAULTS
            )
            lost += _unequal(name, standard | dict(config), told, len(config["block_out_channels"]))
        elif name == "vae":
            standard = VAE_STANDARD | (
                KL_STANDARD if told["_class_name"] == "AutoencoderKL" else VQ_STANDARD
            )
            standard |= {
                "_class_name": told["_class_name"],
                "mid_block_add_attention": True,
                "scaling_factor": 0.18215,
            }
            lost += _unequal(name, standard | dict(config), told, len(config["block_out_channels"]))
        elif told.get("model_type") == "clip_text_model":
            fields = (
                _CLIP if told["architectures"] == ["CLIPTextModelWithProjection"] else _CLIP[:-1]
            )
            values = _CLIP_DEFAULTS | {"architectures": ["CLIPTextModel"]} | dict(config)
            lost += [
                _clause(name, k, values.get(k), told[k]) for k in fields if values.get(k) != told[k]
            ]
        else:
            lost += [
                _clause(name, k, config.get(k), v)
                for k, v in told.items()
                if config.get(k) not in (None, v)
            ]
    return lost + _schedules(
        checkpoint.schedulers.get("scheduler"), again.schedulers.get("scheduler")
    )


def _clause(part: str, field: str, value: Any, told: Any) -> str:
    return f"{part}'s {field}={value!r} (a reader would take {told!r})"


def _spread(value: Any, levels: int) -> Any:
    """One value for all levels, or one a level, as one a level."""
    return (
        [list(v) if isinstance(v, list | tuple) else v for v in value]
        if isinstance(value, list | tuple)
        else [value] * levels
    )


def _unequal(
    part: str, config: Mapping[str, Any], told: Mapping[str, Any], levels: int
) -> list[str]:
    lost = []
    for field, value in config.items():
        if field in _FREE or (field.startswith("_") and field != "_class_name"):
            continue
        if field not in told:
            lost.append(f"{part}'s {field}={value!r}, which it does not know")
        elif not _same(field, value, told[field], config, levels):
            lost.append(_clause(part, field, value, told[field]))
    return lost


def _same(field: str, value: Any, other: Any, config: Mapping[str, Any], levels: int) -> bool:
    if field == "vq_embed_dim" and value is None:
        return other == config["latent_channels"]
    a, b = _spread(value, levels), _spread(other, levels)
    # of levels that do not attend: nothing
    if field in ("transformer_layers_per_block", "only_cross_attention") and len(a) == levels:
        # which the middle follows
        last = levels - 1 if field == "transformer_layers_per_block" else None
        used = [
            i for i in range(levels) if "CrossAttn" in config["down_block_types"][i] or i == last
        ]
        return [a[i] for i in used] == [b[i] for i in used]
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= 1e-6 * abs(value)
    return a == b


def _schedules(config: Mapping[str, Any] | None, told: Mapping[str, Any] | None) -> list[str]:
    if config is None or told is None:
        return []
    a, b = betas.table(config), betas.table(told)
    lost = (
        []
        if len(a) == len(b) and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        else ["the scheduler's betas"]
    )
    for field, default in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False)):
        value, other = config.get(field, default), told.get(field, default)
        lost += [] if value == other else [_clause("scheduler", field, value, other)]
    return lost
