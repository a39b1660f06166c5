"""The YAML beside original checkpoints (Latent Diffusion), in diffusers' fields.

    model.target, model.params: {linear_start, linear_end, timesteps, parameterization,
    scale_factor, unet_config, first_stage_config, ...}

An unknown target or parameter is refused: it might change the result. Needs PyYAML.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import OriginalConfig
from sfumato.checkpoints.schedulers import betas
from sfumato.checkpoints.shapes import one_or_all
from sfumato.errors import UserError, unknown

_DDPM, _ENCODERS = "ldm.models.diffusion.ddpm.", "ldm.modules.encoders.modules."
_MODELS = {f"{_DDPM}Latent{kind}Diffusion" for kind in ("", "Inpaint", "Finetune", "Upscale")}
_MODELS |= {"ldm.models.diffusion.ddpm_edit.LatentDiffusion"}  # InstructPix2Pix
_UNETS = {"ldm.modules.diffusionmodules.openaimodel.UNetModel"}
_VAES = {f"ldm.models.autoencoder.{kind}" for kind in ("AutoencoderKL", "VQModel")}
_VAES |= {"ldm.models.autoencoder.VQModelInterface"}
_TEXTS = {"FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder", "ClassEmbedder"}
_UNCONDITIONAL = "__is_unconditional__"
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}

# Parameters that are read, that describe the training, or that follow from the weights; and, in
# _FIXED, those of which one value is supported.
_MODEL = set(
    "linear_start linear_end timesteps beta_schedule parameterization scale_factor scale_by_std "
    "unet_config first_stage_config cond_stage_config num_timesteps_cond log_every_t "
    "first_stage_key cond_stage_key image_size channels cond_stage_trainable conditioning_key "
    "monitor use_ema scheduler_config finetune_keys concat_keys ckpt_path ignore_keys loss_type "
    "low_scale_key low_scale_config load_ema load_only_unet unet_trainable learn_logvar "
    "logvar_init original_elbo_weight l_simple_weight reset_ema keep_finetune_dims "
    "c_concat_log_start masked_image_key".split()
)
_FIXED_MODEL = {"clip_denoised": False, "v_posterior": 0.0, "concat_mode": False}
_UNET = set(
    "image_size use_checkpoint legacy use_fp16 use_bf16 dropout adm_in_channels "
    "in_channels out_channels model_channels attention_resolutions num_res_blocks channel_mult "
    "num_heads num_head_channels transformer_depth context_dim use_linear_in_transformer "
    "num_classes use_scale_shift_norm disable_self_attentions".split()
)
_FIXED_UNET = {"conv_resample": True, "dims": 2}
_FIXED_TOKENS = _FIXED_UNET | {
    "use_spatial_transformer": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "disable_middle_self_attn": False,
    "spatial_transformer_attn_type": "softmax",
}
_FIXED_PLAIN = _FIXED_UNET | {
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "num_classes": None,
    "use_linear_in_transformer": False,
    "disable_self_attentions": None,
}
_VAE = set(
    "lossconfig monitor ckpt_path ignore_keys image_key colorize_nlabels batch_resize_range "
    "lr_g_factor scheduler_config use_ema embed_dim ddconfig".split()
)
_FIXED_VAE = {"remap": None, "sane_index_shape": False}
_DD = set(
    "z_channels in_channels out_ch ch ch_mult num_res_blocks attn_resolutions resolution "
    "double_z".split()
)
_FIXED_DD = {"dropout": 0.0, "attn_type": "vanilla", "resamp_with_conv": True}
_FIXED_DD |= {"tanh_out": False, "give_pre_end": False}


def read_yaml(path: str | Path) -> OriginalConfig:
    """Read a YAML file with PyYAML's safe loader, which builds plain values only.

    Raises:
        UserError: A file that is missing, damaged, or of an unknown model.
    """
    try:
        import yaml
    except ImportError as error:
        raise UserError("reading a YAML needs the package PyYAML: pip install pyyaml") from error
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} cannot be read as YAML ({reason}): copy or download it again"
        ) from error
    return from_yaml(values, path)


def from_yaml(values: Any, where: object = "YAML") -> OriginalConfig:
    """The settings in a YAML's values; `UserError` for an unknown target or parameter.

    Args:
        values: The values of the file.
        where: The file, for messages.
    """
    try:
        model = values["model"]
        target, params = model["target"], model.get("params") or {}
        if target in _VAES:
            return OriginalConfig({"vae": _vae(target, params)})
        if target not in _MODELS:
            raise unknown("target of a model", target, _MODELS | _VAES)
        return _model(params)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"{where} is not the YAML of a model ({type(error).__name__}: {error}): "
            "expected model.target, model.params"
        ) from error


def _check(
    kind: str, params: Mapping[str, Any], names: Collection[str], fixed: Mapping[str, Any]
) -> None:
    """Raise `UserError` for a parameter that is neither in `names` nor has its fixed value."""
    for name, value in params.items():
        if name in fixed and value != fixed[name]:
            raise UserError(
                f"{kind} parameter {name}={value!r} is not supported: expected {fixed[name]!r}"
            )
        if name not in names and name not in fixed:
            raise UserError(
                f"{kind} parameter {name}={value!r} is not known: it might change the result"
            )


def _model(params: Mapping[str, Any]) -> OriginalConfig:
    _check("model", params, _MODEL, _FIXED_MODEL)
    kind, prediction = params.get("beta_schedule", "linear"), params.get("parameterization", "eps")
    if kind not in _SCHEDULES or prediction not in _PREDICTIONS:
        raise UserError(
            f"beta_schedule {kind!r}, parameterization {prediction!r}: "
            f"expected one of {[*_SCHEDULES]} and {[*_PREDICTIONS]}"
        )
    start, end = (float(params.get(f"linear_{k}", v)) for k, v in (("start", 1e-4), ("end", 2e-2)))
    schedule = betas.fields(start, end, int(params.get("timesteps", 1000)), _SCHEDULES[kind])
    unet, first = params["unet_config"], params["first_stage_config"]
    for section, targets, name in ((unet, _UNETS, "U-Net"), (first, _VAES, "first stage")):
        if section["target"] not in targets:
            raise unknown(f"target of a {name}", section["target"], targets)
    conditioner = params.get("cond_stage_config")
    texts = _text(conditioner)
    parts = {
        "unet": _unet(unet["params"], None if conditioner is None else bool(texts)),
        "vae": _vae(first["target"], first["params"]),
        **texts,
    }
    scale = None if params.get("scale_by_std") else float(params.get("scale_factor", 1.0))
    heads, width = (unet["params"].get(k, -1) for k in ("num_heads", "num_head_channels"))
    if (heads == -1) == (width == -1):
        raise UserError(f"num_heads {heads}, num_head_channels {width}: expected one of them")
    heads, width = (None if n == -1 else int(n) for n in (heads, width))
    order = unet["params"].get("use_new_attention_order")
    return OriginalConfig(parts, heads, width, _PREDICTIONS[prediction], schedule, scale, order)


def _unet(params: Mapping[str, Any], conditioned: bool | None) -> dict[str, Any]:
    """The U-Net's fields; `conditioned`: with a conditioner, None: undecided."""
    tokens = params.get("use_spatial_transformer", False)
    if conditioned is not None and tokens is not conditioned:
        raise UserError(
            f"use_spatial_transformer={tokens} {'with' if conditioned else 'without'} a "
            f"conditioner is not supported: expected {conditioned}, because its transformer blocks "
            "are the only ones that attend to a conditioner's tokens"
        )
    plain = {"resblock_updown", "use_new_attention_order", *_UNET} - _FIXED_PLAIN.keys()
    names, fixed = (_UNET, _FIXED_TOKENS) if tokens else (plain, _FIXED_PLAIN)
    _check("U-Net", params, names, fixed)
    by_block = bool(params.get("resblock_updown", False))
    attends = [2**k in params["attention_resolutions"] for k in range(len(params["channel_mult"]))]
    attention, rest = "CrossAttnDownBlock2D" if tokens else "AttnDownBlock2D", "DownBlock2D"
    down = [attention if a else "ResnetDownsampleBlock2D" if by_block else rest for a in attends]
    fields = {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": [params["model_channels"] * m for m in params["channel_mult"]],
        "down_block_types": down,
        "layers_per_block": params["num_res_blocks"],
    }
    shift = "scale_shift" if params.get("use_scale_shift_norm") else "default"
    if not tokens:
        step = "resnet" if by_block else "conv"
        return fields | {"downsample_type": step, "resnet_time_scale_shift": shift}
    classes, only = params.get("num_classes"), params.get("disable_self_attentions") or False
    return fields | {
        "cross_attention_dim": _one_or_all(params["context_dim"]),
        "transformer_layers_per_block": _one_or_all(params.get("transformer_depth", 1)),
        "use_linear_projection": bool(params.get("use_linear_in_transformer", False)),
        "num_class_embeds": classes if isinstance(classes, int) else None,
        "only_cross_attention": only and [o and a for o, a in zip(only, attends, strict=True)],
        "resnet_time_scale_shift": shift,
    }


def _one_or_all(value: Any) -> Any:
    return value if isinstance(value, int) else one_or_all(list(value))


def _vae(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    dd, vq = params["ddconfig"], not target.endswith("AutoencoderKL")
    _check("first stage", params, _VAE | ({"n_embed"} if vq else set()), _FIXED_VAE)
    _check("ddconfig", dd, _DD, _FIXED_DD)
    width, channels = params["embed_dim"], dd["z_channels"]
    if bool(dd.get("double_z", True)) == vq or (not vq and width != channels):
        raise UserError(
            f"double_z {dd.get('double_z')}, embed_dim {width}, z_channels {channels} do not fit"
        )
    sides = [dd["resolution"] // 2**k for k in range(len(dd["ch_mult"]))]
    attends = [side in dd["attn_resolutions"] for side in sides]
    fields = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "block_out_channels": [dd["ch"] * m for m in dd["ch_mult"]],
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "layers_per_block": dd["num_res_blocks"],
        "latent_channels": channels,
    }
    codebook = {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": width} if vq else {}
    return fields | codebook


def _text(section: Mapping[str, Any] | str | None) -> dict[str, dict[str, Any]]:
    """The conditioner by its class, with the sizes of classes and BERT."""
    if section is None or section == _UNCONDITIONAL:
        return {}
    if isinstance(section, str):
        raise UserError(
            f"cond_stage_config {section!r} (conditioned on an image) is not supported: "
            f"expected a conditioner or {_UNCONDITIONAL!r}"
        )
    name, params = str(section["target"]).removeprefix(_ENCODERS), section.get("params") or {}
    if name not in _TEXTS or name == section["target"]:
        targets = {_ENCODERS + text for text in _TEXTS}
        raise unknown("target of a conditioner", section["target"], targets)
    if name == "ClassEmbedder":
        rows = params.get("n_classes", 1000)
        return {"class_embedder": {"n_classes": rows, "embed_dim": params["embed_dim"]}}
    if name == "BERTEmbedder":
        return {"bert": {"d_model": params["n_embed"], "encoder_layers": params["n_layer"]}}
    is_open = name == "FrozenOpenCLIPEmbedder"
    layer, expected = params.get("layer", "last"), "penultimate" if is_open else "last"
    if layer != expected:
        raise UserError(
            f"conditioner parameter layer={layer!r} is not supported: expected {expected!r}"
        )
    return {"text_encoder": {"hidden_act": "gelu" if is_open else "quick_gelu"}}
