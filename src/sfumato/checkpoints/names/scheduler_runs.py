"""How a scheduler's fields say that a run goes: our sampler and spacing, as words, and what is done
otherwise than they say.

| class | sampler | spacing |
|---|---|---|
| DDIM, DDPM, PNDM | `ddim`, `ddpm`, `pndm` (`plms` with skip_prk_steps) | even, in whole timesteps
| | Euler, EulerAncestral, Heun, LMS, KDPM2 | `euler`, `euler_ancestral`, `heun`, `lms`,
`dpm_solver_2` | even, or by level between its ends | | KDPM2Ancestral | `dpm_solver_2_ancestral` |
the same |
| DPMSolverSDE | `dpmpp_sde`; its two noises of a step are independent (theirs are one Brownian
path's) | the same | | DPMSolverMultistep, EDMDPMSolverMultistep | `dpmpp_2m`,
`dpmpp_3m:published=true`, their `_sde`; order 1: `ddim`, `ddpm` | even but the last, or by level |
| UniPC, DEIS | `unipc`, `deis` | the same |
| DPMSolverSinglestep | `dpmpp_2s`, `dpm_solver_2`, `dpm_solver_3`; a step here has 2 or 3 calls,
theirs counts calls | the same | | LCM, TCD | `lcm`, `tcd` | `lcm` |
| EDMEuler | `euler` | `karras`, `exponential` |
| FlowMatchEuler, -Heun, -LCM | `euler` (stochastic: `consistency`), `heun`, `consistency` |
`linspace`, `trailing`, `shifted`, by level |

Honoured by options: steps_offset, set_alpha_to_one=False and final_sigmas_type="sigma_min"
(`clean=false`), solver_order and -type, DEIS's end at timestep 0, flows whose least time is shifted
twice (`end`). Done our way, without a word, as theirs is a defect or the difference is small (the
table of tests/interop/test_samplers.py): fixed strides of DDIM and PNDM whatever the spacing,
PNDM's means of v, sigma linear between timesteps (interpolation_type), whole timesteps told between
levels, the first noise of x/alpha, flow solvers that begin at 0.999, sde-dpmsolver++ of order 3,
UniPC at sigma 0 with bh1. What is left is said in `notes`.

clip_sample and thresholding are for pixels in [-1, 1] and are left out, with a note: latents have
no bounds, and diffusers' own Stable Diffusion pipelines turn clip_sample off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.checkpoints.names.scheduler_fields import EDM_CLASSES, FLOW_CLASSES
from sfumato.checkpoints.names.scheduler_times import (
    DynamicShift,
    ends_clean,
    flow_solver_spacing,
    flow_spacing,
    level_of,
    sampler_word,
    spacing_word,
    table_spacing,
)
from sfumato.errors import UserError


@dataclass(frozen=True)
class Way:
    """How a run goes: sampler and spacing in words, a shift that the spacing follows, and what is
    done otherwise than the fields say.
    """

    sampler: str
    spacing: str
    dynamic: DynamicShift | None = None
    notes: tuple[str, ...] = ()


def way_of(name: str, values: Mapping[str, Any], even: bool | None = None) -> Way:
    """The way of a class and all of its fields (`read_fields`). `even`: see
    `scheduler.read_scheduler`.
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
        return Way(
            "consistency" if values.get("stochastic_sampling") else sampler,
            spacing,
            dynamic,
            tuple(notes),
        )
    sampler = _SAMPLERS.get(name, _plain)(name, values, notes)
    if values.get("use_flow_sigmas"):
        dynamic, spacing = flow_solver_spacing(name, values, notes)
        return Way(sampler, spacing, dynamic, tuple(notes))
    if name in EDM_CLASSES:
        rho = {"rho": float(values["rho"])} if values["sigma_schedule"] == "karras" else {}
        spacing = spacing_word(values["sigma_schedule"], clean=ends_clean(name, values), **rho)
    elif name in ("LCMScheduler", "TCDScheduler"):
        spacing = spacing_word(
            "lcm", original=values["original_inference_steps"], clean=ends_clean(name, values)
        )
    else:
        spacing = table_spacing(name, values, notes)
    return Way(sampler, spacing, None, tuple(notes))


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
    return sampler_word(_NAMES[name])


def _ddpm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    kind = values["variance_type"]
    # not published; diffusers takes the network's own number for the variance, guided-diffusion for
    # its logarithm
    if kind == "learned":
        notes.append(
            "variance_type='learned' is left out: the variance is that of fixed_small; 'learned_range' is the network's own"
        )
    word = (
        "learned"
        if kind == "learned_range"
        else "large"
        if kind.startswith("fixed_large")
        else "small"
    )
    return sampler_word("ddpm", variance=word)


def _pndm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return sampler_word("plms" if values["skip_prk_steps"] else "pndm")


def _lcm(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return sampler_word("lcm", scaling=float(values["timestep_scaling"]))


def _order(name: str, values: Mapping[str, Any], highest: int) -> int:
    if not 1 <= values["solver_order"] <= highest:
        raise UserError(
            f"{name} with solver_order={values['solver_order']}: expected 1 to {highest}"
        )
    return values["solver_order"]


FEW = 15
"""Steps below which DPM-Solver and DEIS lower the order of the last ones there."""


def _lowered(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """How the order falls at the end: `lower_order_final` in runs of few steps, `euler_at_final` in
    all. A step to sigma 0 is of first order anyway, and where levels end at the least of the table
    the last step there has no length: nothing is lowered but that.
    """
    to_noise, order = not ends_clean(name, values), values["solver_order"]
    if to_noise and (level_of(values) or name == "EDMDPMSolverMultistepScheduler"):
        return {}
    if values.get("euler_at_final") and to_noise and order == 2:
        return {"lower_order_final": True}
    return {"lower_below": FEW} if values["lower_order_final"] and (to_noise or order == 3) else {}


def _multistep(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    order, kind = _order(name, values, 3), values["algorithm_type"]
    # theirs takes UniPC's and DEIS's words for midpoint
    solver = "heun" if values["solver_type"] == "heun" else "midpoint"
    stochastic = kind.startswith("sde")
    if not kind.endswith("++") and kind != "deis" and not (order == 1 and not stochastic):
        notes.append(
            f"algorithm_type={kind!r} is not here: {kind}++, by the clean latent instead of the noise, is taken in its place"
        )
    if order == 1:
        return sampler_word("ddpm" if stochastic else "ddim")
    last = _lowered(name, values)
    if order == 3:
        return sampler_word(
            "dpmpp_3m_sde" if stochastic else "dpmpp_3m", published=True, solver=solver, **last
        )
    if stochastic:
        return sampler_word("dpmpp_2m_sde", solver=solver, **last)
    if solver == "heun":
        return sampler_word("dpmpp_2m_sde", eta=0.0, solver=solver, **last)
    return sampler_word("dpmpp_2m", **last)


def _singlestep(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    order, kind = _order(name, values, 3), values["algorithm_type"]
    if order == 1:
        return sampler_word("ddpm" if kind.startswith("sde") else "ddim")
    found, calls = ("dpmpp_sde", 2) if kind.startswith("sde") else ("dpmpp_2s", 2)
    if kind == "dpmsolver":
        found, calls = ("dpm_solver_2", 2) if order == 2 else ("dpm_solver_3", 3)
    elif order == 3:
        notes.append(
            f"solver_order=3 of {kind} singlestep is not here: {found}, of order 2, is taken in its place"
        )
    notes.append(
        f"{name} counts network calls as steps, {found} has {calls} calls a step: ask for fewer steps"
    )
    return sampler_word(found)


def _unipc(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    never = values["disable_corrector"]
    if not isinstance(never, list | tuple) or not all(isinstance(k, int) for k in never):
        raise UserError(f"scheduler config disable_corrector={never!r}: expected a list of steps")
    if not values["predict_x0"]:
        notes.append(
            "predict_x0=False is not here: UniPC by the clean latent is taken in its place"
        )
    if values["solver_p"] is not None:
        notes.append("solver_p is not here: UniPC's own predictor is taken in its place")
    if never and list(never) != list(range(len(never))):
        notes.append(f"disable_corrector={list(never)!r}: the corrector is left out of all steps")
    # theirs takes the words of DPM-Solver and DEIS for bh2
    variant = "bh1" if values["solver_type"] == "bh1" else "bh2"
    stops = not ends_clean(name, values) and level_of(values)  # the last step there has no length
    options = {
        "variant": variant,
        "corrector": not never,
        "lower_order_final": values["lower_order_final"] and not stops,
    }
    return sampler_word("unipc", order=_order(name, values, 4), **options)


def _deis(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    return sampler_word(
        "deis", order=_order(name, values, 3), lower_order_final=False, **_lowered(name, values)
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
