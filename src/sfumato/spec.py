"""Specs: a name with options as text, "name:option=value,option=value".

    spec    = name [":" option ("," option)*]
    option  = key "=" value               spaces around names, keys and values do not count
    value   = number | "true" | "false" | word | word ("+" word)*

A dash in a name or a key is an underscore. A value is text until it is checked against the options
of its target, a function's parameters or a dataclass's fields, whose defaults have its type.
Samplers, spacings and the parts of guidance are written so, on the command line and in files.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sfumato.errors import UserError, unknown


@dataclass(frozen=True)
class Spec:
    """A name and its options as text. `Spec.parse(str(spec)) == spec` for every spec.

    Args:
        name: Without ":"; dashes become underscores.
        options: Key -> value. Values have neither spaces nor commas.

    Raises:
        UserError: For a name, key or value that the line of text could not hold.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name.replace("-", "_"))
        object.__setattr__(
            self, "options", {_underscored(key): value for key, value in self.options.items()}
        )
        if ":" in self.name or self.name != self.name.strip():
            raise UserError(f"name {self.name!r}: expected one without colons and outer spaces")
        for key, value in self.options.items():
            if not key or key != key.strip() or any(c in key for c in "=,"):
                raise UserError(
                    f"{self.name} with option {key!r}: "
                    "expected a key without equals signs, commas and outer spaces"
                )
            if not value or "," in value or any(c.isspace() for c in value):
                raise UserError(
                    f"{self.name}:{key}={value!r}: expected a value without spaces and commas"
                )

    @classmethod
    def parse(cls, text: object) -> "Spec":
        """Read "name" or "name:option=value,option=value".

        Raises:
            UserError: For an item after the colon that is no option, and an option twice.
        """
        line = str(text)
        name, colon, rest = line.partition(":")
        options: dict[str, str] = {}
        for item in rest.split(",") if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            key = _underscored(key)
            if not (key and equals and value):
                raise UserError(
                    f"{line!r}: expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, found {item!r}"
                )
            if key in options:
                raise UserError(f"{line!r} gives {key} twice: give it once")
            options[key] = value
        return cls(name.strip(), options)

    @classmethod
    def of(
        cls,
        kind: str,
        name: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        number: Callable[[float], str] = repr,
    ) -> "Spec":
        """Spell values, in their order, without those that equal their defaults.

        Args:
            kind: Kind of the target, for the errors: "sampler".
            name: Of the spec.
            values: Option -> value, see `typed_values`.
            defaults: Option -> default, as `options_of` returns them.
            number: The spelling of a number: `repr` (5.0) or `short_number` (5).

        Raises:
            UserError: For an unknown option, or a value of another type than its default.
        """
        changed = {
            k: v for k, v in values.items() if k not in defaults or not _equal(v, defaults[k])
        }
        typed = typed_values(f"{kind} {name}", changed, defaults)
        return cls(name, {k: _text(v, number) for k, v in typed.items() if v != defaults[k]})

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def values(self, kind: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the types of their defaults, see `typed_values`."""
        return typed_values(f"{kind} {self.name}", self.options, defaults)

    def canonical(self, kind: str, defaults: Mapping[str, Any]) -> "Spec":
        """Return the one spelling of all specs that mean the same: sorted, without defaults."""
        return Spec.of(kind, self.name, dict(sorted(self.options.items())), defaults)


def options_of(target: Callable[..., Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Return option -> default of a function or a dataclass.

    Options are the parameters that have a default.

    Args:
        target: A function, or a dataclass.
        without: Parameters with a default that are not options.
    """
    parameters = inspect.signature(target).parameters.items()
    defaults = {name: p.default for name, p in parameters if p.default is not p.empty}
    return {name: default for name, default in defaults.items() if name not in without}


def typed_values(
    where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values with the types of their defaults.

    A default of None stands for a number.

    Args:
        where: Owner of the options, for the errors: "sampler ddim".
        values: Option -> text, or a value of JSON.
        defaults: Option -> default, as `options_of` returns them.

    Raises:
        UserError: For an unknown option, or a value of another type.
    """
    for key in values:
        if key not in defaults:
            raise unknown(f"option of {where}", key, defaults)
    return {key: _typed(f"{where}:{key}", value, defaults[key]) for key, value in values.items()}


def short_number(value: float) -> str:
    """Return the shortest text that is read as the same number, without a needless .0."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default  # True is no 1.0


def _underscored(name: str) -> str:
    return name.replace("-", "_")


def _text(value: Any, number: Callable[[float], str]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(value)
    return value if isinstance(value, str) else number(value)


def _typed(where: str, value: Any, default: Any) -> Any:
    if value is None and default is None:
        return None
    convert, expected = _TYPES[float if default is None else type(default)]
    try:
        return convert(value)
    except (TypeError, ValueError, LookupError, ArithmeticError):
        raise UserError(f"{where}={value!r}: expected {expected}") from None


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[_word(value).lower()]


def _number(value: Any) -> float:
    if isinstance(value, bool) or math.isnan(number := float(value)):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    if not math.isfinite(_number(value)) or (number := Decimal(value)) != int(number):
        raise ValueError
    return int(number)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _words(value: Any) -> tuple[str, ...]:
    words = tuple(map(_word, value.split("+") if isinstance(value, str) else value))
    if not words or not all(words):
        raise ValueError
    return words


_TYPES: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_flag, "true or false"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    str: (_word, "a word"),
    tuple: (_words, "one or more names, joined by +"),
}
