"""Scheduler fields -> how a run steps: the specs of a sampler and a spacing.

| class | sampler | spacing |
|---|---|---|
| DDIM, DDPM, PNDM | `ddim`, `ddpm`, `pndm` (`plms` with skip_prk_steps) | even, in whole timesteps
| | Euler, EulerAncestral, Heun, LMS, KDPM2 | `euler`, `euler_ancestral`, `heun`, `lms`,
`dpm_solver_2` | even, or by level between its ends | | KDPM2Ancestral | `dpm_solver_2_ancestral` |
the same |
| DPMSolverSDE | `dpmpp_sde`, the two noises of a step independent (there one Brownian path's) | the
same | | DPMSolverMultistep, EDMDPMSolverMultistep | `dpmpp_2m`, `dpmpp_3m:published=true`, their
`_sde`; order 1: `ddim`, `ddpm` | even but the last, or by level | | UniPC, DEIS | `unipc`, `deis` |
the same |
| DPMSolverSinglestep | `dpmpp_2s`, `dpm_solver_2`, `dpm_solver_3`; a step here has 2 or 3 calls,
there calls count as steps | the same | | LCM, TCD | `lcm`, `tcd` | `lcm` |
| EDMEuler | `euler` | `karras`, `exponential` |
| FlowMatchEuler, -Heun, -LCM | `euler` (stochastic: `consistency`), `heun`, `consistency` |
`linspace`, `trailing`, `shifted`, by level |

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
from dataclasses import dataclass
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
from sfumato.errors import UserError
from sfumato.registry import find
from sfumato.spec import Spec, options_of


def format_sampler(name: str, **options: Any) -> str:
    """Return the canonical spec of a sampler, without the options that equal their defaults."""
    return str(Spec.of("sampler", name, dict(sorted(options.items())), _options(name)))


def canonical_sampler(sampler: str) -> str:
    """Return the one spelling of all specs of a sampler that mean the same."""
    spec = Spec.parse(sampler)
    return format_sampler(spec.name, **spec.options)


def sampler_values(sampler: str) -> tuple[str, dict[str, Any]]:
    """Return a sampler's name and its options as numbers, words and flags."""
    spec = Spec.parse(sampler)
    return spec.name, spec.values("sampler", _options(spec.name))


def _options(name: str) -> dict[str, Any]:
    return options_of(find("diffuse.samplers", name))


@dataclass(frozen=True)
class SamplerSettings:
    """Sampler and spacing of a scheduler config.

    Args:
        sampler: Spec of the sampler.
        spacing: Spec of the spacing; of the largest image where `dynamic` is set.
        dynamic: The shift by the image's size.
        notes: A sentence for each field that is not followed.
    """

    sampler: str
    spacing: str
    dynamic: DynamicShift | None = None
    notes: tuple[str, ...] = ()


def sampler_settings(
    name: str, values: Mapping[str, Any], even: bool | None = None
) -> SamplerSettings:
    """Return the sampler and the spacing of a scheduler class.

    Args:
        name: Class of diffusers.
        values: All of its fields, from `read_fields`.
        even: See `flow_spacing`.
    """
    notes: list[str] = []
    if values.get("clip_sample") or values.get("thresholding"):
        field = "clip_sample" if values.get("clip_sample") else "thresholding"
        notes.append(
            f"{field}=True is for pixels and is left out: latents have no bounds; set it to false"
        )
    if name in FLOW_CLASSES:
        sampler = {
            "FlowMatchHeunDiscreteScheduler": "heun",
            "FlowMatchLCMScheduler": "consistency",
        }.get(name, "euler")
        if values.get("scale_factors"):
            notes.append(
                f"scale_factors={values['scale_factors']!r} is left out: latents keep their size during a run"
            )
        dynamic, spacing = flow_spacing(values, even, notes)
        return SamplerSettings(
            "consistency" if values.get("stochastic_sampling") else sampler,
            spacing,
            dynamic,
            tuple(notes),
        )
    sampler = _SAMPLERS.get(name, _plain)(name, values, notes)
    if values.get("use_flow_sigmas"):
        dynamic, spacing = flow_solver_spacing(name, values, notes)
        return SamplerSettings(sampler, spacing, dynamic, tuple(notes))
    if name in EDM_CLASSES:
        rho = {"rho": float(values["rho"])} if values["sigma_schedule"] == "karras" else {}
        spacing = format_spacing(values["sigma_schedule"], clean=ends_clean(name, values), **rho)
    elif name in ("LCMScheduler", "TCDScheduler"):
        spacing = format_spacing(
            "lcm", original=values["original_inference_steps"], clean=ends_clean(name, values)
        )
    else:
        spacing = table_spacing(name, values, notes)
    return SamplerSettings(sampler, spacing, None, tuple(notes))


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
}


def _plain(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return format_sampler(_NAMES[name])


def _ddpm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    kind = values["variance_type"]
    # Not published. diffusers takes the network's number for the variance, guided-diffusion for
    # its logarithm.
    if kind == "learned":
        notes.append(
            "variance_type='learned' is left out: the variance is that of fixed_small; 'learned_range' is the network's own"
        )
    variance = (
        "learned"
        if kind == "learned_range"
        else "large"
        if kind.startswith("fixed_large")
        else "small"
    )
    return format_sampler("ddpm", variance=variance)


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
"""Number of steps below which diffusers' DPM-Solver and DEIS lower the order of the last steps."""


def _final_order(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that lower the order at the end of a run.

    `lower_order_final` lowers it in runs of few steps, `euler_at_final` in all. A step to sigma 0
    is of first order anyway. Where levels end at the least noise of the table, the last step of
    diffusers has no length, and nothing else is lowered.
    """
    to_noise, order = not ends_clean(name, values), values["solver_order"]
    if to_noise and (noise_level_spacing(values) or name == "EDMDPMSolverMultistepScheduler"):
        return {}
    if values.get("euler_at_final") and to_noise and order == 2:
        return {"lower_order_final": True}
    return (
        {"lower_below": LOWER_BELOW}
        if values["lower_order_final"] and (to_noise or order == 3)
        else {}
    )


def _multistep(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    order, kind = _order(name, values, 3), values["algorithm_type"]
    # diffusers reads UniPC's and DEIS's types as midpoint.
    solver = "heun" if values["solver_type"] == "heun" else "midpoint"
    stochastic = kind.startswith("sde")
    if not kind.endswith("++") and kind != "deis" and not (order == 1 and not stochastic):
        notes.append(
            f"algorithm_type={kind!r} is not here: {kind}++, by the clean latent instead of the noise, is taken in its place"
        )
    if order == 1:
        return format_sampler("ddpm" if stochastic else "ddim")
    last = _final_order(name, values)
    if order == 3:
        return format_sampler(
            "dpmpp_3m_sde" if stochastic else "dpmpp_3m", published=True, solver=solver, **last
        )
    if stochastic:
        return format_sampler("dpmpp_2m_sde", solver=solver, **last)
    if solver == "heun":
        return format_sampler("dpmpp_2m_sde", eta=0.0, solver=solver, **last)
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
            f"solver_order=3 of {kind} singlestep is not here: {sampler}, of order 2, is taken in its place"
        )
    notes.append(
        f"{name} counts network calls as steps, {sampler} has {calls} calls a step: ask for fewer steps"
    )
    return format_sampler(sampler)


def _unipc(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    uncorrected = values["disable_corrector"]
    if not isinstance(uncorrected, list | tuple) or not all(
        isinstance(k, int) for k in uncorrected
    ):
        raise UserError(
            f"scheduler config disable_corrector={uncorrected!r}: expected a list of steps"
        )
    if not values["predict_x0"]:
        notes.append(
            "predict_x0=False is not here: UniPC by the clean latent is taken in its place"
        )
    if values["solver_p"] is not None:
        notes.append("solver_p is not here: UniPC's own predictor is taken in its place")
    if uncorrected and list(uncorrected) != list(range(len(uncorrected))):
        notes.append(
            f"disable_corrector={list(uncorrected)!r}: the corrector is left out of all steps"
        )
    # diffusers reads DPM-Solver's and DEIS's types as bh2.
    variant = "bh1" if values["solver_type"] == "bh1" else "bh2"
    # The last step of diffusers has no length.
    empty_end = not ends_clean(name, values) and noise_level_spacing(values)
    options = {
        "variant": variant,
        "corrector": not uncorrected,
        "lower_order_final": values["lower_order_final"] and not empty_end,
    }
    return format_sampler("unipc", order=_order(name, values, 4), **options)


def _deis(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return format_sampler(
        "deis", order=_order(name, values, 3), lower_order_final=False, **_final_order(name, values)
    )


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
}
