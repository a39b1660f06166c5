"""Scheduler fields -> how a run steps: the specs of a sampler and a spacing.

    class                      sampler                          spacing
    DDIM, DDPM, PNDM           `ddim`, `ddpm`, `pndm` (`plms`   even, in whole timesteps
                               with skip_prk_steps)
    Euler, EulerAncestral,     `euler`, `euler_ancestral`,      even, or by level between the
    Heun, LMS, KDPM2,          `heun`, `lms`, `dpm_solver_2`,   ends of the even times
    KDPM2Ancestral             `dpm_solver_2_ancestral`
    DPMSolverSDE               `dpmpp_sde`, the two noises of   the same
                               a step independent (there one
                               Brownian path's)
    DPMSolverMultistep,        `dpmpp_2m`,                      even but the last, or by level
    EDMDPMSolverMultistep      `dpmpp_3m:published=true`,
                               their `_sde`; order 1: `ddim`,
                               `ddpm`
    UniPC, DEIS, SASolver      `unipc`, `deis`, `sa_solver`     the same
    DPMSolverSinglestep        `dpmpp_2s`, `dpm_solver_2`,      the same
                               `dpm_solver_3`; a step here
                               has 2 or 3 calls, there calls
                               count as steps
    LCM, TCD                   `lcm`, `tcd`                     `lcm`
    CMStochasticIterative      `consistency`                    `karras:original=40`
    IPNDM                      `ipndm`                          `crash`
    EDMEuler                   `euler`                          `karras`, `exponential`
    FlowMatchEuler,            `euler` (stochastic:             `linspace`, `trailing`,
    -Heun, -LCM                `consistency`), `heun`,          `shifted`, by level
                               `consistency`

Options follow steps_offset, set_alpha_to_one=False and final_sigmas_type="sigma_min"
(`clean=false`), solver_order and -type, DEIS's end at timestep 0, and flows whose least time is
shifted twice (`end`).

Some differences have no note, as diffusers has a defect there or the difference is small (the table
of tests/interop/test_samplers.py): fixed strides of DDIM and PNDM in any spacing, PNDM's means of
v, sigma linear between timesteps (interpolation_type), whole timesteps for the network between
levels, the first noise of x/alpha, flow solvers that begin at 0.999, sde-dpmsolver++ of order 3,
UniPC at sigma 0 with bh1. All other differences are in `notes`.

clip_sample and thresholding are for pixels in [-1, 1] and are left out, with a note. Latents have
no bounds, and diffusers' own Stable Diffusion pipelines turn clip_sample off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sfumato.checkpoints.schedulers.fields import EDM_CLASSES, FLOW_CLASSES
from sfumato.checkpoints.schedulers.spacing import (
    DynamicShift,
    ends_clean,
    flow_solver_spacing,
    flow_spacing,
    format_spacing,
    noise_level_spacing,
    table_spacing,
)
from sfumato.diffuse.process import Process
from sfumato.errors import UserError
from sfumato.registry import find
from sfumato.spec import Spec, options_of


def format_sampler(name: str, **options: Any) -> str:
    """Return the canonical spec of a sampler, without the options that equal their defaults."""
    return str(Spec.of("sampler", name, dict(sorted(options.items())), _options(name)))


def canonical_sampler(sampler: str) -> str:
    """Return the one spelling of all specs of a sampler that mean the same."""
    spec = Spec.parse(sampler)
    return str(spec.canonical("sampler", _options(spec.name)))


def sampler_values(sampler: str) -> tuple[str, dict[str, Any]]:
    """Return a sampler's name and its options as numbers, words and flags."""
    spec = Spec.parse(sampler)
    return spec.name, spec.values("sampler", _options(spec.name))


def _options(name: str) -> dict[str, Any]:
    return options_of(find("diffuse.samplers", name))


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler config: the process that the weights were trained for, and its run.

    Args:
        process: Schedule and parameterization.
        sampler: Spec of a sampler, such as "dpmpp_2m".
        spacing: Spec of a spacing, such as "leading:offset=1"; of the largest image where `dynamic`
            is set.
        dynamic: The shift of a spacing that follows the image's size.
        notes: A sentence for each field that is not followed.
    """

    process: Process
    sampler: str
    spacing: str
    dynamic: DynamicShift | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def default_spacing(self) -> str:
        """The spacing for images of any size."""
        return self.spacing if self.dynamic is None else self.dynamic.spec

    def spacing_for(self, tokens: int) -> str:
        """Return the spacing for an image of so many tokens (FLUX: 2x2 latent cells a token)."""
        return self.spacing if self.dynamic is None else self.dynamic.spacing_for(tokens)


def scheduler_spec(
    process: Process, name: str, values: Mapping[str, Any], even: bool | None = None
) -> SchedulerSpec:
    """Return the run of a scheduler class.

    Args:
        process: The process of the same fields, from `process_of`.
        name: Class of diffusers.
        values: All of its fields, from `read_fields`.
        even: See `flow_spacing`.
    """
    notes: list[str] = []
    flag = next(
        (f for f in ("clip_sample", "thresholding", "clip_denoised") if values.get(f)), None
    )
    if flag is not None:
        notes.append(
            f"{flag}=True is for pixels and is left out: latents have no bounds; set it to false"
        )
    sampler = _SAMPLERS.get(name, _plain)(name, values, notes)
    dynamic = None
    if name in FLOW_CLASSES:
        dynamic, spacing = flow_spacing(values, even, notes)
    elif values.get("use_flow_sigmas"):
        dynamic, spacing = flow_solver_spacing(name, values, notes)
    elif name in EDM_CLASSES:
        rho = {"rho": float(values["rho"])} if values["sigma_schedule"] == "karras" else {}
        spacing = format_spacing(values["sigma_schedule"], clean=ends_clean(name, values), **rho)
    elif name in ("LCMScheduler", "TCDScheduler"):
        original = values["original_inference_steps"]
        spacing = format_spacing("lcm", original=original, clean=ends_clean(name, values))
    elif name == "CMStochasticIterativeScheduler":
        levels = {"original": values["num_train_timesteps"], "rho": float(values["rho"])}
        spacing = format_spacing("karras", **levels)
    elif name == "IPNDMScheduler":
        spacing = format_spacing("crash")
    else:
        spacing = table_spacing(name, values, notes)
    return SchedulerSpec(process, sampler, spacing, dynamic, tuple(notes))


# ---- samplers ------------------------------------------------------------------------------------

_NAMES = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_solver_2",
    "KDPM2AncestralDiscreteScheduler": "dpm_solver_2_ancestral",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "TCDScheduler": "tcd",
    "EDMEulerScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "FlowMatchLCMScheduler": "consistency",
    "IPNDMScheduler": "ipndm",
}


def _plain(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    if values.get("scale_factors"):
        notes.append(
            f"scale_factors={values['scale_factors']!r} is left out: "
            "latents keep their size during a run"
        )
    return "consistency" if values.get("stochastic_sampling") else _NAMES[name]


def _ddpm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    kind = values["variance_type"]
    # Not published. diffusers takes the network's number for the variance, guided-diffusion for
    # its logarithm.
    if kind == "learned":
        notes.append(
            "variance_type='learned' is left out: the variance is that of fixed_small; "
            "'learned_range' is the network's own"
        )
    if kind == "learned_range":
        return format_sampler("ddpm", variance="learned")
    return format_sampler("ddpm", variance="large" if kind.startswith("fixed_large") else "small")


def _pndm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return format_sampler("plms" if values["skip_prk_steps"] else "pndm")


def _lcm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return format_sampler("lcm", scaling=float(values["timestep_scaling"]))


def _order(name: str, values: Mapping[str, Any], highest: int) -> int:
    if not 1 <= values["solver_order"] <= highest:
        raise UserError(
            f"{name} with solver_order={values['solver_order']}: expected 1 to {highest}"
        )
    return values["solver_order"]


LOWER_BELOW = 15
"""Steps below which diffusers' DPM-Solver and DEIS lower the order of the last steps."""


def _final_order(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that lower the order at the end of a run.

    `lower_order_final` lowers it in runs of few steps, `euler_at_final` in all. A step to sigma 0
    is of first order anyway. Where levels end at the least noise of the table, the last step of
    diffusers has no length: order 3 is lowered to 2 in the step before it, and nothing else.
    """
    to_noise, order = not ends_clean(name, values), values["solver_order"]
    by_level = noise_level_spacing(values) or name == "EDMDPMSolverMultistepScheduler"
    if to_noise and by_level:
        lowered = values["lower_order_final"] and order == 3 and not values.get("use_flow_sigmas")
        return {"lower_below": LOWER_BELOW - 1, "last_order": 2} if lowered else {}
    if values.get("euler_at_final") and to_noise and order == 2:
        return {"lower_order_final": True}
    lowered = values["lower_order_final"] and (to_noise or order == 3)
    final = {"euler_at_final": True} if values.get("euler_at_final") and to_noise else {}
    return final | ({"lower_below": LOWER_BELOW} if lowered else {})


def _multistep(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    order, kind = _order(name, values, 3), values["algorithm_type"]
    # diffusers reads UniPC's and DEIS's types as midpoint.
    solver = "heun" if values["solver_type"] == "heun" else "midpoint"
    stochastic = kind.startswith("sde")
    if not kind.endswith("++") and kind != "deis" and not (order == 1 and not stochastic):
        notes.append(
            f"algorithm_type={kind!r} is not here: "
            f"{kind}++, by the clean latent instead of the noise, is taken in its place"
        )
    if order == 1:
        return format_sampler("ddpm" if stochastic else "ddim")
    last = _final_order(name, values)
    if order == 3:
        sampler = "dpmpp_3m_sde" if stochastic else "dpmpp_3m"
        return format_sampler(sampler, published=True, solver=solver, **last)
    if stochastic or solver == "heun":
        eta = {} if stochastic else {"eta": 0.0}
        return format_sampler("dpmpp_2m_sde", solver=solver, **eta, **last)
    return format_sampler("dpmpp_2m", **last)


def _singlestep(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    order, kind = _order(name, values, 3), values["algorithm_type"]
    if order == 1:
        return format_sampler("ddpm" if kind.startswith("sde") else "ddim")
    sampler, calls = ("dpmpp_sde", 2) if kind.startswith("sde") else ("dpmpp_2s", 2)
    if kind == "dpmsolver":
        sampler, calls = ("dpm_solver_2", 2) if order == 2 else ("dpm_solver_3", 3)
    elif order == 3:
        notes.append(
            f"solver_order=3 of {kind} singlestep is not here: "
            f"{sampler}, of order 2, is taken in its place"
        )
    notes.append(
        f"{name} counts network calls as steps, {sampler} has {calls} calls a step: "
        "ask for fewer steps"
    )
    return format_sampler(sampler)


def _unipc(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    uncorrected = values["disable_corrector"]
    listed = isinstance(uncorrected, list | tuple)
    if not listed or not all(isinstance(k, int) for k in uncorrected):
        raise UserError(
            f"scheduler config disable_corrector={uncorrected!r}: expected a list of steps"
        )
    if not values["predict_x0"]:
        notes.append(
            "predict_x0=False is not here: UniPC by the clean latent is taken in its place"
        )
    if values["solver_p"] is not None:
        notes.append("solver_p is not here: UniPC's own predictor is taken in its place")
    # A list of the first steps means all of them only where it is as long as a usual run.
    if uncorrected and list(uncorrected) != list(range(max(20, len(uncorrected)))):
        notes.append(
            f"disable_corrector={list(uncorrected)!r}: the corrector is left out of all steps"
        )
    # diffusers reads DPM-Solver's and DEIS's types as bh2.
    variant = "bh1" if values["solver_type"] == "bh1" else "bh2"
    # The last step of diffusers has no length then, and its call corrects the one before.
    by_level = noise_level_spacing(values) and not values["use_flow_sigmas"]
    options = {
        "variant": variant,
        "corrector": not uncorrected,
        "lower_order_final": values["lower_order_final"],
        "corrected_end": bool(by_level and not ends_clean(name, values)),
    }
    return format_sampler("unipc", order=_order(name, values, 4), **options)


def _deis(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    order, last = _order(name, values, 3), _final_order(name, values)
    return format_sampler("deis", order=order, lower_order_final=False, **last)


def _sa_solver(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    orders = {key: values[f"{key}_order"] for key in ("predictor", "corrector")}
    for key, order in orders.items():
        if not 1 <= order <= 4:
            raise UserError(f"{name} with {key}_order={order}: expected 1 to 4")
    kind = values["algorithm_type"]
    if kind not in ("data_prediction", "noise_prediction"):
        raise UserError(
            f"{name} with algorithm_type={kind!r}: expected data_prediction or noise_prediction"
        )
    if kind == "noise_prediction":
        notes.append(
            "algorithm_type='noise_prediction' is not here: "
            "SA-Solver by the clean latent is taken in its place"
        )
    if values["tau_func"] is not None:
        notes.append("tau_func is left out: noise is drawn from timestep 800 down to 200")
    by_level = noise_level_spacing(values) and not values["use_flow_sigmas"]
    orders |= {"lower_order_final": values["lower_order_final"], "corrected_end": bool(by_level)}
    return format_sampler("sa_solver", **orders)


def _consistency(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    if values["s_noise"] != 1:
        notes.append(f"s_noise={values['s_noise']} is left out: the noise has variance 1")
    return format_sampler("consistency", sigma_min=float(values["sigma_min"]))


_SAMPLERS: dict[str, Callable[[str, Mapping[str, Any], list[str]], str]] = {
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "LCMScheduler": _lcm,
    "DPMSolverMultistepScheduler": _multistep,
    "EDMDPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "SASolverScheduler": _sa_solver,
    "CMStochasticIterativeScheduler": _consistency,
}
