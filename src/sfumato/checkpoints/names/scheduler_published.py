"""The scheduler configs of published model families, as data: for single files, which carry none,
and as examples.

Each says what the scheduler/scheduler_config.json of the family's first repository does, less the
fields that its class does not read. They were written down without these files at hand: a config
that comes with a model always goes first. The repositories: CompVis/stable-diffusion-v1-4,
stabilityai/stable-diffusion-2-1, -xl-base-1.0, -xl-refiner-1.0, sdxl-turbo, sd-turbo, -x4-upscaler,
-3-medium, -3.5-large, SimianLuo/LCM_Dreamshaper_v7, black-forest-labs/FLUX.1-dev and -schnell,
cosxl, playground-v2.5.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SD: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
_SD_LEADING = _SD | {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon"}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_SIZES = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_TURBO = _SD | {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sd1": {
            "_class_name": "PNDMScheduler",
            **_SD_LEADING,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
        },
        "sd2-base": {
            "_class_name": "PNDMScheduler",
            **_SD_LEADING,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
        },
        "sd2": {**_DDIM, **_SD_LEADING, "prediction_type": "v_prediction"},
        "sdxl": {
            "_class_name": "EulerDiscreteScheduler",
            **_SD_LEADING,
            "interpolation_type": "linear",
            "use_karras_sigmas": False,
        },
        "sdxl-refiner": {
            "_class_name": "EulerDiscreteScheduler",
            **_SD_LEADING,
            "interpolation_type": "linear",
            "use_karras_sigmas": False,
        },
        "sdxl-turbo": _TURBO,
        "sd-turbo": {**_TURBO, "_class_name": "EulerDiscreteScheduler"},
        "x4-upscaler": {
            **_DDIM,
            **_SD,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
        "x4-upscaler-low-res": {
            "_class_name": "DDPMScheduler",
            **_SD,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "epsilon",
            "variance_type": "fixed_small",
            "clip_sample": True,  # it only adds noise to the small image
        },
        "lcm": {
            "_class_name": "LCMScheduler",
            **_SD,
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
            "prediction_type": "epsilon",
        },
        "sd3": {**_FLOW, "shift": 3.0},
        "sd3.5": {**_FLOW, "shift": 3.0},
        "flux-dev": {**_FLOW, **_SIZES, "shift": 3.0, "use_dynamic_shifting": True},
        "flux-schnell": {**_FLOW, **_SIZES, "shift": 1.0, "use_dynamic_shifting": False},
        "cosxl": {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": 0.002,
            "sigma_max": 120.0,
            "sigma_data": 1.0,
            "sigma_schedule": "exponential",
            "prediction_type": "v_prediction",
        },
        "playground-v2.5": {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "sigma_data": 0.5,
            "prediction_type": "epsilon",
            "solver_order": 2,
        },
    }
)
"""Family -> config. "flux-schnell" is used with even times (`gives_even_times`)."""
