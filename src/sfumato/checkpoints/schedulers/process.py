"""Scheduler fields <-> the process that the weights were trained for.

That is a table of betas and a prediction type, a flow and its shift, or the noise levels of EDM.
These fields are read strictly: a value without a process here is a `UserError`.

| fields | process |
|---|---|
| beta_schedule, beta_start, beta_end, num_train_timesteps; trained_betas | `BetaTable` |
| rescale_betas_zero_snr of DDIM, DDPM, LCM, TCD | `ZeroTerminalSNR` |
| the same of the others, which put alpha^2 = 2^-24 at the end | `ZeroTerminalSNR(last=2**-24)`: the
table drawn out to it | | FlowMatch*, use_flow_sigmas | `RectifiedFlow`; `Shifted` by shift or
flow_shift, where that is not dynamic | | EDM*: sigma_min, sigma_max, sigma_data; v_prediction |
`EDM`; `edm(sigma_data)`; `flipped` | | Euler with timestep_type continuous and v_prediction | `EDM`
between its levels, `edm(1, flipped=True)`: the same algebra |
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from sfumato.checkpoints.schedulers.fields import EDM_CLASSES, FLOW_CLASSES, OWN_CLASS
from sfumato.diffuse.parameterization import edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import (
    EDM,
    BetaTable,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
    schedule,
    table,
)
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR
from sfumato.errors import UserError, unknown

KINDS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
NEARLY_ZERO = 2.0**-24
"""alpha(1)^2 after rescale_betas_zero_snr in the classes of diffusers that divide by alpha."""
_EXACTLY_ZERO = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


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
    kind = values["prediction_type"]
    if name in EDM_CLASSES:
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(
                f"{name} with prediction_type={kind!r}: expected epsilon or v_prediction, which EDM's preconditioning is written for"
            )
        return _edm_process(
            values["sigma_min"], values["sigma_max"], values["sigma_data"], kind == "v_prediction"
        )
    parameterizations = {prediction_type: name for name, prediction_type in TYPES.items()}
    if kind not in parameterizations:
        raise UserError(
            f"{name} with prediction_type={kind!r}: expected epsilon, sample or v_prediction with a table of betas"
        )
    chosen = _beta_table(values)
    if values.get("timestep_type") == "continuous" and kind == "v_prediction":
        low, high = (chosen.noise_level(t) for t in (chosen.first, 1.0))
        return _edm_process(
            values["sigma_min"] or low, values["sigma_max"] or high, 1.0, flipped=True
        )
    if values.get("rescale_betas_zero_snr"):
        chosen = ZeroTerminalSNR(chosen, 0.0 if name in _EXACTLY_ZERO else NEARLY_ZERO)
    return Process(chosen, parameterization(parameterizations[kind]))


def _edm_process(sigma_min: float, sigma_max: float, sigma_data: float, flipped: bool) -> Process:
    return Process(EDM(sigma_min=sigma_min, sigma_max=sigma_max), edm(sigma_data, flipped))


def _beta_table(values: Mapping[str, Any]) -> BetaTable:
    """Return the table of betas, from its name or its numbers."""
    kind, steps, betas = (
        values["beta_schedule"],
        values["num_train_timesteps"],
        values["trained_betas"],
    )
    if betas is not None:
        numbers = isinstance(betas, list | tuple) and all(
            isinstance(b, int | float) and not isinstance(b, bool) for b in betas
        )
        if not numbers or len(betas) != steps:
            value = (
                f"{len(betas)} trained_betas"
                if isinstance(betas, list | tuple)
                else f"trained_betas={betas!r}"
            )
            raise UserError(
                f"scheduler config num_train_timesteps={steps}, {value}: expected as many numbers"
            )
        return table(betas)
    if steps < 1:
        raise UserError(f"scheduler config num_train_timesteps={steps}: expected at least 1")
    ends = (
        {}
        if kind == "squaredcos_cap_v2"
        else {"start": values["beta_start"], "end": values["beta_end"]}
    )
    if ends and not max(ends.values()) < 1:
        raise UserError(
            f"scheduler config beta_start={ends['start']}, beta_end={ends['end']}: expected numbers between 0 and 1"
        )
    names = {beta_schedule: name for name, beta_schedule in KINDS.items()}
    beta_table = schedule(names[kind], steps=steps, **ends)
    assert isinstance(beta_table, BetaTable)
    return beta_table


def _flow_process(name: str, values: Mapping[str, Any]) -> Process:
    steps, kind = values["num_train_timesteps"], values.get("prediction_type", "flow_prediction")
    if steps != 1000:
        raise UserError(
            f"{name} with num_train_timesteps={steps}: expected 1000, the units of a flow network's timestep"
        )
    if values.get("invert_sigmas"):
        raise UserError(
            f"{name} with invert_sigmas=True: expected a flow whose time 0 is the clean latent (Mochi's runs the other way)"
        )
    if kind not in ("flow_prediction", "sample"):
        raise UserError(
            f"{name} with use_flow_sigmas and prediction_type={kind!r}: expected flow_prediction or sample"
        )
    shift = (
        1.0
        if values.get("use_dynamic_shifting")
        else values.get("shift", values.get("flow_shift", 1.0))
    )
    flow = schedule("flow")
    return Process(
        flow if shift == 1 else Shifted(flow, shift),
        parameterization("x0" if kind == "sample" else "flow"),
    )


# ---- back ----------------------------------------------------------------------------------------


def table_fields(process: Process) -> dict[str, Any] | None:
    """Return the fields that all table classes share; None without a table of betas."""
    chosen, kind = process.schedule, process.parameterization.name
    zero = isinstance(chosen, ZeroTerminalSNR)
    beta_table = chosen.base if zero else chosen
    if (
        not isinstance(beta_table, BetaTable)
        or beta_table.kind not in (*KINDS, "table")
        or kind not in TYPES
    ):
        return None
    values = {
        "num_train_timesteps": len(beta_table.betas),
        "beta_schedule": KINDS.get(beta_table.kind, "linear"),
        "beta_start": beta_table.beta_start,
        "beta_end": beta_table.beta_end,
        "prediction_type": TYPES[kind],
    }
    if beta_table.kind == "table":
        values["trained_betas"] = list(beta_table.betas)
    return values | ({"rescale_betas_zero_snr": True} if zero else {})


def flow_shift(process: Process) -> float | None:
    """Return the shift of a flow, 1 for a plain one; None for any other process."""
    chosen = process.schedule
    shift, flow = (chosen.shift, chosen.base) if isinstance(chosen, Shifted) else (1.0, chosen)
    return shift if isinstance(flow, RectifiedFlow) else None


def edm_fields(process: Process) -> dict[str, Any] | None:
    """Return the fields of an EDM class; None for any other process."""
    chosen, parameter = process.schedule, process.parameterization
    if not isinstance(chosen, EDM) or parameter.name not in ("edm", "edm_v"):
        return None
    return {
        "sigma_min": chosen.sigma_min,
        "sigma_max": chosen.sigma_max,
        "sigma_data": parameter.row.sigma_data,  # pyright: ignore[reportFunctionMemberAccess]
        "prediction_type": "v_prediction" if parameter.name == "edm_v" else "epsilon",
    }


# ---- SfumatoProcess ------------------------------------------------------------------------------


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

    parameter = process.parameterization
    sigma_data = (
        {} if not parameter.name.startswith("edm") else {"sigma_data": parameter.row.sigma_data}
    )  # pyright: ignore[reportFunctionMemberAccess]
    return {
        "_class_name": OWN_CLASS,
        "schedule": described(process.schedule),
        "parameterization": parameter.name,
        **sigma_data,
    }


def own_process(values: Mapping[str, Any]) -> Process:
    """Return the process of a config of `OWN_CLASS`, the inverse of `own_fields`.

    Raises:
        UserError: An unknown class, field or number.
    """
    classes: dict[str, Any] = {
        c.__name__: c
        for c in (
            BetaTable,
            RectifiedFlow,
            VariancePreserving,
            VarianceExploding,
            EDM,
            ZeroTerminalSNR,
            Shifted,
        )
    }

    def built(described: Any) -> Schedule:
        if not isinstance(described, Mapping) or described.get("class") not in classes:
            raise UserError(
                f"scheduler config schedule {described!r}: expected a class of {', '.join(classes)} with its numbers"
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

    own = {"_class_name", "schedule", "parameterization", "sigma_data"}
    rest = [field for field in values if field not in own and not field.startswith("_")]
    if rest:
        raise UserError(
            f"scheduler config field {min(rest)!r} is not known: it might change the result, so it is refused"
        )
    name, sigma_data = values.get("parameterization", ""), values.get("sigma_data", 1.0)
    return Process(
        built(values.get("schedule")),
        edm(sigma_data, name == "edm_v") if name in ("edm", "edm_v") else parameterization(name),
    )
