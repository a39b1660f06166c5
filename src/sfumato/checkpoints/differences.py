"""What a config says that a single file in the original layout would not tell its reader."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints.infer import KL_STANDARD, UNET_STANDARD, VAE_STANDARD, VQ_STANDARD
from sfumato.checkpoints.infer_plain import PLAIN_STANDARD
from sfumato.checkpoints.names.ldm_unet import is_plain
from sfumato.checkpoints.schedulers import betas

if TYPE_CHECKING:
    from sfumato.checkpoints.original import Parts

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


def differences(parts: "Parts", again: "Parts") -> list[str]:
    """One clause for each field that `again`, read back from the joined tensors, has otherwise or
    not at all.
    """
    lost: list[str] = []
    for name, part in parts.networks.items():
        given, found = part.config, again.networks[name].config
        if name == "unet":
            standard = (
                PLAIN_STANDARD | {"attention_head_dim": 8}
                if is_plain(given)
                else UNET_STANDARD | _DEFAULTS
            )
            lost += _unequal(name, standard | dict(given), found, len(given["block_out_channels"]))
        elif name == "vae":
            n = len(given["block_out_channels"])
            standard = VAE_STANDARD | (
                KL_STANDARD if found["_class_name"] == "AutoencoderKL" else VQ_STANDARD
            )
            standard |= {
                "_class_name": found["_class_name"],
                "mid_block_add_attention": True,
                "scaling_factor": 0.18215,
            }
            lost += _unequal(name, standard | dict(given), found, n)
        elif found.get("model_type") == "clip_text_model":
            fields = (
                _CLIP if found["architectures"] == ["CLIPTextModelWithProjection"] else _CLIP[:-1]
            )
            given = _CLIP_DEFAULTS | {"architectures": ["CLIPTextModel"]} | dict(given)
            lost += [
                _clause(name, k, given.get(k), found[k]) for k in fields if given.get(k) != found[k]
            ]
        else:
            lost += [
                _clause(name, k, given.get(k), v)
                for k, v in found.items()
                if given.get(k) not in (None, v)
            ]
    return lost + _schedules(parts.schedulers.get("scheduler"), again.schedulers.get("scheduler"))


def _clause(part: str, field: str, given: Any, found: Any) -> str:
    return f"{part}'s {field}={given!r} (a reader would take {found!r})"


def _spread(value: Any, levels: int) -> Any:
    """One value for all levels, or one a level, as one a level."""
    return (
        [list(v) if isinstance(v, list | tuple) else v for v in value]
        if isinstance(value, list | tuple)
        else [value] * levels
    )


def _unequal(
    part: str, given: Mapping[str, Any], found: Mapping[str, Any], levels: int
) -> list[str]:
    lost = []
    for field, value in given.items():
        if field in _FREE or (field.startswith("_") and field != "_class_name"):
            continue
        other = found.get(field)
        if field not in found:
            lost.append(f"{part}'s {field}={value!r}, which it does not know")
        elif not _same(field, value, other, given, levels):
            lost.append(_clause(part, field, value, other))
    return lost


def _same(field: str, value: Any, other: Any, given: Mapping[str, Any], levels: int) -> bool:
    if field == "vq_embed_dim" and value is None:
        return other == given["latent_channels"]
    a, b = _spread(value, levels), _spread(other, levels)
    # of levels that do not attend: nothing
    if field in ("transformer_layers_per_block", "only_cross_attention") and len(a) == levels:
        # which the middle follows
        last = levels - 1 if field == "transformer_layers_per_block" else None
        used = [
            i for i in range(levels) if "CrossAttn" in given["down_block_types"][i] or i == last
        ]
        return [a[i] for i in used] == [b[i] for i in used]
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= 1e-6 * abs(value)
    return a == b


def _schedules(given: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> list[str]:
    if given is None or found is None:
        return []
    a, b = betas.table(given), betas.table(found)
    lost = (
        []
        if len(a) == len(b) and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        else ["the scheduler's betas"]
    )
    for field, default in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False)):
        value, other = given.get(field, default), found.get(field, default)
        lost += [] if value == other else [_clause("scheduler", field, value, other)]
    return lost
