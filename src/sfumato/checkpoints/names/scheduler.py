"""diffusers' scheduler_config.json <-> our process: schedule, parameterization."""

from typing import Any

from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import BetaTable, RectifiedFlow, schedule
from sfumato.errors import UserError

_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_TABLE_CLASSES = ("DDIMScheduler", "DDPMScheduler")
_NOT_OURS = {"rescale_betas_zero_snr": False, "trained_betas": None, "thresholding": False}


def to_scheduler_config(process: Process) -> dict[str, Any]:
    """A DDIMScheduler or FlowMatchEulerDiscreteScheduler config that stands for the same process."""
    table, kind = process.schedule, process.parameterization.name
    if isinstance(table, RectifiedFlow) and kind == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    if not isinstance(table, BetaTable) or table.kind not in _KINDS or kind not in _TYPES:
        raise UserError(
            f"no scheduler of the ecosystem stands for schedule {getattr(table, 'kind', table)!r} with parameterization {kind!r}: save in another pair"
        )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(table.betas),
        "beta_schedule": _KINDS[table.kind],
        "beta_start": table.beta_start,
        "beta_end": table.beta_end,
        "prediction_type": _TYPES[kind],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }


def from_scheduler_config(values: dict[str, Any]) -> Process:
    """The process that a scheduler config stands for; a class or a field that we would not honour is refused."""
    name = values.get("_class_name")
    if name == "FlowMatchEulerDiscreteScheduler":
        if values.get("shift", 1.0) != 1.0 or values.get("use_dynamic_shifting", False):
            raise UserError("a flow-matching scheduler with a shift is not supported yet: expected shift 1.0")
        return Process(schedule("flow"), parameterization("flow"))
    if name not in _TABLE_CLASSES:
        raise UserError(
            f"scheduler class {name!r} is not supported: expected one of {', '.join((*_TABLE_CLASSES, 'FlowMatchEulerDiscreteScheduler'))}"
        )
    for field, expected in _NOT_OURS.items():
        if values.get(field, expected) != expected:
            raise UserError(f"scheduler config {field}={values[field]!r} is not supported: expected {expected!r}")
    kinds, types = {v: k for k, v in _KINDS.items()}, {v: k for k, v in _TYPES.items()}
    kind, prediction = values.get("beta_schedule", "linear"), values.get("prediction_type", "epsilon")
    if kind not in kinds or prediction not in types:
        raise UserError(
            f"scheduler config beta_schedule={kind!r}, prediction_type={prediction!r}: expected one of {sorted(kinds)} and {sorted(types)}"
        )
    steps = int(values.get("num_train_timesteps", 1000))
    ends = {} if kind == "squaredcos_cap_v2" else {"start": values.get("beta_start", 0.0001), "end": values.get("beta_end", 0.02)}
    return Process(schedule(kinds[kind], steps=steps, **ends), parameterization(types[prediction]))
