"""diffusers' scheduler_config.json <-> process, sampler and spacing.

`read_scheduler` takes a config apart: what the weights were trained for (`scheduler_process.py`,
strict), and how a run goes (`scheduler_runs.py`, a choice: what is not here is replaced by what is
nearest, and said). `write_scheduler` is its inverse by search: it goes through the classes and the
values that their fields can have, and takes the first that reads as the same. Where none does, the
nearest config that diffusers opens with the same process is written, with a note for us
("_sfumato") of the sampler and the spacing.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from sfumato.checkpoints.names.scheduler_fields import (
    CLASSES,
    EDM_CLASSES,
    OWN_CLASS,
    TABLE_CLASSES,
    read_fields,
)
from sfumato.checkpoints.names.scheduler_process import (
    KINDS,
    edm_fields,
    flow_shift,
    own_fields,
    own_process,
    process_of,
    table_fields,
)
from sfumato.checkpoints.names.scheduler_runs import Way, way_of
from sfumato.checkpoints.names.scheduler_times import (
    DynamicShift,
    canonical,
    sampler_values,
    sampler_word,
    spacing_values,
    spacing_word,
)
from sfumato.diffuse.process import Process
from sfumato.diffuse.rescale import ZeroTerminalSNR
from sfumato.errors import UserError
from sfumato.spec import Spec

log = logging.getLogger("sfumato")

_FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
# Pipelines that give FlowMatchEuler even times down to one step from 0; and those that leave them
# to the scheduler.
_EVEN_PIPELINES = (
    "Flux",
    "QwenImage",
    "Chroma",
    "Lumina2",
    "ZImage",
    "Bria",
    "OvisImage",
    "VisualCloze",
    "LTX",
)
_OWN_PIPELINES = ("StableDiffusion3",)


@dataclass(frozen=True)
class Recipe:
    """What a scheduler config says: the process that the weights were trained for, and the run that
    it stands for.

    sampler, spacing: words for `generate`, as "dpmpp_2m" and "leading:offset=1". dynamic: where the
    spacing follows the image's size; `spacing` is then that of the largest. notes: what is done
    otherwise than the config says, a sentence each.
    """

    process: Process
    sampler: str
    spacing: str
    dynamic: DynamicShift | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def spacing_word(self) -> str:
        """The spacing for images of any size."""
        return self.spacing if self.dynamic is None else self.dynamic.word

    def spacing_for(self, tokens: int) -> str:
        """The spacing for an image of so many tokens (FLUX: 2x2 latent cells are one)."""
        return self.spacing if self.dynamic is None else self.dynamic.spacing(tokens)


def gives_even_times(pipeline: str) -> bool | None:
    """Whether a pipeline (the `_class_name` of model_index.json) gives a flow's scheduler its own
    even times: `even` below. None: not known.
    """
    if pipeline.startswith(_OWN_PIPELINES):
        return False
    return True if pipeline.startswith(_EVEN_PIPELINES) else None


def read_scheduler(
    values: Mapping[str, Any], even: bool | None = None, strict: bool = False
) -> Recipe:
    """The recipe of a scheduler config.

    even: whether the model's pipeline gives a flow's scheduler its own even times
    (`gives_even_times`); None: where its shift is dynamic. strict: whether a sampler or an option
    that is not here is a `UserError`. Otherwise the nearest is taken, and the logger "sfumato"
    warns. A process that is not here, a field that is not known and a value of the wrong kind are
    always a `UserError`.
    """
    recipe = _read(values, even)
    for note in recipe.notes:
        if strict:
            raise UserError(f"{values.get('_class_name')}: {note}")
        log.warning("%s: %s", values.get("_class_name"), note)
    return recipe


def from_scheduler_config(values: Mapping[str, Any]) -> Process:
    """The process of a scheduler config alone: how it samples is not asked, and not warned
    about.
    """
    return _read(values, None).process


def _read(values: Mapping[str, Any], even: bool | None) -> Recipe:
    if not isinstance(values, Mapping):
        raise UserError(f"scheduler config {values!r}: expected a JSON object")
    notes = values.get("_sfumato")
    notes = notes if isinstance(notes, Mapping) else {}
    if values.get("_class_name") == OWN_CLASS:
        way = Way(sampler_word("ddim"), spacing_word("trailing"))
        return _recipe(_own(values), _noted(way, notes))
    name, fields = read_fields(values)
    even = notes.get("even") if even is None and isinstance(notes.get("even"), bool) else even
    return _recipe(process_of(name, fields), _noted(way_of(name, fields, even), notes))


def _recipe(process: Process, way: Way) -> Recipe:
    return Recipe(process, way.sampler, way.spacing, way.dynamic, way.notes)


def _own(values: Mapping[str, Any]) -> Process:
    try:
        return own_process(values)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"scheduler config of {OWN_CLASS} has a value of the wrong kind: {error}"
        ) from error


def _noted(way: Way, notes: Mapping[str, Any]) -> Way:
    """The run of our note, if it was written beside these fields: who changes them afterwards wants
    what they say.
    """
    if notes.get("instead_of") != [way.sampler, way.spacing]:
        return way
    sampler, spacing = notes.get("sampler"), notes.get("spacing")
    if not isinstance(sampler, str) or not isinstance(spacing, str):
        raise UserError(
            f"scheduler config _sfumato: sampler={sampler!r}, spacing={spacing!r}: expected two words"
        )
    return Way(canonical(sampler, sampler_word), canonical(spacing, spacing_word), way.dynamic)


# ---- writing -------------------------------------------------------------------------------------


def to_scheduler_config(process: Process) -> dict[str, Any]:
    """A DDIMScheduler, DDPMScheduler (sigmoid) or FlowMatchEulerDiscreteScheduler config that
    stands for the same process.

    Where the ecosystem has none (continuous VP, VE, EDM, ...) a config of our own,
    "SfumatoProcess", which only sfumato opens.
    """
    shift, values = flow_shift(process), table_fields(process)
    if shift is not None and process.parameterization.name == "flow":
        return {"_class_name": _FLOW_CLASS, "num_train_timesteps": 1000, "shift": shift}
    if values is None or (
        isinstance(process.schedule, ZeroTerminalSNR) and process.schedule.last > 0
    ):
        return own_fields(process)
    rest = {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 0}
    zero = {k: values.pop(k) for k in ("trained_betas", "rescale_betas_zero_snr") if k in values}
    if values["beta_schedule"] == KINDS["sigmoid"]:  # DDIMScheduler has no such schedule
        return {"_class_name": "DDPMScheduler", **values, **rest, **zero}
    return {"_class_name": "DDIMScheduler", **values, **rest, **zero, "set_alpha_to_one": True}


def write_scheduler(
    process: Process, sampler: str, spacing: str, dynamic: DynamicShift | None = None
) -> dict[str, Any]:
    """A config with which diffusers' class makes the same run as `sampler` and `spacing` here, if
    it has one.

    Otherwise one with the same process, if it has that, and a note of the run that only sfumato
    reads. `dynamic`: of a `Recipe`. `read_scheduler` gives back what was written, in any case.
    """
    wanted = Recipe(
        process, canonical(sampler, sampler_word), canonical(spacing, spacing_word), dynamic
    )
    known = list(_classes(process, dynamic))
    near = [wanted]
    # what the network predicts is to be read whatever the times are
    if Spec.parse(wanted.sampler).options.get("variance") == "learned":
        near.append(replace(wanted, spacing=spacing_word("trailing", whole=True)))
    found = next(
        (values for run in near for name, base in known if (values := _search(name, base, run))),
        None,
    )
    if found is None:
        found = to_scheduler_config(process)
        # a class that has the process at least
        if known and (dynamic is not None or found["_class_name"] == OWN_CLASS):
            name, base = known[0]
            found = {"_class_name": name, **base}
    if dynamic is not None and not dynamic.even:
        found["_sfumato"] = {"even": False}
    read = _read(found, None)
    if read != wanted:
        run = {
            "sampler": wanted.sampler,
            "spacing": wanted.spacing,
            "instead_of": [read.sampler, read.spacing],
        }
        found["_sfumato"] = found.get("_sfumato", {}) | run
    return found


def _classes(
    process: Process, dynamic: DynamicShift | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Classes that have a process, each with the fields that say so."""
    shift, kind = flow_shift(process), process.parameterization.name
    if shift is not None and kind in ("flow", "x0"):
        if kind == "flow":
            for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
                sizes = _dynamic_fields(dynamic) if dynamic and name == _FLOW_CLASS else {}
                if dynamic is None or sizes:
                    yield name, {"num_train_timesteps": 1000, "shift": shift, **sizes}
        flow = {
            "prediction_type": "flow_prediction" if kind == "flow" else "sample",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        }
        yield from (
            (name, flow)
            for name, known in TABLE_CLASSES.items()
            if "use_flow_sigmas" in known and dynamic is None
        )
    if (levels := edm_fields(process)) is not None:
        yield from ((name, levels) for name in EDM_CLASSES)
    if (values := table_fields(process)) is None:
        return
    for name, known in TABLE_CLASSES.items():
        able = values["beta_schedule"] != KINDS["sigmoid"] or name == "DDPMScheduler"
        able &= kind != "x0" or name not in _NO_SAMPLE
        fields = {k: v for k, v in values.items() if k in known} | (
            {"clip_sample": False} if "clip_sample" in known else {}
        )
        if able and _has_process(name, known | fields, process):
            yield name, fields


def _has_process(name: str, fields: Mapping[str, Any], process: Process) -> bool:
    """Return True if the class has this process with these fields; False also if they are refused
    (eps at an exactly zero terminal SNR).
    """
    try:
        return process_of(name, fields) == process
    except UserError:
        return False


_NO_SAMPLE = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
_NO_SAMPLE += ("DPMSolverSDEScheduler",)
"""Classes that do not know prediction_type "sample"."""


def _dynamic_fields(dynamic: DynamicShift) -> dict[str, Any]:
    (low, base), (high, top) = dynamic.base, dynamic.top
    values = {
        "use_dynamic_shifting": True,
        "base_image_seq_len": low,
        "base_shift": base,
        "max_image_seq_len": high,
        "max_shift": top,
    }
    values["time_shift_type"] = "exponential" if dynamic.exponential else "linear"
    return values | ({"shift_terminal": dynamic.terminal} if dynamic.terminal else {})


def _search(name: str, base: Mapping[str, Any], wanted: Recipe) -> dict[str, Any] | None:
    """The fields with which a class makes the run: first those of the times, then those of the
    solver. None: there are none.
    """
    known = {**CLASSES[name], **base}
    for times in _choices(known, _time_values(wanted.spacing)):
        if way_of(name, known | times).spacing != wanted.spacing:
            continue
        for solver in _choices(known, _solver_values(wanted.sampler)):
            try:
                way = way_of(name, known | times | solver)
            except UserError:  # an order that the class does not go up to
                continue
            if (way.sampler, way.spacing, way.dynamic, way.notes) == (
                wanted.sampler,
                wanted.spacing,
                wanted.dynamic,
                (),
            ):
                return {"_class_name": name, **base, **times, **solver}
    return None


def _choices(
    known: Mapping[str, Any], values: list[list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """All ways to choose one of each list, of fields that the class has."""
    lists = [[option for option in options if option.keys() <= known.keys()] for options in values]
    for chosen in product(*(options for options in lists if options)):
        yield {key: value for part in chosen for key, value in part.items()}


def _each(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


def _time_values(spacing: str) -> list[list[dict[str, Any]]]:
    """What the fields of times can be, for a spacing: the plain first."""
    options = spacing_values(Spec.parse(spacing))
    levels = [
        {},
        *(_each(f"use_{kind}_sigmas", True)[0] for kind in ("karras", "exponential", "beta")),
    ]
    return [
        _each("timestep_spacing", "leading", "trailing", "linspace"),
        _each("steps_offset", *dict.fromkeys((options.get("offset", 0), 0))),
        [*levels, {"use_lu_lambdas": True}],
        _each("final_sigmas_type", "zero", "sigma_min"),
        _each("set_alpha_to_one", True, False),
        _each("original_inference_steps", options.get("original", 50)),
        _each("sigma_schedule", "karras", "exponential"),
        _each("rho", float(options.get("rho", 7.0))),
    ]


def _solver_values(sampler: str) -> list[list[dict[str, Any]]]:
    """What the fields of a solver can be."""
    spec = Spec.parse(sampler)
    name, options = spec.name, sampler_values(spec)
    order = 1 if name in ("ddim", "ddpm") else 3 if "3m" in name else options.get("order", 2)
    return [
        _each("skip_prk_steps", True, False),
        _each("variance_type", "fixed_small", "fixed_large", "learned_range"),
        _each("algorithm_type", "dpmsolver++", "sde-dpmsolver++"),
        _each("solver_order", order),
        _each("solver_type", "midpoint", "heun", "bh2", "bh1", "logrho"),
        _each("lower_order_final", False, True),
        _each("euler_at_final", False, True),
        _each("disable_corrector", [], list(range(1000))),
        _each("timestep_scaling", float(options.get("scaling", 10.0))),
        _each("stochastic_sampling", False, True),
    ]
