"""diffusers' scheduler_config.json <-> our process: schedule, parameterization."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from sfumato.diffuse.parameterization import edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.rescale import Shifted, ZeroTerminalSNR
from sfumato.diffuse.schedule import EDM, BetaTable, RectifiedFlow, VarianceExploding, VariancePreserving, schedule, table
from sfumato.errors import UserError, unknown

_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_TABLE_CLASSES = ("DDIMScheduler", "DDPMScheduler")
_FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
_OWN_CLASS = "SfumatoProcess"

# Fields that decide the process, which we read.
_READ = {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "trained_betas", "rescale_betas_zero_snr"}
# Fields that we stand for with one value only: (diffusers' default, ours).
_TABLE_FIXED: dict[str, tuple[Any, Any]] = {"thresholding": (False, False)}
_TABLE_FIXED |= {"clip_sample": (True, False)}  # latents have no bounds
_FLOW_FIXED = {"num_train_timesteps": (1000, 1000), "shift_terminal": (None, None), "invert_sigmas": (False, False)}
_FLOW_FIXED |= {f"use_{k}": (False, False) for k in ("dynamic_shifting", "karras_sigmas", "exponential_sigmas", "beta_sigmas")}
# Fields that say how a run is sampled, which is asked for elsewhere, or that only matter beside a value refused above.
_TABLE_FREE = {"timestep_spacing", "steps_offset", "set_alpha_to_one", "variance_type", "skip_prk_steps"}
_TABLE_FREE |= {"clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"}
_FLOW_READ = {"shift"}
_FLOW_FREE = {"stochastic_sampling", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}


def to_scheduler_config(process: Process) -> dict[str, Any]:
    """A DDIMScheduler, DDPMScheduler (sigmoid) or FlowMatchEulerDiscreteScheduler config that stands for the same process.

    Where the ecosystem has none (continuous VP, VE, EDM, ...) a config of our own, "SfumatoProcess", which only sfumato opens.
    """
    table, kind = process.schedule, process.parameterization.name
    shift, flow = (table.shift, table.base) if isinstance(table, Shifted) else (1.0, table)
    if isinstance(flow, RectifiedFlow) and kind == "flow":
        return {"_class_name": _FLOW_CLASS, "num_train_timesteps": 1000, "shift": shift}
    zero = isinstance(table, ZeroTerminalSNR) and table.last == 0
    table = table.base if isinstance(table, ZeroTerminalSNR) and zero else table
    if not isinstance(table, BetaTable) or table.kind not in (*_KINDS, "table") or kind not in _TYPES:
        return _own_config(process)
    values = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(table.betas),
        "beta_schedule": _KINDS.get(table.kind, "linear"),
        "beta_start": table.beta_start,
        "beta_end": table.beta_end,
        "prediction_type": _TYPES[kind],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 0,
    }
    if table.kind == "table":
        values["trained_betas"] = list(table.betas)
    if zero:
        values["rescale_betas_zero_snr"] = True
    if table.kind == "sigmoid":  # DDIMScheduler has no such schedule
        return values | {"_class_name": "DDPMScheduler"}
    return values | {"set_alpha_to_one": True}


def _own_config(process: Process) -> dict[str, Any]:
    """Schedule and parameterization by their own names and numbers."""

    def described(chosen: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"class": type(chosen).__name__}
        for field in fields(chosen):
            value = getattr(chosen, field.name)
            values[field.name] = described(value) if is_dataclass(value) else value
        return values

    parameter = process.parameterization
    sigma_data = {} if parameter.name != "edm" else {"sigma_data": parameter.row.sigma_data}  # pyright: ignore[reportFunctionMemberAccess]
    return {"_class_name": _OWN_CLASS, "schedule": described(process.schedule), "parameterization": parameter.name, **sigma_data}


def _own_process(values: Mapping[str, Any]) -> Process:
    """The inverse; `UserError` for what it does not know."""
    classes: dict[str, Any] = {
        c.__name__: c for c in (BetaTable, RectifiedFlow, VariancePreserving, VarianceExploding, EDM, ZeroTerminalSNR, Shifted)
    }

    def built(described: Any) -> Any:
        if not isinstance(described, Mapping) or described.get("class") not in classes:
            raise UserError(f"scheduler config schedule {described!r}: expected a class of {', '.join(classes)} with its numbers")
        chosen = classes[described["class"]]
        known = {field.name for field in fields(chosen)}
        given = {key: value for key, value in described.items() if key != "class"}
        if not given.keys() <= known:
            raise unknown(f"number of schedule {chosen.__name__}", min(given.keys() - known), known)
        return chosen(**{k: built(v) if k == "base" else tuple(v) if isinstance(v, list) else v for k, v in given.items()})

    name, rest = values.get("parameterization", ""), values.keys() - {"_class_name", "schedule", "parameterization", "sigma_data"}
    if rest:
        raise UserError(f"scheduler config field {min(rest)!r} is not known: it might change the result, so it is refused")
    return Process(built(values.get("schedule")), edm(values["sigma_data"]) if "sigma_data" in values else parameterization(name))


def _check(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, Any]], free: set[str]) -> None:
    """`UserError` for a field that would change the result and that we do not honour."""
    for field, (default, ours) in fixed.items():
        if values.get(field, default) != ours:
            given = f"{field}={values[field]!r}" if field in values else f"without {field}, whose default is {default!r},"
            raise UserError(f"scheduler config {given} is not supported: expected {field}={ours!r}")
    for field in sorted(values.keys() - fixed.keys() - free):
        if not field.startswith("_"):
            raise UserError(f"scheduler config field {field}={values[field]!r} is not known: it might change the result, so it is refused")


def from_scheduler_config(values: dict[str, Any]) -> Process:
    """The process that a scheduler config stands for; a class or a field that we would not honour is a `UserError`."""
    name = values.get("_class_name")
    if name == _OWN_CLASS:
        return _own_process(values)
    if name == _FLOW_CLASS:
        _check(values, _FLOW_FIXED, _FLOW_FREE | _FLOW_READ)
        shift = values.get("shift", 1.0)
        return Process(schedule("flow") if shift == 1 else Shifted(schedule("flow"), shift), parameterization("flow"))
    if name not in _TABLE_CLASSES:
        raise UserError(f"scheduler class {name!r} is not supported: expected one of {', '.join((*_TABLE_CLASSES, _FLOW_CLASS))}")
    _check(values, _TABLE_FIXED, _TABLE_FREE | _READ)
    kinds, types = {v: k for k, v in _KINDS.items()}, {v: k for k, v in _TYPES.items()}
    kind, prediction = values.get("beta_schedule", "linear"), values.get("prediction_type", "epsilon")
    if kind not in kinds or prediction not in types:
        raise UserError(
            f"scheduler config beta_schedule={kind!r}, prediction_type={prediction!r}: expected one of {sorted(kinds)} and {sorted(types)}"
        )
    betas, zero = values.get("trained_betas"), values.get("rescale_betas_zero_snr", False)
    steps = values.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not isinstance(zero, bool) or (betas is not None and len(betas) != steps):
        raise UserError(
            f"scheduler config num_train_timesteps={steps!r}, rescale_betas_zero_snr={zero!r}, {0 if betas is None else len(betas)} trained_betas: "
            "expected a whole number, true or false, and as many betas"
        )
    if betas is not None:
        chosen = table(betas)
        return Process(ZeroTerminalSNR(chosen) if zero else chosen, parameterization(types[prediction]))
    ends = {} if kind == "squaredcos_cap_v2" else {"start": values.get("beta_start", 0.0001), "end": values.get("beta_end", 0.02)}
    chosen = schedule(kinds[kind], steps=steps, **ends)
    return Process(ZeroTerminalSNR(chosen) if zero else chosen, parameterization(types[prediction]))
