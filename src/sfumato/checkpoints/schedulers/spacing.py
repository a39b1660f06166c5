"""Scheduler fields -> the times of a run: a spacing ("leading:clean=false,offset=1").

Even times are trailing in whole timesteps, leading by their offset, or linspace. Multistep solvers
(`drop_last`) space one more step and leave out the last. Noise levels (use_karras_sigmas,
use_exponential_sigmas, use_beta_sigmas) run over the whole table for these solvers, and between the
ends of the even times for the others. Flows run evenly down to 0.001 and are then shifted, or
evenly down to one step from 0, as FLUX's pipelines space them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.checkpoints.schedulers.fields import class_names
from sfumato.diffuse.schedule_transforms import dynamic_shift, shifted_time
from sfumato.diffuse.timesteps import SPACINGS
from sfumato.errors import UserError, unknown
from sfumato.spec import Spec, options_of

_WHOLE = class_names("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM")
"""Classes whose linspace rounds to whole timesteps."""
_DROP_LAST = class_names(
    "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep", "SASolver"
)
"""Classes that space one more step and leave out the last."""


def format_spacing(name: str, **options: Any) -> str:
    """Return the canonical spec of a spacing, without the options that equal their defaults."""
    return str(Spec.of("spacing", name, dict(sorted(options.items())), _options(name)))


def canonical_spacing(spacing: str) -> str:
    """Return the one spelling of all specs of a spacing that mean the same."""
    spec = Spec.parse(spacing)
    return str(spec.canonical("spacing", _options(spec.name)))


def spacing_values(spacing: str) -> tuple[str, dict[str, Any]]:
    """Return a spacing's name and its options as numbers, words and flags."""
    spec = Spec.parse(spacing)
    return spec.name, spec.values("spacing", _options(spec.name))


def _options(name: str) -> dict[str, Any]:
    if name not in SPACINGS:
        raise unknown("timestep spacing", name, SPACINGS)
    return options_of(SPACINGS[name], without=("start",))


@dataclass(frozen=True)
class DynamicShift:
    """A flow's shift by the size of the image, `dynamic_shift`: mu on a line over the tokens.

    Args:
        base: (tokens, mu), one point of the line.
        top: (tokens, mu), another one.
        exponential: The shift is e^mu; else mu.
        even: Times are even before the shift, down to one step from 0 (FLUX's pipelines); else
            down to 0.001.
        terminal: Time of the last network call, to which all times are stretched; 0: not stretched.
    """

    base: tuple[int, float] = (256, 0.5)
    top: tuple[int, float] = (4096, 1.15)
    exponential: bool = True
    even: bool = True
    terminal: float = 0.0

    @property
    def spec(self) -> str:
        """The spacing for images of any size."""
        (base_tokens, base), (top_tokens, top) = self.base, self.top
        ends = {"base_tokens": base_tokens, "base": base, "top_tokens": top_tokens, "top": top}
        return format_spacing(
            "dynamic", **ends, exponential=self.exponential, even=self.even, terminal=self.terminal
        )

    @classmethod
    def from_spec(cls, spacing: str) -> "DynamicShift | None":
        """Invert `spec`; None for another spacing, and for one with a number of tokens."""
        spec = Spec.parse(spacing)
        if spec.name != "dynamic" or "tokens" in spec.options:
            return None
        values = _options(spec.name) | spacing_values(spacing)[1]
        ends = (values["base_tokens"], values["base"]), (values["top_tokens"], values["top"])
        return cls(*ends, values["exponential"], values["even"], values["terminal"])

    def spacing_for(self, tokens: int) -> str:
        """Return the spacing for an image of so many tokens (FLUX: 2x2 latent cells a token)."""
        shift = dynamic_shift(tokens, self.base, self.top, self.exponential)
        if shift <= 0:
            raise UserError(
                f"{tokens} tokens: the shift between {self.base} and {self.top} "
                f"would be {shift:g}; expected more tokens"
            )
        end = {} if self.even else {"end": shifted_time(0.001, shift)}
        return format_spacing("shifted", shift=shift, terminal=self.terminal, **end)


def ends_clean(name: str, values: Mapping[str, Any]) -> bool:
    """Return True if the run ends at t = 0; else it ends at the table's least noise."""
    if name in ("DEISMultistepScheduler", "SASolverScheduler", "TCDScheduler"):
        return False
    if name == "LCMScheduler":
        return True
    zero = values.get("final_sigmas_type", "zero") == "zero"
    return zero and values.get("set_alpha_to_one", True)


def noise_level_spacing(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return (name, options) of the spacing by noise level in the fields; None without one."""
    kinds = [kind for kind in ("karras", "exponential", "beta") if values.get(f"use_{kind}_sigmas")]
    if len(kinds) > 1:
        raise UserError(
            f"scheduler config use_{kinds[0]}_sigmas and use_{kinds[1]}_sigmas: "
            "expected one of them"
        )
    return (kinds[0], {"over": "noise"} if kinds[0] == "beta" else {}) if kinds else None


def table_spacing(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    """Return the spacing of a class with a table of betas: even times, or noise levels.

    Args:
        name: Class of diffusers.
        values: All of its fields.
        notes: Gets a sentence for each field that is not followed.
    """
    clean, by_level = ends_clean(name, values), noise_level_spacing(values)
    even, offset = values.get("timestep_spacing", "linspace"), values.get("steps_offset", 0)
    drop_last, continuous = name in _DROP_LAST, values.get("timestep_type") == "continuous"
    continuous = continuous and values["prediction_type"] == "v_prediction"
    for field in ("sigma_min", "sigma_max"):
        if values.get(field) is not None and by_level and not continuous:
            notes.append(
                f"{field}={values[field]} is left out: the levels are those of the table of betas"
            )
    if values.get("lambda_min_clipped", -math.inf) > -math.inf:
        notes.append(
            f"lambda_min_clipped={values['lambda_min_clipped']} is left out: "
            "the run begins at the full noise"
        )
    if values.get("use_lu_lambdas") and not by_level:
        return format_spacing("log_snr", clean=clean)
    if values.get("interpolation_type") == "log_linear" and not by_level:
        notes.append("interpolation_type='log_linear' is taken for use_exponential_sigmas")
        by_level = "exponential", {}
    if continuous:
        if not by_level:
            notes.append(
                "timestep_type='continuous' with even times is not here: "
                "use_karras_sigmas is taken in its place"
            )
        kind, options = by_level or ("karras", {})
        return format_spacing(kind, clean=clean, **options)
    if by_level:
        between: dict[str, Any] = {}
        if not drop_last and even != "linspace":
            between = {"between": even, "offset": offset if even == "leading" else 0}
        return format_spacing(by_level[0], clean=clean, **by_level[1], **between)
    drop = {"drop_last": True} if drop_last else {}
    if even == "trailing":
        return format_spacing("trailing", whole=True, clean=clean)
    if even == "leading":
        return format_spacing("leading", offset=offset, clean=clean, **drop)
    return format_spacing("linspace", whole=drop_last or name in _WHOLE, clean=clean, **drop)


def _dynamic(values: Mapping[str, Any], even: bool) -> DynamicShift:
    """Return the shift by the image's size, with FLUX's numbers for absent fields."""
    base = values.get("base_image_seq_len", 256), float(values.get("base_shift", 0.5))
    top = values.get("max_image_seq_len", 4096), float(values.get("max_shift", 1.15))
    if not 0 < base[0] < top[0]:
        raise UserError(
            f"scheduler config base_image_seq_len={base[0]}, max_image_seq_len={top[0]}: "
            "expected 0 < base < max"
        )
    exponential = values["time_shift_type"] == "exponential"
    return DynamicShift(base, top, exponential, even, float(values.get("shift_terminal") or 0.0))


def flow_spacing(
    values: Mapping[str, Any], even: bool | None, notes: list[str]
) -> tuple[DynamicShift | None, str]:
    """Return the shift by the image's size, if any, and the spacing of a FlowMatch class.

    Args:
        values: All fields of the class.
        even: The pipeline passes even times down to one step from 0; False: the scheduler's own
            times down to 0.001; None: even where the shift is dynamic.
        notes: Gets a sentence for each field that is not followed.
    """
    by_level = noise_level_spacing(values)
    shift, terminal = float(values["shift"]), values.get("shift_terminal")
    if terminal is not None and not 0 <= terminal < 1:
        raise UserError(f"scheduler config shift_terminal={terminal}: expected a time in [0, 1)")
    if values.get("use_dynamic_shifting"):
        dynamic = _dynamic(values, even is not False)
        if by_level:
            notes.append(
                f"use_dynamic_shifting with use_{by_level[0]}_sigmas: only the shift is kept"
            )
        return dynamic, dynamic.spacing_for(dynamic.top[0])
    if terminal:
        notes.append(f"shift_terminal={terminal} with a shift that is not dynamic is left out")
    if even and by_level is None:
        return None, format_spacing("trailing")
    kind, options = by_level or ("linspace", {})
    # The end is in the time of `Shifted`, which shifts once more.
    end = {} if shift == 1 else {"end": shifted_time(0.001, shift)}
    return None, format_spacing(kind, **options, **({"between": "trailing"} if even else end))


def flow_solver_spacing(
    name: str, values: Mapping[str, Any], notes: list[str]
) -> tuple[DynamicShift | None, str]:
    """Return the same for a table class with use_flow_sigmas.

    Its times are even but the last, shifted, and end at t = 0.
    """
    if noise_level_spacing(values):
        notes.append(
            "use_flow_sigmas with levels of a table of betas is not here: "
            "only the flow's own times are kept"
        )
    if not ends_clean(name, values):
        notes.append("a flow that ends before its last step is not here: the run ends at t = 0")
    if values.get("shift_terminal"):
        notes.append(f"shift_terminal={values['shift_terminal']} with use_flow_sigmas is left out")
    if values.get("use_dynamic_shifting"):
        dynamic = _dynamic(values, even=True)
        return dynamic, dynamic.spacing_for(dynamic.top[0])
    if name != "UniPCMultistepScheduler":
        return None, format_spacing("trailing")
    end = {} if values["flow_shift"] == 1 else {"end": 0.001}
    return None, format_spacing("linspace", drop_last=True, **end)
