"""The YAML beside Latent Diffusion's and Stable Diffusion's checkpoints: what it says of the parts,
in diffusers' fields.

    model.target, model.params: {linear_start, linear_end, timesteps, parameterization,
    scale_factor, unet_config, first_stage_config, ...}

A target or a parameter that is not known is refused: it might change the result. Needs PyYAML.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import OriginalConfig
from sfumato.checkpoints.schedulers import betas
from sfumato.checkpoints.shapes import one_or_all
from sfumato.errors import UserError, unknown

_DDPM, _ENCODERS = "ldm.models.diffusion.ddpm.", "ldm.modules.encoders.modules."
_MODELS = {
    _DDPM + name
    for name in (
        "LatentDiffusion",
        "LatentInpaintDiffusion",
        "LatentFinetuneDiffusion",
        "LatentUpscaleDiffusion",
    )
}
_MODELS |= {"ldm.models.diffusion.ddpm_edit.LatentDiffusion"}  # InstructPix2Pix
_UNETS = {"ldm.modules.diffusionmodules.openaimodel.UNetModel"}
_VAES = {
    f"ldm.models.autoencoder.{name}" for name in ("AutoencoderKL", "VQModel", "VQModelInterface")
}
_TEXTS = {"FrozenCLIPEmbedder": "text_encoder", "FrozenOpenCLIPEmbedder": "text_encoder"}
_TEXTS |= {"BERTEmbedder": "bert", "ClassEmbedder": "class_embedder"}

# Parameters that say how a model was trained, or that the weights tell anyway.
_FREE_MODEL: set[str] = set(
    "num_timesteps_cond log_every_t first_stage_key cond_stage_key image_size channels cond_stage_trainable conditioning_key monitor use_ema "
    "scheduler_config finetune_keys concat_keys ckpt_path ignore_keys loss_type low_scale_key low_scale_config load_ema load_only_unet "
    "unet_trainable learn_logvar logvar_init original_elbo_weight l_simple_weight reset_ema keep_finetune_dims c_concat_log_start "
    "masked_image_key".split()
)
_READ_MODEL: set[str] = set(
    "linear_start linear_end timesteps beta_schedule parameterization scale_factor scale_by_std unet_config first_stage_config "
    "cond_stage_config".split()
)
_FREE_UNET: set[str] = set(
    "image_size use_checkpoint legacy use_fp16 use_bf16 dropout adm_in_channels".split()
)
_READ_UNET: set[str] = set(
    "in_channels out_channels model_channels attention_resolutions num_res_blocks channel_mult num_heads num_head_channels transformer_depth "
    "context_dim use_linear_in_transformer num_classes use_scale_shift_norm disable_self_attentions".split()
)
_FIXED_UNET: dict[str, Any] = {"conv_resample": True, "dims": 2}
_WITH_TOKENS: dict[str, Any] = {
    "use_spatial_transformer": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_WITH_TOKENS |= {"disable_middle_self_attn": False, "spatial_transformer_attn_type": "softmax"}
_WITHOUT: dict[str, Any] = {
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "num_classes": None,
}
_WITHOUT |= {"use_linear_in_transformer": False, "disable_self_attentions": None}
_UNCONDITIONAL = "__is_unconditional__"
_FREE_VAE = {
    "lossconfig",
    "monitor",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "batch_resize_range",
    "lr_g_factor",
}
_FREE_VAE |= {"scheduler_config", "use_ema"}
_READ_DD = {
    "z_channels",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "resolution",
    "double_z",
}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}


def read_yaml(path: str | Path) -> OriginalConfig:
    """Reads a YAML file (PyYAML's safe loader: it builds plain values only); `UserError` for one
    that is damaged or not known.
    """
    try:
        import yaml
    except ImportError as error:
        raise UserError("reading a YAML needs the package PyYAML: pip install pyyaml") from error
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as YAML ({' '.join(str(error).split())[:120]}): copy or download it again"
        ) from error
    return from_yaml(values, path)


def from_yaml(values: Any, where: object = "YAML") -> OriginalConfig:
    """What a YAML's values say; `UserError` for an unknown target or parameter."""
    try:
        model = values["model"]
        target, params = model["target"], model.get("params") or {}
        if target in _VAES:
            return OriginalConfig({"vae": _vae(target, params, where)})
        if target not in _MODELS:
            raise unknown("target of a model", target, _MODELS | _VAES)
        return _model(params, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"{where} is not the YAML of a model ({type(error).__name__}: {error}): expected model.target, model.params"
        ) from error


def _only(
    kind: str, given: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any] | None = None
) -> None:
    """`UserError` for a parameter that would change the result and that we do not honour."""
    fixed = fixed or {}
    for name, value in given.items():
        if name in fixed and value != fixed[name]:
            raise UserError(
                f"{kind} parameter {name}={value!r} is not supported: expected {fixed[name]!r}"
            )
        if name not in known and name not in fixed:
            raise UserError(
                f"{kind} parameter {name}={value!r} is not known: it might change the result, so it is refused"
            )


def _model(params: Mapping[str, Any], where: object) -> OriginalConfig:
    _only(
        "model",
        params,
        _FREE_MODEL | _READ_MODEL,
        {"clip_denoised": False, "v_posterior": 0.0, "concat_mode": False},
    )
    kind, prediction = params.get("beta_schedule", "linear"), params.get("parameterization", "eps")
    if kind not in _SCHEDULES or prediction not in _PREDICTIONS:
        raise UserError(
            f"beta_schedule {kind!r}, parameterization {prediction!r}: expected one of {[*_SCHEDULES]} and {[*_PREDICTIONS]}"
        )
    schedule = betas.fields(
        float(params.get("linear_start", 1e-4)),
        float(params.get("linear_end", 2e-2)),
        int(params.get("timesteps", 1000)),
        _SCHEDULES[kind],
    )
    unet, first = params["unet_config"], params["first_stage_config"]
    for given, known, name in ((unet, _UNETS, "U-Net"), (first, _VAES, "first stage")):
        if given["target"] not in known:
            raise unknown(f"target of a {name}", given["target"], known)
    texts = _text(params.get("cond_stage_config"))
    told = None if params.get("cond_stage_config") is None else bool(texts)
    parts = {
        "unet": _unet(unet["params"], told),
        "vae": _vae(first["target"], first["params"], where),
        **texts,
    }
    scale = None if params.get("scale_by_std") else float(params.get("scale_factor", 1.0))
    heads, width = unet["params"].get("num_heads", -1), unet["params"].get("num_head_channels", -1)
    if (heads == -1) == (width == -1):
        raise UserError(f"num_heads {heads}, num_head_channels {width}: expected one of them")
    heads, width = (None if n == -1 else int(n) for n in (heads, width))
    order = unet["params"].get("use_new_attention_order")
    return OriginalConfig(parts, heads, width, _PREDICTIONS[prediction], schedule, scale, order)


def _unet(params: Mapping[str, Any], told: bool | None) -> dict[str, Any]:
    """`told`: whether there is a conditioner, whose tokens the U-Net must attend to; None: nothing
    is said of one.
    """
    tokens = params.get("use_spatial_transformer", False)
    if told is not None and tokens is not told:
        raise UserError(
            f"use_spatial_transformer={tokens} {'with' if told else 'without'} a conditioner is not supported: expected {told}, because tokens "
            "are the only way in which a conditioner is heard"
        )
    if not tokens:
        return _plain_unet(params)
    _only("U-Net", params, _FREE_UNET | _READ_UNET, _FIXED_UNET | _WITH_TOKENS)
    mult, context, classes = (
        list(params["channel_mult"]),
        params["context_dim"],
        params.get("num_classes"),
    )
    context = context if isinstance(context, int) else one_or_all(list(context))
    down = [
        "CrossAttnDownBlock2D" if 2**k in params["attention_resolutions"] else "DownBlock2D"
        for k in range(len(mult))
    ]
    only = params.get("disable_self_attentions") or False
    depth = params.get("transformer_depth", 1)
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": [params["model_channels"] * m for m in mult],
        "down_block_types": down,
        "layers_per_block": params["num_res_blocks"],
        "cross_attention_dim": context,
        "transformer_layers_per_block": depth
        if isinstance(depth, int)
        else one_or_all(list(depth)),
        "use_linear_projection": bool(params.get("use_linear_in_transformer", False)),
        "num_class_embeds": classes if isinstance(classes, int) else None,
        "only_cross_attention": [o and "Cross" in k for o, k in zip(only, down, strict=True)]
        if only
        else False,
        "resnet_time_scale_shift": "scale_shift"
        if params.get("use_scale_shift_norm")
        else "default",
    }


def _plain_unet(params: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net without tokens."""
    _only(
        "U-Net",
        params,
        (_FREE_UNET | _READ_UNET | {"resblock_updown", "use_new_attention_order"})
        - _WITHOUT.keys(),
        _FIXED_UNET | _WITHOUT,
    )
    mult, by_block = list(params["channel_mult"]), bool(params.get("resblock_updown", False))
    rest = "ResnetDownsampleBlock2D" if by_block else "DownBlock2D"
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": [params["model_channels"] * m for m in mult],
        "down_block_types": [
            "AttnDownBlock2D" if 2**k in params["attention_resolutions"] else rest
            for k in range(len(mult))
        ],
        "layers_per_block": params["num_res_blocks"],
        "downsample_type": "resnet" if by_block else "conv",
        "resnet_time_scale_shift": "scale_shift"
        if params.get("use_scale_shift_norm")
        else "default",
    }


def _vae(target: str, params: Mapping[str, Any], where: object) -> dict[str, Any]:
    dd, vq = params["ddconfig"], not target.endswith("AutoencoderKL")
    known = _FREE_VAE | {"embed_dim", "ddconfig"} | ({"n_embed"} if vq else set())
    _only("first stage", params, known, {"remap": None, "sane_index_shape": False})
    fixed = {
        "dropout": 0.0,
        "attn_type": "vanilla",
        "resamp_with_conv": True,
        "tanh_out": False,
        "give_pre_end": False,
    }
    _only("ddconfig", dd, _READ_DD, fixed)
    if bool(dd.get("double_z", True)) == vq or (not vq and params["embed_dim"] != dd["z_channels"]):
        raise UserError(
            f"{where}: double_z {dd.get('double_z')}, embed_dim {params['embed_dim']} and z_channels {dd['z_channels']} do not fit"
        )
    sides = [dd["resolution"] // 2**k for k in range(len(dd["ch_mult"]))]
    found = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "block_out_channels": [dd["ch"] * m for m in dd["ch_mult"]],
        "down_block_types": [
            "AttnDownEncoderBlock2D" if s in dd["attn_resolutions"] else "DownEncoderBlock2D"
            for s in sides
        ],
        "layers_per_block": dd["num_res_blocks"],
        "latent_channels": dd["z_channels"],
    }
    return found | (
        {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"]} if vq else {}
    )


def _text(given: Mapping[str, Any] | str | None) -> dict[str, dict[str, Any]]:
    """The conditioner by its class; of classes and BERT also the sizes. `UserError` for one that is
    not known.
    """
    if given is None or given == _UNCONDITIONAL:
        return {}
    if isinstance(given, str):
        raise UserError(
            f"cond_stage_config {given!r} (conditioned on a picture) is not supported: expected a conditioner or {_UNCONDITIONAL!r}"
        )
    name = str(given["target"]).removeprefix(_ENCODERS)
    if name not in _TEXTS or name == given["target"]:
        raise unknown("target of a conditioner", given["target"], {_ENCODERS + t for t in _TEXTS})
    params = given.get("params") or {}
    if name == "ClassEmbedder":
        return {
            "class_embedder": {
                "n_classes": params.get("n_classes", 1000),
                "embed_dim": params["embed_dim"],
            }
        }
    if name == "BERTEmbedder":
        return {"bert": {"d_model": params["n_embed"], "encoder_layers": params["n_layer"]}}
    if name == "FrozenOpenCLIPEmbedder" and params.get("layer", "last") != "penultimate":
        raise UserError(
            f"conditioner parameter layer={params.get('layer', 'last')!r} is not supported: expected 'penultimate'"
        )
    if name == "FrozenCLIPEmbedder" and params.get("layer", "last") != "last":
        raise UserError(
            f"conditioner parameter layer={params['layer']!r} is not supported: expected 'last'"
        )
    return {"text_encoder": {"hidden_act": "gelu" if "Open" in name else "quick_gelu"}}
