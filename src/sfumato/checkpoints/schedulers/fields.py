"""Fields of diffusers' scheduler classes (0.42), their defaults and their values.

A config is read as diffusers reads it. An absent field has the default of its class. A field of a
sister class is ignored, because configs keep the fields of the class that they were made with
(SDXL's Euler has `skip_prk_steps`). A field of no sister class is refused.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from sfumato.errors import UserError

OWN_CLASS = "SfumatoProcess"

_BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
_TABLE = _BETAS | {"trained_betas": None, "prediction_type": "epsilon"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_ENDS = {"sigma_min": None, "sigma_max": None}
_ZERO = {"rescale_betas_zero_snr": False}
_FINAL = {"final_sigmas_type": "zero"}
_DYNAMIC = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_FLOW_SIGMAS = {"use_flow_sigmas": False, "flow_shift": 1.0, **_DYNAMIC}
_DPM = {"solver_order": 2, **_THRESHOLD, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
_LAST_STEPS = {"lower_order_final": True, "euler_at_final": False}
_CLIPPED = {"lambda_min_clipped": -math.inf, "variance_type": None}
_DPM_TABLE = _TABLE | _DPM | {"lower_order_final": False} | _LEVELS | _FLOW_SIGMAS | _FINAL
_DPM_TABLE |= _CLIPPED
_MULTISTEP = {**_LAST_STEPS, "use_lu_lambdas": False}
_DEIS = {**_DPM, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True}
_UNIPC = _TABLE | _THRESHOLD | _LEVELS | _FLOW_SIGMAS | _LINSPACE | _FINAL | _ZERO | _ENDS
_UNIPC |= {"solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True}
_UNIPC |= {"disable_corrector": [], "solver_p": None, "shift_terminal": None}
_EULER = _TABLE | _LEVELS | _ENDS | _LINSPACE | _ZERO | _FINAL
_EULER |= {"interpolation_type": "linear", "timestep_type": "discrete"}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"}
_EDM |= {"num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0, **_FINAL}
_SIZES = dict(base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0, **_DYNAMIC, **_SIZES}
_FLOW |= {"invert_sigmas": False, "shift_terminal": None, **_LEVELS}
_DDIM = {**_TABLE, **_CLIP, "set_alpha_to_one": True, **_THRESHOLD, **_LEADING, **_ZERO}
_DDPM = {**_TABLE, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO, "variance_type": "fixed_small"}
_LCM = {**_DDIM, **_SD_BETAS, "beta_schedule": "scaled_linear", **_NO_CLIP}
_LCM |= {"original_inference_steps": 50, "timestep_scaling": 10.0}
_KDPM2 = _TABLE | _SD_BETAS | _LEVELS | _LINSPACE
_SA_SOLVER = _TABLE | _THRESHOLD | _LEVELS | _LINSPACE | _CLIPPED
_SA_SOLVER |= {"predictor_order": 2, "corrector_order": 2, "tau_func": None}
_SA_SOLVER |= {"algorithm_type": "data_prediction", "lower_order_final": True}
_SA_SOLVER |= {"use_flow_sigmas": False, "flow_shift": 1.0}
_CONSISTENCY = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
_CONSISTENCY |= {"sigma_data": 0.5, "s_noise": 1.0, "clip_denoised": True}

TABLE_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": {**_TABLE, "skip_prk_steps": False, "set_alpha_to_one": False, **_LEADING},
    "LMSDiscreteScheduler": _TABLE | _LEVELS | _LINSPACE,
    "EulerDiscreteScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": _TABLE | _LINSPACE | _ZERO,
    "HeunDiscreteScheduler": _KDPM2 | _NO_CLIP,
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": _KDPM2,
    "DPMSolverSDEScheduler": _KDPM2 | {"noise_sampler_seed": None},
    "DPMSolverMultistepScheduler": _DPM_TABLE | _MULTISTEP | _LINSPACE | _ZERO,
    "DPMSolverSinglestepScheduler": _DPM_TABLE,
    "UniPCMultistepScheduler": _UNIPC,
    "DEISMultistepScheduler": _TABLE | _DEIS | _LEVELS | _FLOW_SIGMAS | _LINSPACE,
    "LCMScheduler": _LCM,
    "TCDScheduler": _LCM,
    "SASolverScheduler": _SA_SOLVER,
}
EDM_CLASSES: dict[str, dict[str, Any]] = {
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM | _DPM | _LAST_STEPS,
}
FLOW_CLASSES: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {**_FLOW, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "FlowMatchLCMScheduler": {**_FLOW, "scale_factors": None, "upscale_mode": "bicubic"},
}
OTHER_CLASSES: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": _CONSISTENCY,
    "IPNDMScheduler": {"num_train_timesteps": 1000, "trained_betas": None},
}
CLASSES = {**TABLE_CLASSES, **EDM_CLASSES, **FLOW_CLASSES, **OTHER_CLASSES}

_TOKENS = "its models predict tokens of a vocabulary, this library's predict latents"
_INVERSE = (
    "it runs from image to noise: name {} with the same fields instead, which `model.invert` "
    "runs in that direction"
)
UNSUPPORTED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CogVideoXDDIMScheduler": "CogVideoX makes video and cannot be opened; "
    "DDIMScheduler with rescale_betas_zero_snr is the nearest without its SNR shift",
    "CogVideoXDPMScheduler": "CogVideoX makes video and cannot be opened; "
    "DPMSolverMultistepScheduler with rescale_betas_zero_snr is the nearest without its SNR shift",
    "CosineDPMSolverMultistepScheduler": "Stable Audio makes sound and cannot be opened; "
    "EDMDPMSolverMultistepScheduler with sde-dpmsolver++ is the nearest",
    "FlowMapEulerDiscreteScheduler": "its networks take the time at a step's end too; "
    "FlowMatchEulerDiscreteScheduler is the nearest for networks of one time",
    "HeliosScheduler": "Helios makes video at several sizes in a run and cannot be opened; "
    "UniPCMultistepScheduler with use_flow_sigmas is the nearest at one size",
    "HeliosDMDScheduler": "Helios makes video at several sizes in a run and cannot be opened; "
    "FlowMatchLCMScheduler is the nearest at one size",
    "MiniMaxH3Scheduler": "MiniMax-H3 makes video and cannot be opened; "
    "FlowMatchEulerDiscreteScheduler with its shift is the same sampler",
    "PiflowScheduler": "its networks predict several velocities at once; "
    "FlowMatchEulerDiscreteScheduler with its shift is the nearest for one",
    "RFD4ProteinaScheduler": "its models make proteins; "
    "FlowMatchEulerDiscreteScheduler samples flows of latents",
    "LTXEulerAncestralRFScheduler": "LTX-Video makes video and cannot be opened; "
    "FlowMatchEulerDiscreteScheduler with the sampler euler_ancestral is the nearest",
    "SCMScheduler": "SANA-Sprint's TrigFlow is not supported; "
    "LCMScheduler and CMStochasticIterativeScheduler sample other consistency models",
    "DDPMWuerstchenScheduler": "Wuerstchen's schedule by ratios is not supported; "
    "DDPMScheduler with squaredcos_cap_v2 is the nearest",
    "ConsistencyDecoderScheduler": "the consistency decoder is not supported; "
    "decode with the AutoencoderKL of the model",
    "DDIMInverseScheduler": _INVERSE.format("DDIMScheduler"),
    "DPMSolverMultistepInverseScheduler": _INVERSE.format("DPMSolverMultistepScheduler"),
    "KarrasVeScheduler": "its networks predict the score of pixels; "
    "EDMEulerScheduler with the sampler edm is its method for EDM networks",
    "ScoreSdeVeScheduler": "its networks predict the score of pixels; "
    "the sampler ddpm on the schedule ve is its predictor",
    "ScoreSdeVpScheduler": "its networks predict the score of pixels; "
    "the sampler ddpm on the schedule vp is its predictor",
    "RePaintScheduler": "it goes back and forth in a run; name DDPMScheduler with the same fields "
    "instead, and inpaint with the task `inpaint`",
    "UnCLIPScheduler": "unCLIP's prior and pixels are not supported; "
    "DDPMScheduler with squaredcos_cap_v2 is its sampler for other models",
}
"""Classes of diffusers 0.42 that are refused: the reason, and the nearest one that works."""

_CHOICES = {
    field: words.split()
    for field, words in {
        "beta_schedule": "linear scaled_linear squaredcos_cap_v2 sigmoid",
        "prediction_type": "epsilon sample v_prediction flow_prediction",
        "timestep_spacing": "linspace leading trailing",
        "final_sigmas_type": "zero sigma_min",
        "interpolation_type": "linear log_linear",
        "timestep_type": "discrete continuous",
        "algorithm_type": "dpmsolver dpmsolver++ sde-dpmsolver sde-dpmsolver++ deis "
        "data_prediction noise_prediction",
        "solver_type": "midpoint heun logrho bh1 bh2",
        "variance_type": "fixed_small fixed_small_log fixed_large fixed_large_log "
        "learned learned_range",
        "sigma_schedule": "karras exponential",
        "time_shift_type": "exponential linear",
    }.items()
}
_NUMBERS = {"sigma_min", "sigma_max", "shift_terminal"}  # None, or a number
_POSITIVE = {"rho", "shift", "flow_shift", "timestep_scaling", "beta_start", "beta_end"}
_POSITIVE |= {"sigma_min", "sigma_max", "sigma_data"}
_FREE = {"trained_betas", "solver_p", "scale_factors", "upscale_mode", "disable_corrector"}
_FREE |= {"noise_sampler_seed", "tau_func"}
# Fields of older versions and of other sister classes, which published configs still carry.
_OLD = {"tensor_format", "timestep_values", "clip_sample_value", "predictor_order"}
_OLD |= {"corrector_order", "tau_func", "skip_prk_steps"}


def class_names(*kinds: str) -> tuple[str, ...]:
    """Return the full names of scheduler classes: "DDIM" is DDIMScheduler."""
    return tuple(f"{kind}Scheduler" for kind in kinds)


def read_fields(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read a scheduler config's class and the values of all fields of that class.

    Args:
        values: The JSON object of scheduler_config.json.

    Returns:
        The class name, and field -> value with defaults filled in.

    Raises:
        UserError: An unknown class or field, or a value that the field does not take.
    """
    name = _class_of(values.get("_class_name"))
    defaults = CLASSES[name]
    tables = {**TABLE_CLASSES, **EDM_CLASSES, **OTHER_CLASSES}
    sisters = FLOW_CLASSES if name in FLOW_CLASSES else tables
    check_fields(values, _OLD.union(defaults, *sisters.values()))
    return name, {
        field: _checked(field, values.get(field, default), default)
        for field, default in defaults.items()
    }


def _class_of(name: Any) -> str:
    """Return the class, without the "Flax" of configs that JAX wrote.

    Raises:
        UserError: A class that is not supported, with the nearest that is, or not known.
    """
    scheduler = name.removeprefix("Flax") if isinstance(name, str) else None
    if scheduler in CLASSES:
        return scheduler
    if scheduler in UNSUPPORTED:
        raise UserError(f"scheduler class {name!r} is not supported: {UNSUPPORTED[scheduler]}")
    # Without the ending, by which any two names would be alike.
    stems = {kind.removesuffix("Scheduler").lower(): kind for kind in CLASSES}
    stem = str(name).removesuffix("Scheduler").lower()
    close = [stem] if stem in stems else difflib.get_close_matches(stem, stems, n=2, cutoff=0.8)
    near = [stems[s] for s in close] or [
        kind for s, kind in stems.items() if stem and s.startswith(stem)
    ][:2]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"scheduler class {name!r} is not known: {hint}DDIMScheduler and "
        "EulerDiscreteScheduler sample any table of betas, "
        "FlowMatchEulerDiscreteScheduler any flow; with --sampler NAME the model opens as one of "
        "them, by the fields that they share"
    )


def check_fields(values: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raise `UserError` for a field that is not among `fields` and has no leading underscore."""
    for field, value in values.items():
        if field not in fields and not field.startswith("_"):
            raise UserError(
                f"scheduler config field {field}={value!r} is not known: "
                "it might change the result, so it is refused"
            )


def _checked(field: str, value: Any, default: Any) -> Any:
    """Return the value if the field takes it; `UserError` otherwise."""
    if field in _FREE:
        return value
    if value is None and (default is None or field in _LEVELS):
        return default
    kind = float if field in _NUMBERS else type(default)
    positive = field in _POSITIVE
    if field in _CHOICES:
        valid, expected = value in _CHOICES[field], f"one of {', '.join(_CHOICES[field])}"
    elif kind is bool:
        valid, expected = isinstance(value, bool), "true or false"
    elif kind is int:
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        expected = "a whole number of at least 0"
    else:
        valid = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (math.isfinite(value) or value == default)
            and (value > 0 or not positive)
        )
        expected = "a positive number" if positive else "a number"
    if not valid:
        raise UserError(f"scheduler config {field}={value!r}: expected {expected}")
    return value
