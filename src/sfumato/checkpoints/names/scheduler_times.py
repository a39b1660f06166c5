"""At which times a scheduler's fields say that a run asks: our spacing, as a word
("leading:offset=1,clean=false").

Even times: trailing in whole timesteps; leading by its offset; linspace. Solvers that remember
(`drop_last`) space one step more and leave out the last. Levels (use_karras_sigmas, -exponential-,
-beta-): over the whole table for these, between the ends of the even times for the others. Flows:
even down to 0.001 and shifted, or even down to one step from 0, as FLUX's pipelines give them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.diffuse.rescale import dynamic_shift, shifted_time
from sfumato.diffuse.timesteps import SPACINGS
from sfumato.errors import UserError, unknown
from sfumato.registry import find
from sfumato.spec import Spec, options_of

_WHOLE = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
)
_REMEMBER = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)


def sampler_word(name: str, **options: Any) -> str:
    """ "name:option=value,..." of a sampler, without the options that are its defaults: one word
    for one run.
    """
    return str(
        Spec.of(
            "sampler",
            name,
            dict(sorted(options.items())),
            options_of(find("diffuse.samplers", name)),
        )
    )


def spacing_word(name: str, **options: Any) -> str:
    """The same of a spacing."""
    return str(Spec.of("spacing", name, dict(sorted(options.items())), _spacing_options(name)))


def canonical(word: str, make: Callable[..., str]) -> str:
    """The one spelling of a word, by `sampler_word` or `spacing_word`."""
    spec = Spec.parse(word)
    return make(spec.name, **spec.options)


def sampler_values(spec: Spec) -> dict[str, Any]:
    """A sampler's options as numbers, words and flags."""
    return spec.values("sampler", options_of(find("diffuse.samplers", spec.name)))


def spacing_values(spec: Spec) -> dict[str, Any]:
    """The same of a spacing."""
    return spec.values("spacing", _spacing_options(spec.name))


def _spacing_options(name: str) -> dict[str, Any]:
    if name not in SPACINGS:
        raise unknown("timestep spacing", name, SPACINGS)
    return options_of(SPACINGS[name], without=("start",))


@dataclass(frozen=True)
class DynamicShift:
    """A flow's shift that follows the size of the image, `rescale.dynamic_shift`: mu on the line
    through two (tokens, mu) points.

    even: the run visits times that are even before the shift, down to one step from 0 (FLUX's
    pipelines); else down to 0.001. terminal: the last call's time, to which all are stretched; 0:
    as they are.
    """

    base: tuple[int, float] = (256, 0.5)
    top: tuple[int, float] = (4096, 1.15)
    exponential: bool = True
    even: bool = True
    terminal: float = 0.0

    @property
    def word(self) -> str:
        """The spacing that follows the size of the image."""
        (base_tokens, base), (top_tokens, top) = self.base, self.top
        ends = {"base_tokens": base_tokens, "base": base, "top_tokens": top_tokens, "top": top}
        return spacing_word(
            "dynamic", **ends, exponential=self.exponential, even=self.even, terminal=self.terminal
        )

    @classmethod
    def from_word(cls, spacing: str) -> "DynamicShift | None":
        """The inverse of `word`; None for another spacing, and for one of so many tokens."""
        spec = Spec.parse(spacing)
        if spec.name != "dynamic" or "tokens" in spec.options:
            return None
        values = _spacing_options(spec.name) | spacing_values(spec)
        ends = (values["base_tokens"], values["base"]), (values["top_tokens"], values["top"])
        return cls(*ends, values["exponential"], values["even"], values["terminal"])

    def spacing(self, tokens: int) -> str:
        """The spacing for an image of so many tokens (FLUX: 2x2 latent cells are one)."""
        shift = dynamic_shift(tokens, self.base, self.top, self.exponential)
        if shift <= 0:
            raise UserError(
                f"{tokens} tokens: the shift between {self.base} and {self.top} would be {shift:g}; expected more tokens"
            )
        end = {} if self.even else {"end": shifted_time(0.001, shift)}
        return spacing_word("shifted", shift=shift, terminal=self.terminal, **end)


def ends_clean(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the run ends at t = 0, or at the least noise that the network knows."""
    if name in ("DEISMultistepScheduler", "TCDScheduler"):
        return False
    if name == "LCMScheduler":
        return True
    return values.get("final_sigmas_type", "zero") == "zero" and values.get(
        "set_alpha_to_one", True
    )


def level_of(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The spacing by noise level that the fields ask for, if any."""
    asked = [kind for kind in ("karras", "exponential", "beta") if values.get(f"use_{kind}_sigmas")]
    if len(asked) > 1:
        raise UserError(
            f"scheduler config use_{asked[0]}_sigmas and use_{asked[1]}_sigmas: expected one of them"
        )
    return (asked[0], {"over": "noise"} if asked[0] == "beta" else {}) if asked else None


def table_spacing(name: str, values: Mapping[str, Any], notes: list[str]) -> str:
    """Even times, or levels between the ends of even times: all of a table for solvers that
    remember, theirs for the others.
    """
    clean, by_level, offset = (
        ends_clean(name, values),
        level_of(values),
        values.get("steps_offset", 0),
    )
    even, remember = values.get("timestep_spacing", "linspace"), name in _REMEMBER
    continuous = (
        values.get("timestep_type") == "continuous" and values["prediction_type"] == "v_prediction"
    )
    for field in ("sigma_min", "sigma_max"):
        if values.get(field) is not None and by_level and not continuous:
            notes.append(
                f"{field}={values[field]} is left out: the levels are those of the table of betas"
            )
    if values.get("lambda_min_clipped", -math.inf) > -math.inf:
        notes.append(
            f"lambda_min_clipped={values['lambda_min_clipped']} is left out: the run begins at the full noise"
        )
    if values.get("use_lu_lambdas") and not by_level:
        return spacing_word("log_snr", clean=clean)
    if values.get("interpolation_type") == "log_linear" and not by_level:
        notes.append("interpolation_type='log_linear' is taken for use_exponential_sigmas")
        by_level = "exponential", {}
    if continuous:
        if not by_level:
            notes.append(
                "timestep_type='continuous' with even times is not here: use_karras_sigmas is taken in its place"
            )
        kind, options = by_level or ("karras", {})
        return spacing_word(kind, clean=clean, **options)
    if by_level:
        between = (
            {}
            if remember or even == "linspace"
            else {"between": even, "offset": offset if even == "leading" else 0}
        )
        return spacing_word(by_level[0], clean=clean, **by_level[1], **between)
    drop = {"drop_last": True} if remember else {}
    if even == "trailing":
        return spacing_word("trailing", whole=True, clean=clean)
    if even == "leading":
        return spacing_word("leading", offset=offset, clean=clean, **drop)
    return spacing_word("linspace", whole=remember or name in _WHOLE, clean=clean, **drop)


def _dynamic(values: Mapping[str, Any], even: bool) -> DynamicShift:
    """The shift by the image's size, with FLUX's numbers where a config has none."""
    base = values.get("base_image_seq_len", 256), float(values.get("base_shift", 0.5))
    top = values.get("max_image_seq_len", 4096), float(values.get("max_shift", 1.15))
    if not 0 < base[0] < top[0]:
        raise UserError(
            f"scheduler config base_image_seq_len={base[0]}, max_image_seq_len={top[0]}: expected 0 < base < max"
        )
    return DynamicShift(
        base,
        top,
        values["time_shift_type"] == "exponential",
        even,
        float(values.get("shift_terminal") or 0.0),
    )


def flow_spacing(
    values: Mapping[str, Any], even: bool | None, notes: list[str]
) -> tuple[DynamicShift | None, str]:
    """Of the FlowMatch classes: their own times down to 0.001, or even ones that the pipeline
    gives; then the shift; then levels.
    """
    by_level, shift, terminal = (
        level_of(values),
        float(values["shift"]),
        values.get("shift_terminal"),
    )
    if terminal is not None and not 0 <= terminal < 1:
        raise UserError(f"scheduler config shift_terminal={terminal}: expected a time in [0, 1)")
    if values.get("use_dynamic_shifting"):
        dynamic = _dynamic(values, even is not False)
        if by_level:
            notes.append(
                f"use_dynamic_shifting with use_{by_level[0]}_sigmas: only the shift is kept"
            )
        return dynamic, dynamic.spacing(dynamic.top[0])
    if terminal:
        notes.append(f"shift_terminal={terminal} with a shift that is not dynamic is left out")
    if even:
        return None, spacing_word(
            "trailing" if not by_level else by_level[0],
            **_level_options(by_level, between="trailing"),
        )
    # in the time of `Shifted`, which shifts once more
    end = {} if shift == 1 else {"end": shifted_time(0.001, shift)}
    return None, spacing_word(
        "linspace" if not by_level else by_level[0], **_level_options(by_level), **end
    )


def _level_options(by_level: tuple[str, dict[str, Any]] | None, **more: Any) -> dict[str, Any]:
    return {**by_level[1], **more} if by_level else {}


def flow_solver_spacing(
    name: str, values: Mapping[str, Any], notes: list[str]
) -> tuple[DynamicShift | None, str]:
    """Of the table classes with use_flow_sigmas: even times but the last, shifted; they end at t =
    0.
    """
    if level_of(values):
        notes.append(
            "use_flow_sigmas with levels of a table of betas is not here: only the flow's own times are kept"
        )
    if not ends_clean(name, values):
        notes.append("a flow that ends before its last step is not here: the run ends at t = 0")
    if values.get("shift_terminal"):
        notes.append(f"shift_terminal={values['shift_terminal']} with use_flow_sigmas is left out")
    if values["use_dynamic_shifting"]:
        dynamic = _dynamic(values, even=True)
        return dynamic, dynamic.spacing(dynamic.top[0])
    if name != "UniPCMultistepScheduler":
        return None, spacing_word("trailing")
    end = {} if values["flow_shift"] == 1 else {"end": 0.001}
    return None, spacing_word("linspace", drop_last=True, **end)
