"""`Guidance`: reference x weight x combine as one number, one line of text or one JSON object;
`build` makes a run's questions of it.

A line of text is words in any order, with spaces between them: one number, the scale; and the names
of parts, each with its options.

    2                                             classifier-free guidance; 1 is off
    2.5 interval:low=0.2,high=0.8                 only at 0.2 <= t <= 0.8: a weight
                                                  (predict/guidance/weights)
    7.5 rescale:phi=0.7                           contrast kept: a combine
                                                  (predict/guidance/combines)
    4 ramp project:threshold=10,momentum=-0.5     from off at the first step to 4 at the last, by
                                                  APG
    3 perturbed_attention:layers=mid_block        a reference (predict/references); several layers
                                                  are joined by +
    2 model:path=small                            autoguidance by another model, which the caller
                                                  opens
    0.6 plus_plus                                 CFG++: here the scale is lambda, and 1 is not off
    4 dual:kind=away,second=3 condition perturbed_attention:layers=up_blocks.0+up_blocks.1
                                                  two references and two scales

What is not said is: constant, linear, condition. Names lie in three folders, and no name is in two
of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, reduce
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sfumato.batching import DenoiseFn
from sfumato.errors import UserError, unknown
from sfumato.predict.guidance.guide import guide
from sfumato.registry import find, names
from sfumato.spec import Spec, options_of, short_number
from sfumato.types import Conditioning
from sfumato.validate import number_in

FOLDERS = {
    "weight": "predict.guidance.weights",
    "combine": "predict.guidance.combines",
    "reference": "predict.references",
}
"""Where the parts lie, by the name of the setting."""


@dataclass(frozen=True)
class Guidance:
    """How strongly and in which way to follow the condition. Parts are words: "interval", or with
    options "interval:low=0.2,high=0.8".

    scale      at least 0; 1 is off
    weight     how the scale acts along the run
    combine    how the predictions become one
    reference  what to move away from; two words for a combine that takes two

    They are brought into one form, so that settings that mean the same are equal; `UserError` for
    impossible ones.
    """

    scale: float = 1.0
    weight: str = "constant"
    combine: str = "linear"
    reference: str = "condition"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale(self.scale))
        weight, combine, references = self.parts()
        for setting, parts in (
            ("weight", [weight]),
            ("combine", [combine]),
            ("reference", references),
        ):
            written = " ".join(
                _spelled(setting, Spec.parse(w).name, part)
                for w, part in zip(getattr(self, setting).split(), parts, strict=True)
            )
            object.__setattr__(self, setting, written)
        if len(references) != combine.references:
            raise UserError(
                f"guidance {self.combine} with the reference {self.reference}: it takes {combine.references}; name as many of "
                f"{', '.join(names(FOLDERS['reference']))}, for example 'condition perturbed_attention'"
            )
        if not combine.consistent and self.weight != "constant":
            raise UserError(
                f"guidance {self.combine} with the weight {self.weight}: expected constant, because 1, which weights take for off, "
                "is full guidance there"
            )

    def parts(self) -> tuple[Any, Any, list[Any]]:
        """The weight, the combine and the references as objects."""
        weight, combine, references = _parts(self.scale, self.weight, self.combine, self.reference)
        return weight, combine, list(references)

    @property
    def off(self) -> bool:
        """Whether nothing is guided at any time, so that no reference is needed."""
        return self.scale == 1 and not self.parts()[1].always

    @property
    def consistent(self) -> bool:
        """Whether predictions add up to x. If not (CFG++), only samplers whose traits say `both`
        can use them.
        """
        return self.parts()[1].consistent

    @classmethod
    def parse(cls, value: Any) -> "Guidance":
        """From a number, a line of text, a JSON object (`to_json`), or a Guidance; `UserError` for
        anything else.
        """
        if isinstance(value, Guidance):
            return value
        if isinstance(value, str):
            if value.lstrip().startswith("{"):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise UserError(f"guidance={value!r} is not JSON: {error}") from error
                return _from_json(value)
            return _from_text(value)
        if isinstance(value, Mapping):
            return _from_json(value)
        return cls(_scale(value))

    def to_json(self) -> float | dict[str, Any]:
        """A plain number where that says it all, else an object of scale and the words that are not
        the usual ones.
        """
        said = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }
        return self.scale if said.keys() <= {"scale"} else {**said, "scale": self.scale}

    def __str__(self) -> str:
        """The line of text: `parse` reads it."""
        said = [
            getattr(self, f.name)
            for f in fields(self)
            if f.name != "scale" and getattr(self, f.name) != f.default
        ]
        return " ".join([short_number(self.scale), *said])


def _scale(value: Any) -> float:
    return float(number_in("guidance", value, 0, hint="1 is off"))


@lru_cache(maxsize=256)
def _parts(
    scale: float, weight: str, combine: str, reference: str
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Remembered: they are settings, frozen, and every request asks for them several times."""
    words = reference.split()
    return (
        _part("weight", weight, scale=scale),
        _part("combine", combine),
        tuple(_part("reference", word) for word in words),
    )


def _part(setting: str, word: str, **scale: float) -> Any:
    """The object for a word of a setting."""
    spec = Spec.parse(word)
    return _class(setting, spec.name)(
        **scale, **spec.values(f"guidance {setting}", _options(setting, spec.name))
    )


def _class(setting: str, name: str) -> type:
    if name not in names(FOLDERS[setting]):
        raise unknown(f"guidance {setting}", name, names(FOLDERS[setting]))
    return find(FOLDERS[setting], name)


def _options(setting: str, name: str) -> dict[str, Any]:
    """The options of a part. A weight's scale is none: it is the number that everybody gives."""
    return options_of(_class(setting, name), without=("scale",))


def _spelled(setting: str, name: str, part: Any) -> str:
    """The word for a part."""
    defaults = _options(setting, name)
    return str(
        Spec.of(
            f"guidance {setting}",
            name,
            {key: getattr(part, key) for key in defaults},
            defaults,
            short_number,
        )
    )


def _from_text(text: str) -> Guidance:
    homes = {name: setting for setting, folder in FOLDERS.items() for name in names(folder)}
    scales: list[float] = []
    said: dict[str, list[str]] = {}
    for word in text.split():
        try:
            scales.append(float(word))
        except ValueError:
            name = Spec.parse(word).name
            if name not in homes:
                raise UserError(
                    f"guidance={text!r}: {unknown('guidance', name, homes)}; a number is the scale"
                ) from None
            said.setdefault(homes[name], []).append(word)
    if len(scales) != 1:
        raise UserError(
            f"guidance={text!r}: expected one number, the scale (1 is off), found {len(scales)}: write for example '2 interval'"
        )
    for setting in ("weight", "combine"):
        if len(said.get(setting, ())) > 1:
            raise UserError(
                f"guidance={text!r} has two of one kind, {' and '.join(said[setting])}: expected one {setting}"
            )
    return Guidance(scales[0], **{setting: " ".join(words) for setting, words in said.items()})


def _from_json(value: Mapping[str, Any]) -> Guidance:
    known = [f.name for f in fields(Guidance)]
    for key in value:
        if key not in known:
            raise unknown("guidance setting", key, known)
    if "scale" not in value:
        raise UserError(f"guidance={dict(value)!r}: expected a scale; 1 is off")
    words: dict[str, str] = {}
    for setting, given in value.items():
        if setting != "scale":
            words[setting] = " ".join(
                _word(setting, g) for g in (given if isinstance(given, list | tuple) else [given])
            )
            if setting != "reference" and len(words[setting].split()) != 1:
                raise UserError(f"guidance {setting}={given!r}: expected one {setting}")
    return Guidance(_scale(value["scale"]), **words)


def _word(setting: str, given: Any) -> str:
    """The word for {"name": "interval", "low": 0.2}; a word is one already."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UserError(
            f'guidance {setting}={given!r}: expected a word such as "NAME:OPTION=VALUE", or an object with a name and options'
        )
    name, options = given["name"], {key: value for key, value in given.items() if key != "name"}
    return str(Spec.of(f"guidance {setting}", name, options, _options(setting, name), short_number))


def build(
    guidance: Guidance,
    denoiser: Any,
    conditioning: Conditioning,
    reference: Conditioning | Sequence[Conditioning],
    point: Callable[[float], tuple[float, float]],
    weaker: Any = None,
) -> DenoiseFn:
    """The guided denoiser of one run, as questions to answer.

    reference: the conditioning to move away from (none, or a negative prompt); for two references
    of that kind one or two. point: t -> (alpha, sigma), the schedule's. weaker: the denoiser for
    the reference "model". Where all there is to move away from is the condition itself, as in an
    unconditional draw, nothing is guided: one pass a time.
    """
    weight, combine, references = guidance.parts()
    if guidance.off:
        return guide(denoiser, conditioning, [], weight, combine, point)
    given = [reference] if isinstance(reference, Conditioning) else list(reference)
    wanted = sum(r.condition for r in references)
    if len(given) == 1:
        given *= max(wanted, 1)
    if wanted and len(given) != wanted:
        raise UserError(
            f"{len(given)} conditionings to move away from, for guidance {guidance}: expected {wanted}"
        )
    taken = iter(given)
    pairs = [
        r.pair(denoiser, conditioning, next(taken) if r.condition else conditioning, weaker)
        for r in references
    ]
    unguided = None
    if all(r.condition for r in references):
        alike = reduce(torch.logical_and, (same(conditioning, other) for _, other in pairs))
        if alike.any():
            pairs, unguided = ([], None) if alike.all() else (pairs, alike)
    return guide(denoiser, conditioning, pairs, weight, combine, point, unguided)


def same(a: Conditioning, b: Conditioning) -> Bool[Tensor, " B"]:
    """The images of `a` for which two conditionings are equal, door by door; (1,) if `a` has no
    doors.
    """
    if (
        a.sizes != b.sizes
        or not a.tensors
        or any(len(x) != len(y) for x, y in zip(a.tensors, b.tensors, strict=True))
    ):
        return torch.full(
            (len(a.tensors[0]) if a.tensors else 1,), a.sizes == b.sizes and not a.tensors
        )
    return reduce(
        torch.logical_and,
        ((x == y).flatten(1).all(1) for x, y in zip(a.tensors, b.tensors, strict=True)),
    )
