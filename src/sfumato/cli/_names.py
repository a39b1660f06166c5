"""Checks of samplers, spacings and guidance that need the command line alone.

Their names are checked before torch is imported, their options before a model is opened.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfumato.errors import unknown
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


def check_names(sampler: str | None, spacing: str | None, guidance: str | None) -> None:
    """Raise `UserError` for an unknown name; None is the model's."""
    if sampler is not None:
        _check("sampler", Spec.parse(sampler).name, names("diffuse.samplers"))
    if spacing not in (None, "given"):  # as a PNG records times of its own
        _check("timestep spacing", Spec.parse(spacing).name, SPACINGS)
    if guidance is not None and not guidance.lstrip().startswith("{"):
        choices = guidance_names()
        for word in guidance.split():
            if not _is_number(word):
                name = Spec.parse(word).name
                _check("guidance", GUIDANCE_NAMES.get(name, name), choices)


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


def _check(kind: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise unknown(kind, name, choices)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
