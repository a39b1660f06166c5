"""The process in a scheduler's fields: betas and prediction type, a flow and its shift, or Karras
et al.'s levels; and back.

What the weights were trained for is read strictly: a value that we do not stand for is a
`UserError`, with what to do about it.

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

from sfumato.checkpoints.names.scheduler_fields import EDM_CLASSES, FLOW_CLASSES, OWN_CLASS
from sfumato.diffuse.parameterization import edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.rescale import Shifted, ZeroTerminalSNR
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
from sfumato.errors import UserError, unknown

KINDS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
NEARLY_ZERO = 2.0**-24
"""alpha(1)^2 of diffusers' schedulers that divide by alpha, where the table is rescaled to zero
terminal SNR."""
_EXACTLY_ZERO = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


def process_of(name: str, values: Mapping[str, Any]) -> Process:
    """The process of a class and all of its fields (`read_fields`)."""
    if name in FLOW_CLASSES or values.get("use_flow_sigmas"):
        return _flow_process(name, values)
    kind = values["prediction_type"]
    if name in EDM_CLASSES:
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(
                f"{name} with prediction_type={kind!r}: expected epsilon or v_prediction, which EDM's preconditioning is written for"
            )
        return _levels_process(
            values["sigma_min"], values["sigma_max"], values["sigma_data"], kind == "v_prediction"
        )
    types = {theirs: ours for ours, theirs in TYPES.items()}
    if kind not in types:
        raise UserError(
            f"{name} with prediction_type={kind!r}: expected epsilon, sample or v_prediction with a table of betas"
        )
    chosen = _table(values)
    if values.get("timestep_type") == "continuous" and kind == "v_prediction":
        low, high = (chosen.noise_level(t) for t in (chosen.first, 1.0))
        return _levels_process(
            values["sigma_min"] or low, values["sigma_max"] or high, 1.0, flipped=True
        )
    if values.get("rescale_betas_zero_snr"):
        chosen = ZeroTerminalSNR(chosen, 0.0 if name in _EXACTLY_ZERO else NEARLY_ZERO)
    return Process(chosen, parameterization(types[kind]))


def _levels_process(low: float, high: float, sigma_data: float, flipped: bool) -> Process:
    return Process(EDM(sigma_min=low, sigma_max=high), edm(sigma_data, flipped))


def _table(values: Mapping[str, Any]) -> BetaTable:
    """A table of betas by its name or its numbers."""
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
            said = (
                f"{len(betas)} trained_betas"
                if isinstance(betas, list | tuple)
                else f"trained_betas={betas!r}"
            )
            raise UserError(
                f"scheduler config num_train_timesteps={steps}, {said}: expected as many numbers"
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
    found = schedule({theirs: ours for ours, theirs in KINDS.items()}[kind], steps=steps, **ends)
    assert isinstance(found, BetaTable)
    return found


def _flow_process(name: str, values: Mapping[str, Any]) -> Process:
    steps, kind = values["num_train_timesteps"], values.get("prediction_type", "flow_prediction")
    if steps != 1000:
        raise UserError(
            f"{name} with num_train_timesteps={steps}: expected 1000, the units in which flow networks are told the time"
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
    """The fields of a table class, with the class that all of them share left open; None for a
    process without a table of theirs.
    """
    chosen, kind = process.schedule, process.parameterization.name
    zero = isinstance(chosen, ZeroTerminalSNR)
    found = chosen.base if zero else chosen
    if not isinstance(found, BetaTable) or found.kind not in (*KINDS, "table") or kind not in TYPES:
        return None
    values = {
        "num_train_timesteps": len(found.betas),
        "beta_schedule": KINDS.get(found.kind, "linear"),
        "beta_start": found.beta_start,
        "beta_end": found.beta_end,
        "prediction_type": TYPES[kind],
    }
    if found.kind == "table":
        values["trained_betas"] = list(found.betas)
    return values | ({"rescale_betas_zero_snr": True} if zero else {})


def flow_shift(process: Process) -> float | None:
    """The shift of a flow, 1 for a plain one; None for what is no flow."""
    chosen = process.schedule
    shift, flow = (chosen.shift, chosen.base) if isinstance(chosen, Shifted) else (1.0, chosen)
    return shift if isinstance(flow, RectifiedFlow) else None


def edm_fields(process: Process) -> dict[str, Any] | None:
    """The fields of Karras et al.'s process; None for another one."""
    chosen, parameter = process.schedule, process.parameterization
    if not isinstance(chosen, EDM) or parameter.name not in ("edm", "edm_v"):
        return None
    return {
        "sigma_min": chosen.sigma_min,
        "sigma_max": chosen.sigma_max,
        "sigma_data": parameter.row.sigma_data,  # pyright: ignore[reportFunctionMemberAccess]
        "prediction_type": "v_prediction" if parameter.name == "edm_v" else "epsilon",
    }


# ---- our own class -------------------------------------------------------------------------------


def own_fields(process: Process) -> dict[str, Any]:
    """Schedule and parameterization by their own names and numbers: for processes that diffusers
    has no class for.
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
    """The inverse; `UserError` for what it does not know."""
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
        known = {field.name for field in fields(chosen)}
        given = {key: value for key, value in described.items() if key != "class"}
        if not given.keys() <= known:
            raise unknown(f"number of schedule {chosen.__name__}", min(given.keys() - known), known)
        return chosen(
            **{
                k: built(v) if k == "base" else tuple(v) if isinstance(v, list) else v
                for k, v in given.items()
            }
        )

    known = {"_class_name", "schedule", "parameterization", "sigma_data"}
    rest = [field for field in values if field not in known and not field.startswith("_")]
    if rest:
        raise UserError(
            f"scheduler config field {min(rest)!r} is not known: it might change the result, so it is refused"
        )
    name, sigma_data = values.get("parameterization", ""), values.get("sigma_data", 1.0)
    return Process(
        built(values.get("schedule")),
        edm(sigma_data, name == "edm_v") if name in ("edm", "edm_v") else parameterization(name),
    )
