"""`Guidance`: weight x rule x baseline as a number, a line of text or a JSON object.

A line of text is specs in any order, with spaces between them: one number, the scale, and the names
of parts, each with its options.

    2                                             classifier-free guidance; 0 to 1 is off
    2.5 interval:low=0.2,high=0.8                 only at 0.2 <= t <= 0.8: a weight
    7.5 rescale:phi=0.7                           contrast kept: a rule
    4 ramp project:threshold=10,momentum=-0.5     from off to 4 along the run, by APG
    3 perturbed_attention:layers=mid_block        a baseline; several layers are joined by +
    2 model:path=small                            autoguidance by a model that the caller opens
    0.6 plus_plus                                 CFG++: the scale is lambda, above 0; 1 is not off
    4 dual:kind=away,second=3 condition perturbed_attention:layers=up_blocks.0+up_blocks.1
                                                  two baselines and two scales

The default parts are constant, linear and condition. Names are unique over the three folders:
weights/, rules/ and predict/guidance_models/. `build` makes the guided denoiser of a run.

A scale from 0 to 1 is off, as in diffusers' pipelines: one call a step, by the condition alone.
Distilled models are published with "guidance_scale=0" (SD-Turbo, FLUX.1 schnell), which means the
prompt and not the baseline. CFG++ is the exception, because its scale is a share of the condition.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache, reduce
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sfumato.batching import DenoiseFn, DenoiserLike
from sfumato.errors import UserError, unknown
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.rules import Rule
from sfumato.predict.guidance.weights import Weight
from sfumato.predict.guidance_models import ALIASES, Baseline
from sfumato.registry import find, names
from sfumato.spec import Spec, options_of, short_number
from sfumato.types import Conditioning
from sfumato.validate import number_in, one_of

FOLDERS = {
    "weight": "predict.guidance.weights",
    "rule": "predict.guidance.rules",
    "baseline": "predict.guidance_models",
}
"""Folder of the parts, by the field of `Guidance`."""
STORED = {"scale": "scale", "weight": "weight", "rule": "combine", "baseline": "reference"}
"""Key in a JSON object, by the field of `Guidance`; the field's own name is read too."""


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance. Parts are specs: "interval", or "interval:low=0.2,high=0.8".

    Settings that mean the same are brought into one form, so that they are equal.

    Args:
        scale: At least 0; 0 to 1 is off, except for CFG++ (`plus_plus`), which needs one above 0.
        weight: Spec of the scale's course along the run.
        rule: Spec of the way in which predictions combine.
        baseline: Spec of the prediction to move away from; two for a rule that takes two.

    Raises:
        UserError: For an unknown part, options that it cannot have, or parts that do not go
            together.
    """

    scale: float = 1.0
    weight: str = "constant"
    rule: str = "linear"
    baseline: str = "condition"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale(self.scale))
        weight, rule, baselines = self.parts()
        for field, parts in (("weight", [weight]), ("rule", [rule]), ("baseline", baselines)):
            specs = map(Spec.parse, getattr(self, field).split())
            canonical = " ".join(
                _canonical(field, spec.name, part) for spec, part in zip(specs, parts, strict=True)
            )
            object.__setattr__(self, field, canonical)
        if len(baselines) != rule.num_baselines:
            raise UserError(
                f"guidance {self.rule} with the baseline {self.baseline}: "
                f"it takes {rule.num_baselines}; name as many of "
                f"{', '.join(sorted(_files('baseline')))}, "
                "for example 'condition perturbed_attention'"
            )
        if rule.scale_is_share and self.scale == 0:
            raise UserError(
                f"guidance 0 {self.rule}: expected a scale above 0, the share of the prompt; "
                "0 would draw the negative prompt"
            )
        if not rule.consistent and self.weight != "constant":
            raise UserError(
                f"guidance {self.rule} with the weight {self.weight}: expected constant, "
                "because 1, which weights take for off, is full guidance there"
            )

    def parts(self) -> tuple[Weight, Rule, tuple[Baseline, ...]]:
        """Return the weight, the rule and the baselines as objects.

        The weight's scale is at least 1, unless the rule's scale is a share of the condition.
        """
        return _parts(self.scale, self.weight, self.rule, self.baseline)

    @property
    def off(self) -> bool:
        """True if nothing is guided at any time, so that no baseline is needed."""
        return self.scale <= 1 and not self.parts()[1].always

    @property
    def consistent(self) -> bool:
        """True if predictions add up to x.

        Otherwise (CFG++) only samplers with the trait `uses_x0_and_eps` can use them.
        """
        return self.parts()[1].consistent

    @classmethod
    def parse(cls, value: Any) -> "Guidance":
        """Read a number, a line of text, a JSON object (`to_json`), or a Guidance.

        Raises:
            UserError: For anything else.
        """
        if isinstance(value, Guidance):
            return value
        if isinstance(value, str):
            if not value.lstrip().startswith("{"):
                return _from_text(value)
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"guidance={value!r} is not JSON: {error}") from error
        return _from_json(value) if isinstance(value, Mapping) else cls(_scale(value))

    def to_json(self) -> float | dict[str, Any]:
        """Return the scale, or an object of it and the specs that are not defaults."""
        changed = {STORED[field]: spec for field, spec in self._changed.items()}
        return {"scale": self.scale, **changed} if changed else self.scale

    def __str__(self) -> str:
        """Return the line of text that `parse` reads."""
        return " ".join([short_number(self.scale), *self._changed.values()])

    @property
    def _changed(self) -> dict[str, str]:
        """The specs that are not defaults, by field."""
        specs = {
            f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name in FOLDERS
        }
        return {field: spec for field, (spec, default) in specs.items() if spec != default}


def _scale(value: Any) -> float:
    return float(number_in("guidance", value, 0, hint="0 to 1 is off"))


@lru_cache(maxsize=256)
def _parts(
    scale: float, weight: str, rule: str, baseline: str
) -> tuple[Weight, Rule, tuple[Baseline, ...]]:
    """Return all parts. Cached: a request needs these frozen settings several times."""
    combined = _part("rule", rule)
    return (
        _part("weight", weight, scale=scale if combined.scale_is_share else max(scale, 1.0)),
        combined,
        tuple(_part("baseline", word) for word in baseline.split()),
    )


def _part(field: str, word: str, **scale: float) -> Any:
    """Return the object of a spec."""
    spec = Spec.parse(word)
    options = spec.values(f"guidance {field}", _options(field, spec.name))
    return _class(field, spec.name)(**scale, **options)


def _files(field: str) -> dict[str, str]:
    """Return name in specs -> file, of a field's parts."""
    return {ALIASES.get(file, file): file for file in names(FOLDERS[field])}


def _class(field: str, name: str) -> type:
    """Return the class of a part, by its name in specs or by its file's."""
    files = _files(field)
    return find(FOLDERS[field], files[one_of(f"guidance {field}", ALIASES.get(name, name), files)])


@cache
def _options(field: str, name: str) -> dict[str, Any]:
    """Return the options of a part. The scale of a weight is none: it has no name in a line."""
    return options_of(_class(field, name), without=("scale",))


def _canonical(field: str, name: str, part: Any) -> str:
    """Return the spec of a part."""
    defaults = _options(field, name)
    values = {key: getattr(part, key) for key in defaults}
    return str(
        Spec.of(f"guidance {field}", ALIASES.get(name, name), values, defaults, short_number)
    )


def _from_text(text: str) -> Guidance:
    fields_of = {
        name: field
        for field, folder in FOLDERS.items()
        for name in {*names(folder), *_files(field)}
    }
    scales: list[float] = []
    specs: dict[str, list[str]] = {}
    for word in text.split():
        try:
            scales.append(float(word))
        except ValueError:
            name = Spec.parse(word).name
            if name not in fields_of:
                listed = [name for field in FOLDERS for name in _files(field)]
                reason = unknown("guidance", name, listed)
                raise UserError(f"guidance={text!r}: {reason}; a number is the scale") from None
            specs.setdefault(fields_of[name], []).append(word)
    if len(scales) != 1:
        raise UserError(
            f"guidance={text!r}: expected one number, the scale (0 to 1 is off), "
            f"found {len(scales)}: write for example '2 interval'"
        )
    for field in ("weight", "rule"):
        if len(specs.get(field, ())) > 1:
            raise UserError(
                f"guidance={text!r} has two of one kind, {' and '.join(specs[field])}: "
                f"expected one {field}"
            )
    return Guidance(scales[0], **{field: " ".join(words) for field, words in specs.items()})


def _from_json(value: Mapping[str, Any]) -> Guidance:
    fields_of = {key: field for field, stored in STORED.items() for key in (field, stored)}
    values: dict[str, Any] = {}
    for key, part in value.items():
        field = fields_of.get(key)
        if field is None:
            raise unknown("guidance setting", key, fields_of)
        if field in values:
            raise UserError(f"guidance has {field} and {STORED[field]}: expected one of them")
        values[field] = part
    if "scale" not in values:
        raise UserError(f"guidance={dict(value)!r}: expected a scale; 0 to 1 is off")
    scale, specs = _scale(values.pop("scale")), {}
    for field, part in values.items():
        parts = part if isinstance(part, list | tuple) else [part]
        specs[field] = " ".join(_spec_text(field, one) for one in parts)
        if field != "baseline" and len(specs[field].split()) != 1:
            raise UserError(f"guidance {field}={part!r}: expected one {field}")
    return Guidance(scale, **specs)


def _spec_text(field: str, part: Any) -> str:
    """Return the spec of {"name": "interval", "low": 0.2}; a text is one already."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        raise UserError(
            f'guidance {field}={part!r}: expected a word such as "NAME:OPTION=VALUE", '
            "or an object with a name and options"
        )
    name, options = part["name"], {key: value for key, value in part.items() if key != "name"}
    return str(Spec.of(f"guidance {field}", name, options, _options(field, name), short_number))


def build(
    guidance: Guidance,
    denoiser: DenoiserLike,
    conditioning: Conditioning,
    negative: Conditioning | Sequence[Conditioning],
    point: Callable[[float], tuple[float, float]],
    guide_model: DenoiserLike | None = None,
) -> DenoiseFn:
    """Return the guided denoiser of one run.

    Where the condition is its own baseline, as in an unconditional draw, nothing is guided: one
    pass a time.

    Args:
        guidance: The settings.
        denoiser: The denoiser to guide.
        conditioning: Its conditioning.
        negative: Conditioning to move away from, of no prompt or a negative prompt; one or two for
            two baselines that take one.
        point: The schedule's t -> (alpha, sigma).
        guide_model: Denoiser of the baseline "model".

    Raises:
        UserError: For another number of conditionings than the baselines take.
    """
    weight, rule, baselines = guidance.parts()
    if guidance.off:
        return guide(denoiser, conditioning, [], weight, rule, point)
    negatives = [negative] if isinstance(negative, Conditioning) else list(negative)
    count = sum(b.takes_negative for b in baselines)
    if len(negatives) == 1:
        negatives *= max(count, 1)
    if count and len(negatives) != count:
        raise UserError(
            f"{len(negatives)} conditionings to move away from, for guidance {guidance}: "
            f"expected {count}"
        )
    following = iter(negatives)
    pairs = [
        b.pair(
            denoiser,
            conditioning,
            next(following) if b.takes_negative else conditioning,
            guide_model,
        )
        for b in baselines
    ]
    unguided = None
    if all(b.takes_negative for b in baselines):
        equal = reduce(torch.logical_and, (equal_images(conditioning, other) for _, other in pairs))
        if equal.any():
            pairs, unguided = ([], None) if equal.all() else (pairs, equal)
    return guide(denoiser, conditioning, pairs, weight, rule, point, unguided)


def equal_images(a: Conditioning, b: Conditioning) -> Bool[Tensor, " B"]:
    """Compare two conditionings field by field.

    Returns:
        (B,), True for the images of `a` whose conditioning is equal; (1,) if `a` has no fields.
    """
    if not a.tensors:
        return torch.full((1,), a.sizes == b.sizes)
    if a.sizes != b.sizes or [*map(len, a.tensors)] != [*map(len, b.tensors)]:
        return torch.full((len(a.tensors[0]),), False)
    pairs = zip(a.tensors, b.tensors, strict=True)
    return reduce(torch.logical_and, ((x == y).flatten(1).all(1) for x, y in pairs))
