"""diffusers' scheduler_config.json <-> process, sampler and spacing.

`read_scheduler` splits a config into the process that the weights were trained for (`process.py`,
strict) and the sampler of a run (`samplers.py`, lenient: a sampler that sfumato lacks is replaced
by the nearest, with a note).

`write_scheduler` inverts it by search over the classes and the values of their fields, and takes
the first config that reads as the same. Without one it writes the nearest config that diffusers
opens with the same process, and the sampler and the spacing in an entry "_sfumato".
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from sfumato.checkpoints.schedulers.fields import (
    CLASSES,
    EDM_CLASSES,
    OWN_CLASS,
    TABLE_CLASSES,
    UNSUPPORTED,
    class_names,
    read_fields,
)
from sfumato.checkpoints.schedulers.process import (
    consistency_fields,
    edm_fields,
    flow_shift,
    own_fields,
    own_process,
    process_of,
    table_fields,
)
from sfumato.checkpoints.schedulers.samplers import (
    SchedulerSpec,
    canonical_sampler,
    format_sampler,
    sampler_values,
    scheduler_spec,
)
from sfumato.checkpoints.schedulers.spacing import (
    DynamicShift,
    canonical_spacing,
    format_spacing,
    spacing_values,
)
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import Trigonometric
from sfumato.diffuse.schedule_transforms import ZeroTerminalSNR
from sfumato.errors import UserError

log = logging.getLogger("sfumato")

_FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def read_scheduler(
    values: Mapping[str, Any], even: bool | None = None, strict: bool = False
) -> SchedulerSpec:
    """Read a scheduler config.

    Args:
        values: The JSON object of scheduler_config.json.
        even: The pipeline passes even times, down to one step from 0, to a flow's scheduler
            (`Family.even_times`); None: it does where the shift is dynamic.
        strict: Raise for a sampler or an option that is not here. Otherwise the nearest is taken,
            and the logger "sfumato" warns.

    Raises:
        UserError: A process that is not here, an unknown field, or a value of the wrong kind.
    """
    spec = _read(values, even)
    for note in spec.notes:
        if strict:
            raise UserError(f"{values.get('_class_name')}: {note}")
        log.warning("%s: %s", values.get("_class_name"), note)
    return spec


def from_scheduler_config(values: Mapping[str, Any]) -> Process:
    """Return the process of a scheduler config alone, without a warning about its sampler."""
    return _read(values, None).process


def as_plain_class(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of an unknown class as one of the class that has most of its fields.

    Other fields are left out: they are of the sampler, which another one replaces.

    Args:
        values: The JSON object of scheduler_config.json.
    """
    if str(values.get("_class_name")).removeprefix("Flax") in (*CLASSES, *UNSUPPORTED, OWN_CLASS):
        return dict(values)
    plain = ("DDIMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")
    name = max(plain, key=lambda kind: len(CLASSES[kind].keys() & values.keys()))
    shared = {field: value for field, value in values.items() if field in CLASSES[name]}
    return {**shared, "_class_name": name}


def _read(values: Mapping[str, Any], even: bool | None) -> SchedulerSpec:
    if not isinstance(values, Mapping):
        raise UserError(f"scheduler config {values!r}: expected a JSON object")
    entry = values.get("_sfumato")
    entry = entry if isinstance(entry, Mapping) else {}
    if values.get("_class_name") == OWN_CLASS:
        spec = SchedulerSpec(
            _own_process(values), format_sampler("ddim"), format_spacing("trailing")
        )
    else:
        name, fields = read_fields(values)
        even = entry.get("even") if even is None and isinstance(entry.get("even"), bool) else even
        spec = scheduler_spec(process_of(name, fields), name, fields, even)
    # "_sfumato" holds if it was written beside these very fields: a field that was changed
    # afterwards goes before the entry.
    if entry.get("instead_of") != [spec.sampler, spec.spacing]:
        return spec
    sampler, spacing = entry.get("sampler"), entry.get("spacing")
    if not isinstance(sampler, str) or not isinstance(spacing, str):
        raise UserError(
            f"scheduler config _sfumato: sampler={sampler!r}, spacing={spacing!r}: "
            "expected two words"
        )
    run = canonical_sampler(sampler), canonical_spacing(spacing)
    return SchedulerSpec(spec.process, *run, spec.dynamic)


def _own_process(values: Mapping[str, Any]) -> Process:
    try:
        return own_process(values)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"scheduler config of {OWN_CLASS} has a value of the wrong kind: {error}"
        ) from error


# ---- writing -------------------------------------------------------------------------------------


def to_scheduler_config(process: Process) -> dict[str, Any]:
    """Return a config with this process, of the class DDIMScheduler where it has one.

    Flows are of FlowMatchEulerDiscreteScheduler, the sigmoid table of DDPMScheduler. A process
    without a class in diffusers (continuous VP, VE, EDM, ...) is of "SfumatoProcess", which only
    sfumato opens.
    """
    shift, values = flow_shift(process), table_fields(process)
    if shift is not None and process.parameterization.name == "flow":
        return {"_class_name": _FLOW_CLASSES[0], "num_train_timesteps": 1000, "shift": shift}
    if values is None or (
        isinstance(process.schedule, ZeroTerminalSNR) and process.schedule.last > 0
    ):
        return own_fields(process)
    rest = {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 0}
    zero = {k: values.pop(k) for k in ("trained_betas", "rescale_betas_zero_snr") if k in values}
    if values["beta_schedule"] == "sigmoid":  # DDIMScheduler has no such schedule
        return {"_class_name": "DDPMScheduler", **values, **rest, **zero}
    return {"_class_name": "DDIMScheduler", **values, **rest, **zero, "set_alpha_to_one": True}


def write_scheduler(
    process: Process, sampler: str, spacing: str, dynamic: DynamicShift | None = None
) -> dict[str, Any]:
    """Return a config with which diffusers' class makes the run of `sampler` and `spacing`.

    Without one: a config with the same process, if diffusers has one, and an entry "_sfumato" that
    only sfumato reads. `read_scheduler` inverts it in any case.

    Args:
        process: What the weights were trained for.
        sampler: Spec of a sampler.
        spacing: Spec of a spacing.
        dynamic: See `SchedulerSpec`.
    """
    target = SchedulerSpec(process, canonical_sampler(sampler), canonical_spacing(spacing), dynamic)
    classes = list(_classes(process, dynamic))
    targets = [target]
    # A learned variance is kept whatever the times are.
    if sampler_values(target.sampler)[1].get("variance") == "learned":
        targets.append(replace(target, spacing=format_spacing("trailing", whole=True)))
    configs = (_search(name, base, run) for run in targets for name, base in classes)
    config = next((config for config in configs if config), None)
    if config is None:
        config = to_scheduler_config(process)
        # A class that has the process at least.
        if classes and (dynamic is not None or config["_class_name"] == OWN_CLASS):
            name, base = classes[0]
            config = {"_class_name": name, **base}
        # The noise of each step is kept for other programs, although the times are not.
        if config["_class_name"] == _FLOW_CLASSES[0] and target.sampler == "consistency":
            config["stochastic_sampling"] = True
    if dynamic is not None and not dynamic.even:
        config["_sfumato"] = {"even": False}
    read = _read(config, None)
    if read != target:
        run = {"sampler": target.sampler, "spacing": target.spacing}
        replaced = {"instead_of": [read.sampler, read.spacing]}
        config["_sfumato"] = config.get("_sfumato", {}) | run | replaced
    return config


def _classes(
    process: Process, dynamic: DynamicShift | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the classes that have a process, each with the fields of the process."""
    shift, kind = flow_shift(process), process.parameterization.name
    if shift is not None and kind in ("flow", "x0"):
        if kind == "flow":
            base = {"num_train_timesteps": 1000, "shift": shift}
            if dynamic is not None:
                yield _FLOW_CLASSES[0], base | _dynamic_fields(dynamic)
            else:
                yield from ((name, base) for name in _FLOW_CLASSES)
        flow = {"prediction_type": "flow_prediction" if kind == "flow" else "sample"}
        flow |= {"use_flow_sigmas": True, "flow_shift": shift}
        for name, fields in TABLE_CLASSES.items():
            if "use_flow_sigmas" in fields and dynamic is None:
                yield name, flow
    if (levels := edm_fields(process)) is not None:
        yield from ((name, levels) for name in EDM_CLASSES)
    if (levels := consistency_fields(process)) is not None:
        yield "CMStochasticIterativeScheduler", levels
    if isinstance(process.schedule, Trigonometric) and kind == "v":
        yield "IPNDMScheduler", {"num_train_timesteps": 1000}
    if (values := table_fields(process)) is None:
        return
    for name, defaults in TABLE_CLASSES.items():
        able = values["beta_schedule"] != "sigmoid" or name == "DDPMScheduler"
        able &= kind != "x0" or name not in _NO_SAMPLE
        unclipped = values | {"clip_sample": False}
        fields = {k: v for k, v in unclipped.items() if k in defaults}
        if able and _has_process(name, defaults | fields, process):
            yield name, fields


def _has_process(name: str, fields: Mapping[str, Any], process: Process) -> bool:
    """Return True if the class has this process with these fields.

    False also where the fields are refused (eps at an exactly zero terminal SNR).
    """
    try:
        return process_of(name, fields) == process
    except UserError:
        return False


_NO_SAMPLE = class_names(
    "PNDM", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"
)
"""Classes without prediction_type "sample"."""


def _dynamic_fields(dynamic: DynamicShift) -> dict[str, Any]:
    (low, base), (high, top) = dynamic.base, dynamic.top
    values: dict[str, Any] = {"use_dynamic_shifting": True}
    values |= {"base_image_seq_len": low, "base_shift": base}
    values |= {"max_image_seq_len": high, "max_shift": top}
    values["time_shift_type"] = "exponential" if dynamic.exponential else "linear"
    return values | ({"shift_terminal": dynamic.terminal} if dynamic.terminal else {})


def _search(name: str, base: Mapping[str, Any], target: SchedulerSpec) -> dict[str, Any] | None:
    """Return the config with which a class makes the run, or None.

    The fields of the times are searched first, then those of the solver.
    """
    fields = {**CLASSES[name], **base}
    solvers = list(_combinations(fields, _solver_values(target.sampler)))
    # The fields of the times change options of a sampler at most. A class that never gives its name
    # is left out at once: for each of the times it would be searched in vain.
    sampler = sampler_values(target.sampler)[0]
    if all(_sampler_name(target.process, name, fields | values) != sampler for values in solvers):
        return None
    for times in _combinations(fields, _time_values(target.spacing)):
        if scheduler_spec(target.process, name, fields | times).spacing != target.spacing:
            continue
        for solver in solvers:
            try:
                spec = scheduler_spec(target.process, name, fields | times | solver)
            except UserError:  # an order that the class does not have
                continue
            if spec == target and not spec.notes:
                return {"_class_name": name, **base, **times, **solver}
    return None


def _sampler_name(process: Process, name: str, fields: Mapping[str, Any]) -> str | None:
    """Return the name of a class's sampler; None for an order that the class does not have."""
    try:
        return sampler_values(scheduler_spec(process, name, fields).sampler)[0]
    except UserError:
        return None


def _combinations(
    fields: Mapping[str, Any], values: list[list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Yield all ways to take one of each list, of fields that the class has."""
    lists = [[option for option in options if option.keys() <= fields.keys()] for options in values]
    for chosen in product(*(options for options in lists if options)):
        yield {key: value for part in chosen for key, value in part.items()}


def _each(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


def _time_values(spacing: str) -> list[list[dict[str, Any]]]:
    """Return the values to search in the fields of the times, the plain ones first."""
    name, options = spacing_values(spacing)
    levels = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
    return [
        _each("timestep_spacing", "leading", "trailing", "linspace"),
        _each("steps_offset", *dict.fromkeys((options.get("offset", 0), 0))),
        [{}, *levels, {"use_lu_lambdas": True}],
        _each("final_sigmas_type", "zero", "sigma_min"),
        _each("set_alpha_to_one", True, False),
        _each("original_inference_steps", options.get("original", 50)),
        _each("sigma_schedule", "karras", "exponential"),
        _each("rho", options.get("rho", 7.0)),
        _each("num_train_timesteps", options["original"])
        if name == "karras" and options.get("original")
        else [{}],
    ]


def _solver_values(sampler: str) -> list[list[dict[str, Any]]]:
    """Return the values to search in the fields of the solver."""
    name, options = sampler_values(sampler)
    order = 1 if name in ("ddim", "ddpm") else 3 if "3m" in name else options.get("order", 2)
    return [
        _each("skip_prk_steps", True, False),
        _each("variance_type", "fixed_small", "fixed_large", "learned_range"),
        _each("algorithm_type", "dpmsolver++", "sde-dpmsolver++", "data_prediction"),
        _each("solver_order", order),
        _each("solver_type", "midpoint", "heun", "bh2", "bh1", "logrho"),
        _each("lower_order_final", False, True),
        _each("euler_at_final", False, True),
        _each("disable_corrector", [], list(range(1000))),
        _each("predictor_order", options.get("predictor", 2)),
        _each("corrector_order", options.get("corrector", 2)),
        _each("timestep_scaling", options.get("scaling", 10.0)),
        _each("stochastic_sampling", False, True),
    ]
