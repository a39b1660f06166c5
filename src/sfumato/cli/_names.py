"""Checks of samplers, spacings and guidance that need the command line alone.

Their names are checked before torch is imported, their options before a model is opened.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfumato.errors import UserError, quoted, unknown
from sfumato.registry import names
from sfumato.spec import Spec

if TYPE_CHECKING:
    from sfumato.cli._options import RunOptions

SPACINGS = ("align_your_steps", "beta", "crash", "dynamic", "exponential", "karras", "lcm")
SPACINGS += ("leading", "linspace", "log_snr", "shifted", "trailing", "tuned", "uniform")
"""Names of spacings, "tuned" among them."""
GUIDANCE_FOLDERS = ("predict.guidance.weights", "predict.guidance.rules", "predict.guidance_models")
GUIDANCE_NAMES = {"weaker_model": "model"}
"""Name of a part of guidance by its file's, where they differ; either is read."""

OTHER_SAMPLERS = {
    "dpm2": "dpm_solver_2",
    "dpm2a": "dpm_solver_2_ancestral",
    "dpm2ancestral": "dpm_solver_2_ancestral",
    "dpmsolver": "dpmpp_2m",
    "dpmsolversde": "dpmpp_sde",
    "dpmsolversinglestep": "dpmpp_2s",
    "eulera": "euler_ancestral",
    "flowmatcheuler": "euler",
    "flowmatchheun": "heun",
    "kdpm2": "dpm_solver_2",
    "kdpm2ancestral": "dpm_solver_2_ancestral",
}
"""Samplers by names of AUTOMATIC1111, ComfyUI and diffusers, as `_bare_name` returns them."""
OTHER_SPACINGS = {
    "alignyoursteps": "align_your_steps",
    "ays": "align_your_steps",
    "ddimuniform": "leading",
    "sgmuniform": "trailing",
}
"""Spacings in the same way."""


def check_names(sampler: str | None, spacing: str | None, guidance: str | None) -> None:
    """Raise `UserError` for an unknown name; None is the model's."""
    if sampler is not None:
        _check_sampler(Spec.parse(sampler).name)
    if spacing not in (None, "given"):  # as a PNG records times of its own
        name = Spec.parse(spacing).name
        if name not in SPACINGS and (other := OTHER_SPACINGS.get(_bare_name(name))) is not None:
            raise UserError(f"unknown timestep spacing {quoted(name)}: write {other} here")
        _check("timestep spacing", name, SPACINGS)
    if guidance is not None and not guidance.lstrip().startswith("{"):
        choices = guidance_names()
        for word in guidance.split():
            if not _is_number(word):
                name = Spec.parse(word).name
                if (name := GUIDANCE_NAMES.get(name, name)) not in choices:
                    raise UserError(
                        f"--guidance {quoted(guidance)}: expected a number, the scale (0 to 1 is "
                        f"off), alone or as in '2 interval'; {unknown('guidance', name, choices)}"
                    )


def guidance_names() -> list[str]:
    """The names of weights, rules and baselines of guidance."""
    files = [file for folder in GUIDANCE_FOLDERS for file in names(folder)]
    return [GUIDANCE_NAMES.get(file, file) for file in files]


def check_words(options: "RunOptions", timesteps: Sequence[float] = ()) -> None:
    """Raise `UserError` for an option of a sampler, spacing or guidance, and for times."""
    from sfumato.diffuse.timesteps import check_times
    from sfumato.predict.guidance.settings import Guidance
    from sfumato.sampling.request import sampler_of, spacing_of

    if options.sampler is not None:
        sampler_of(options.sampler)
    if options.spacing not in (None, "tuned", "given"):
        spacing_of(options.spacing)
    if options.guidance is not None:
        Guidance.parse(options.guidance)
    if timesteps:
        check_times(list(timesteps))


def _check_sampler(name: str) -> None:
    """Raise `UserError` for an unknown sampler, with its name here if other programs have it."""
    samplers = names("diffuse.samplers")
    if name in samplers:
        return
    bare, spacing = _bare_name(name), ""
    for words, here in (OTHER_SPACINGS | {_bare_name(name): name for name in SPACINGS}).items():
        if bare.endswith(words) and bare != words:
            bare, spacing = bare.removesuffix(words), f" with --spacing {here}"
    sampler = OTHER_SAMPLERS.get(bare) or {_bare_name(name): name for name in samplers}.get(bare)
    if sampler is None:
        raise unknown("sampler", name, samplers)
    raise UserError(f"unknown sampler {quoted(name)}: write {sampler}{spacing} here")


def _bare_name(name: str) -> str:
    """A name without case, signs and common additions: "DPM++ 2M" is "dpmpp2m"."""
    letters = re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))
    return re.sub("^(?:ksampler|sample)|(?:discrete|multistep)?(?:scheduler)?$|gpu$", "", letters)


def _check(kind: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise unknown(kind, name, choices)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
