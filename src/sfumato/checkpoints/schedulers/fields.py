"""Fields of diffusers' scheduler classes (0.42), their defaults and their values.

A config is read as diffusers reads it. An absent field has the default of its class. A field of a
sister class is ignored, because configs keep the fields of the class that they were made with
(SDXL's Euler has `skip_prk_steps`). A field of no sister class is refused.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from sfumato.errors import UserError

OWN_CLASS = "SfumatoProcess"

_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_ZERO = {"rescale_betas_zero_snr": False}
_FINAL = {"final_sigmas_type": "zero"}
_FLOW_SIGMAS = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_DPM = {"solver_order": 2, **_THRESHOLD, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
_CLIPPED = {"lambda_min_clipped": -math.inf, "variance_type": None}
_EDM = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    **_FINAL,
}
_DYNAMIC = {
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
_FLOW = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    **_DYNAMIC,
    "invert_sigmas": False,
    "shift_terminal": None,
    **_LEVELS,
}
_DDIM = {**_TABLE, **_CLIP, "set_alpha_to_one": True, **_THRESHOLD, **_LEADING, **_ZERO}
_DDPM = {**_TABLE, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO, "variance_type": "fixed_small"}
_LCM = {
    **_TABLE,
    **_SD_BETAS,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    **_NO_CLIP,
    "set_alpha_to_one": True,
    **_THRESHOLD,
    **_LEADING,
    "timestep_scaling": 10.0,
    **_ZERO,
}

TABLE_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": {**_TABLE, "skip_prk_steps": False, "set_alpha_to_one": False, **_LEADING},
    "LMSDiscreteScheduler": {**_TABLE, **_LEVELS, **_LINSPACE},
    "EulerDiscreteScheduler": {
        **_TABLE,
        "interpolation_type": "linear",
        **_LEVELS,
        "sigma_min": None,
        "sigma_max": None,
        **_LINSPACE,
        "timestep_type": "discrete",
        **_ZERO,
        **_FINAL,
    },
    "EulerAncestralDiscreteScheduler": {**_TABLE, **_LINSPACE, **_ZERO},
    "HeunDiscreteScheduler": {**_TABLE, **_SD_BETAS, **_LEVELS, **_NO_CLIP, **_LINSPACE},
    "KDPM2DiscreteScheduler": {**_TABLE, **_SD_BETAS, **_LEVELS, **_LINSPACE},
    "KDPM2AncestralDiscreteScheduler": {**_TABLE, **_SD_BETAS, **_LEVELS, **_LINSPACE},
    "DPMSolverSDEScheduler": {
        **_TABLE,
        **_SD_BETAS,
        **_LEVELS,
        "noise_sampler_seed": None,
        **_LINSPACE,
    },
    "DPMSolverMultistepScheduler": {
        **_TABLE,
        **_DPM,
        "lower_order_final": True,
        "euler_at_final": False,
        **_LEVELS,
        "use_lu_lambdas": False,
        **_FLOW_SIGMAS,
        **_FINAL,
        **_CLIPPED,
        **_LINSPACE,
        **_ZERO,
    },
    "DPMSolverSinglestepScheduler": {
        **_TABLE,
        **_DPM,
        "lower_order_final": False,
        **_LEVELS,
        **_FLOW_SIGMAS,
        **_FINAL,
        **_CLIPPED,
    },
    "UniPCMultistepScheduler": {
        **_TABLE,
        "solver_order": 2,
        **_THRESHOLD,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        **_LEVELS,
        **_FLOW_SIGMAS,
        **_LINSPACE,
        **_FINAL,
        **_ZERO,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "DEISMultistepScheduler": {
        **_TABLE,
        "solver_order": 2,
        **_THRESHOLD,
        "algorithm_type": "deis",
        "solver_type": "logrho",
        "lower_order_final": True,
        **_LEVELS,
        **_FLOW_SIGMAS,
        **_LINSPACE,
    },
    "LCMScheduler": _LCM,
    "TCDScheduler": _LCM,
}
EDM_CLASSES: dict[str, dict[str, Any]] = {
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM,
        **_DPM,
        "lower_order_final": True,
        "euler_at_final": False,
    },
}
FLOW_CLASSES: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {**_FLOW, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "FlowMatchLCMScheduler": {**_FLOW, "scale_factors": None, "upscale_mode": "bicubic"},
}
CLASSES = {**TABLE_CLASSES, **EDM_CLASSES, **FLOW_CLASSES}

_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "algorithm_type": (
        "dpmsolver",
        "dpmsolver++",
        "sde-dpmsolver",
        "sde-dpmsolver++",
        "deis",
        "data_prediction",
        "noise_prediction",
    ),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "variance_type": (
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
    "sigma_schedule": ("karras", "exponential"),
    "time_shift_type": ("exponential", "linear"),
}
_NUMBERS = {"sigma_min", "sigma_max", "shift_terminal"}  # None, or a number
_POSITIVE = {
    "rho",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "shift",
    "flow_shift",
    "timestep_scaling",
    "beta_start",
    "beta_end",
}
_FREE = {
    "trained_betas",
    "solver_p",
    "scale_factors",
    "upscale_mode",
    "disable_corrector",
    "noise_sampler_seed",
}
# Fields of older versions and of other sister classes, which published configs still carry.
_OLD = {
    "tensor_format",
    "timestep_values",
    "clip_sample_value",
    "predictor_order",
    "corrector_order",
    "tau_func",
    "skip_prk_steps",
}


def read_fields(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read a scheduler config's class and the values of all fields of that class.

    Args:
        values: The JSON object of scheduler_config.json.

    Returns:
        The class name, and field -> value with defaults filled in.

    Raises:
        UserError: An unknown class or field, or a value that the field does not take.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        near = difflib.get_close_matches(str(name), CLASSES, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"scheduler class {name!r} is not known: {hint}"
            "DDIMScheduler and EulerDiscreteScheduler sample any table of betas, FlowMatchEulerDiscreteScheduler any flow"
        )
    defaults = CLASSES[name]
    sisters = FLOW_CLASSES if name in FLOW_CLASSES else {**TABLE_CLASSES, **EDM_CLASSES}
    ignored = _OLD.union(*sisters.values())
    for field, value in values.items():
        if field not in defaults and field not in ignored and not field.startswith("_"):
            raise UserError(
                f"scheduler config field {field}={value!r} is not known: it might change the result, so it is refused"
            )
    return name, {
        field: _checked(field, values.get(field, default), default)
        for field, default in defaults.items()
    }


def _checked(field: str, value: Any, default: Any) -> Any:
    """Return the value if the field takes it; `UserError` otherwise."""
    if field in _FREE:
        return value
    if value is None and (default is None or field in _LEVELS):
        return default
    if field in _CHOICES:
        if value not in _CHOICES[field]:
            raise UserError(
                f"scheduler config {field}={value!r}: expected one of {', '.join(_CHOICES[field])}"
            )
        return value
    kind = float if field in _NUMBERS else type(default)
    number: Any = value
    valid = isinstance(value, bool) is (kind is bool) and isinstance(
        value, int if kind is int else int | float
    )
    if valid and kind is int:
        valid = number >= 0
    elif valid and kind is float:
        valid = (
            not math.isnan(number)
            and (math.isfinite(number) or number == default)
            and (number > 0 or field not in _POSITIVE)
        )
    if not valid:
        kinds = {
            bool: "true or false",
            int: "a whole number of at least 0",
            float: "a positive number" if field in _POSITIVE else "a number",
        }
        raise UserError(f"scheduler config {field}={value!r}: expected {kinds[kind]}")
    return value
