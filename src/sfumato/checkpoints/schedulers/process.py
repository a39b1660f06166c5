"""Scheduler fields <-> the process that the weights were trained for.

That is a table of betas and a prediction type, a flow and its shift, or the noise levels of EDM.
These fields are read strictly: a value without a process here is a `UserError`.

    beta_schedule, beta_start, beta_end,     `BetaTable`
    num_train_timesteps; trained_betas
    rescale_betas_zero_snr                   `ZeroTerminalSNR` for DDIM, DDPM, LCM and TCD; the
                                             other classes end at alpha^2 = 2^-24:
                                             `ZeroTerminalSNR(last=2**-24)`
    FlowMatch*, use_flow_sigmas              `RectifiedFlow`, `Shifted` by shift or flow_shift
                                             where the shift is not dynamic
    EDM*: sigma_min, sigma_max, sigma_data;  `EDM`, `edm(sigma_data)`; `flipped`
    v_prediction
    CMStochasticIterative: the same          `ConsistencyEDM`; `consistency(sigma_data, sigma_min)`
    IPNDM                                    `Trigonometric` and v
    Euler with timestep_type continuous      `EDM` between its levels and `edm(1, flipped=True)`,
    and v_prediction                         which is the same algebra
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

from sfumato.checkpoints.schedulers.betas import KINDS, beta_table
from sfumato.checkpoints.schedulers.fields import (
    EDM_CLASSES,
    FLOW_CLASSES,
    OWN_CLASS,
    check_fields,
    class_names,
)
from sfumato.diffuse.parameterization import consistency, edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import (
    EDM,
    BetaTable,
    ConsistencyEDM,
    RectifiedFlow,
    Schedule,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
    schedule,
    table,
)
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR
from sfumato.errors import UserError, unknown

_PARAMETERIZATIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
NEARLY_ZERO = 2.0**-24
"""alpha(1)^2 after rescale_betas_zero_snr in classes of diffusers that divide by alpha."""
_EXACTLY_ZERO = class_names("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "LCM", "TCD")


def process_of(name: str, values: Mapping[str, Any]) -> Process:
    """Return the process of a scheduler class.

    Args:
        name: Class of diffusers.
        values: All of its fields, from `read_fields`.

    Raises:
        UserError: Fields that no process here has.
    """
    if name in FLOW_CLASSES or values.get("use_flow_sigmas"):
        return _flow_process(name, values)
    if name == "CMStochasticIterativeScheduler":
        if values["num_train_timesteps"] < 1:
            raise UserError(f"{name} with num_train_timesteps=0: expected at least 1")
        low, high = values["sigma_min"], values["sigma_max"]
        return Process(
            ConsistencyEDM(sigma_min=low, sigma_max=high), consistency(values["sigma_data"], low)
        )
    if name == "IPNDMScheduler":
        if values["trained_betas"] is not None:
            raise UserError(
                f"{name} with trained_betas: expected null, the cosine and sine of its times"
            )
        return Process(Trigonometric(), parameterization("v"))
    kind = values["prediction_type"]
    if name in EDM_CLASSES:
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(
                f"{name} with prediction_type={kind!r}: expected epsilon or v_prediction, "
                "which EDM's preconditioning is written for"
            )
        levels = EDM(sigma_min=values["sigma_min"], sigma_max=values["sigma_max"])
        return Process(levels, edm(values["sigma_data"], kind == "v_prediction"))
    if kind not in _PARAMETERIZATIONS:
        raise UserError(
            f"{name} with prediction_type={kind!r}: "
            "expected epsilon, sample or v_prediction with a table of betas"
        )
    chosen = _beta_table(values)
    if values.get("timestep_type") == "continuous" and kind == "v_prediction":
        low, high = (chosen.noise_level(t) for t in (chosen.first, 1.0))
        low, high = values["sigma_min"] or low, values["sigma_max"] or high
        return Process(EDM(sigma_min=low, sigma_max=high), edm(1.0, flipped=True))
    if values.get("rescale_betas_zero_snr"):
        chosen = ZeroTerminalSNR(chosen, 0.0 if name in _EXACTLY_ZERO else NEARLY_ZERO)
    return Process(chosen, parameterization(_PARAMETERIZATIONS[kind]))


def _beta_table(values: Mapping[str, Any]) -> BetaTable:
    """Return the table of betas, from its name or its numbers."""
    steps, betas = values["num_train_timesteps"], values["trained_betas"]
    if betas is not None:
        listed = isinstance(betas, list | tuple)
        numbers = listed and all(
            isinstance(b, int | float) and not isinstance(b, bool) for b in betas
        )
        if not numbers or len(betas) != steps:
            value = f"{len(betas)} trained_betas" if listed else f"trained_betas={betas!r}"
            raise UserError(
                f"scheduler config num_train_timesteps={steps}, {value}: expected as many numbers"
            )
        return table(betas)
    if steps < 1:
        raise UserError(f"scheduler config num_train_timesteps={steps}: expected at least 1")
    kind, start, end = values["beta_schedule"], values["beta_start"], values["beta_end"]
    if kind != "squaredcos_cap_v2" and not max(start, end) < 1:
        raise UserError(
            f"scheduler config beta_start={start}, beta_end={end}: expected numbers between 0 and 1"
        )
    return beta_table(kind, steps, start, end)


def _flow_process(name: str, values: Mapping[str, Any]) -> Process:
    steps, kind = values["num_train_timesteps"], values.get("prediction_type", "flow_prediction")
    if steps != 1000:
        raise UserError(
            f"{name} with num_train_timesteps={steps}: "
            "expected 1000, the units of a flow network's timestep"
        )
    if values.get("invert_sigmas"):
        raise UserError(
            f"{name} with invert_sigmas=True: "
            "expected a flow whose time 0 is the clean latent (Mochi's runs the other way)"
        )
    if kind not in ("flow_prediction", "sample"):
        raise UserError(
            f"{name} with use_flow_sigmas and prediction_type={kind!r}: "
            "expected flow_prediction or sample"
        )
    shift = values.get("shift", values.get("flow_shift", 1.0))
    flow = schedule("flow")
    plain = values.get("use_dynamic_shifting") or shift == 1
    return Process(
        flow if plain else Shifted(flow, shift),
        parameterization("x0" if kind == "sample" else "flow"),
    )


# ---- back ----------------------------------------------------------------------------------------


def table_fields(process: Process) -> dict[str, Any] | None:
    """Return the fields that all table classes share; None without a table of betas."""
    chosen, kind = process.schedule, process.parameterization.name
    zero = isinstance(chosen, ZeroTerminalSNR)
    betas = chosen.base if zero else chosen
    types = {name: prediction_type for prediction_type, name in _PARAMETERIZATIONS.items()}
    schedules = {kind: beta_schedule for beta_schedule, kind in KINDS.items()}
    schedules["table"] = "linear"
    if not isinstance(betas, BetaTable) or betas.kind not in schedules or kind not in types:
        return None
    values = {
        "num_train_timesteps": len(betas.betas),
        "beta_schedule": schedules[betas.kind],
        "beta_start": betas.beta_start,
        "beta_end": betas.beta_end,
        "prediction_type": types[kind],
    }
    if betas.kind == "table":
        values["trained_betas"] = list(betas.betas)
    return values | ({"rescale_betas_zero_snr": True} if zero else {})


def flow_shift(process: Process) -> float | None:
    """Return the shift of a flow, 1 for a plain one; None for any other process."""
    chosen = process.schedule
    shift, flow = (chosen.shift, chosen.base) if isinstance(chosen, Shifted) else (1.0, chosen)
    return shift if isinstance(flow, RectifiedFlow) else None


def edm_fields(process: Process) -> dict[str, Any] | None:
    """Return the fields of an EDM class; None for any other process."""
    chosen, parameter = process.schedule, process.parameterization
    if not _are_edm_levels(chosen) or parameter.name not in ("edm", "edm_v"):
        return None
    return _level_fields(process) | {
        "prediction_type": "v_prediction" if parameter.name == "edm_v" else "epsilon"
    }


def consistency_fields(process: Process) -> dict[str, Any] | None:
    """Return the fields of CMStochasticIterative; None for any other process."""
    if not isinstance(process.schedule, ConsistencyEDM):
        return None
    low = process.schedule.sigma_min
    if process.parameterization.name != "consistency" or _row_number(process, "sigma_min") != low:
        return None
    return _level_fields(process) | {"clip_denoised": False}


def _are_edm_levels(chosen: Schedule) -> TypeGuard[EDM]:
    return isinstance(chosen, EDM) and not isinstance(chosen, ConsistencyEDM)


def _level_fields(process: Process) -> dict[str, Any]:
    assert isinstance(process.schedule, EDM)
    return {
        "sigma_min": process.schedule.sigma_min,
        "sigma_max": process.schedule.sigma_max,
        "sigma_data": _row_number(process, "sigma_data"),
    }


def _row_number(process: Process, name: str) -> float:
    """A number of the row of edm or consistency."""
    return getattr(process.parameterization.row, name)


# ---- SfumatoProcess ------------------------------------------------------------------------------

_SCHEDULES = [BetaTable, RectifiedFlow, VariancePreserving, VarianceExploding, EDM]
_SCHEDULES += [ZeroTerminalSNR, Shifted, ConsistencyEDM, Trigonometric]


_ROW_NUMBERS = {
    "edm": ["sigma_data"],
    "edm_v": ["sigma_data"],
    "consistency": ["sigma_data", "sigma_min"],
}
"""Numbers of a parameterization beside its name."""


def own_fields(process: Process) -> dict[str, Any]:
    """Return a config of `OWN_CLASS`, for processes without a class in diffusers.

    It names the schedule and the parameterization, with their own numbers.
    """

    def described(chosen: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"class": type(chosen).__name__}
        for field in fields(chosen):
            value = getattr(chosen, field.name)
            values[field.name] = described(value) if is_dataclass(value) else value
        return values

    name = process.parameterization.name
    config = {"_class_name": OWN_CLASS, "schedule": described(process.schedule)}
    config["parameterization"] = name
    for number in _ROW_NUMBERS.get(name, ()):
        config[number] = _row_number(process, number)
    return config


def own_process(values: Mapping[str, Any]) -> Process:
    """Return the process of a config of `OWN_CLASS`, the inverse of `own_fields`.

    Raises:
        UserError: An unknown class, field or number.
    """
    classes: dict[str, Any] = {c.__name__: c for c in _SCHEDULES}

    def built(described: Any) -> Schedule:
        if not isinstance(described, Mapping) or described.get("class") not in classes:
            raise UserError(
                f"scheduler config schedule {described!r}: "
                f"expected a class of {', '.join(classes)} with its numbers"
            )
        chosen = classes[described["class"]]
        names = {field.name for field in fields(chosen)}
        numbers = {key: value for key, value in described.items() if key != "class"}
        if not numbers.keys() <= names:
            raise unknown(
                f"number of schedule {chosen.__name__}", min(numbers.keys() - names), names
            )
        return chosen(
            **{
                k: built(v) if k == "base" else tuple(v) if isinstance(v, list) else v
                for k, v in numbers.items()
            }
        )

    numbers = {"sigma_data", "sigma_min"}
    check_fields(values, {"_class_name", "schedule", "parameterization"} | numbers)
    name, sigma_data = values.get("parameterization", ""), values.get("sigma_data", 1.0)
    if name in ("edm", "edm_v"):
        target = edm(sigma_data, name == "edm_v")
    elif name == "consistency":
        target = consistency(**{key: values[key] for key in numbers & values.keys()})
    else:
        target = parameterization(name)
    return Process(built(values.get("schedule")), target)
