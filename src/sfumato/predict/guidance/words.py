"""Parts of guidance as words: "interval:low=0.2,high=0.8" is a frozen dataclass of settings, and
back.

WORD = NAME or NAME:OPTION=VALUE,OPTION=VALUE       several values of one option are joined by +
"""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from sfumato.errors import UserError, unknown

SCALE = "scale"
"""A weight's first setting is not among its options: it is the number that everybody gives."""


def options_of(part: Any) -> dict[str, Field[Any]]:
    """The options of a part's class, by name."""
    return {f.name: f for f in fields(part) if f.name != SCALE}


def read(part: type, name: str, options: Mapping[str, Any], **given: Any) -> Any:
    """A part from its options, as text or as JSON's values; `UserError` for what it does not know
    or cannot be.
    """
    known = options_of(part)
    for key in options:
        if key not in known:
            raise unknown(f"option of {name}", key, known)
    return part(
        **given,
        **{
            key: _value(f"{name}:{key}", value, known[key].default)
            for key, value in options.items()
        },
    )


def write(name: str, part: Any) -> str:
    """The word for a part: options that have their default values are left out."""
    values = {
        key: getattr(part, key)
        for key, field in options_of(part).items()
        if getattr(part, key) != field.default
    }
    return (
        name
        + ":" * bool(values)
        + ",".join(f"{key}={_text(key, value)}" for key, value in values.items())
    )


def number(value: float) -> str:
    """The shortest text that is read as the same number, without a needless .0."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _value(where: str, value: Any, default: Any) -> Any:
    """A value of the type that the default has."""
    try:
        if isinstance(default, tuple):
            values = value.split("+") if isinstance(value, str) else list(value)
            if values and all(isinstance(v, str) and v for v in values):
                return tuple(values)
        elif isinstance(default, str):
            if isinstance(value, str):
                return value
        elif not isinstance(value, bool) and (
            isinstance(default, float) or float(value) == int(float(value))
        ):
            return float(value) if isinstance(default, float) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = {
        tuple: "one or more names, joined by +",
        str: "a word",
        float: "a number",
        int: "a whole number",
    }[type(default)]
    raise UserError(f"{where}={value!r}: expected {wanted}")


def _text(key: str, value: Any) -> str:
    text = (
        "+".join(value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, str)
        else number(value)
    )
    if any(c in " \t\n," for c in text) or not text:
        raise UserError(f"{key}={text!r}: expected a value without spaces and commas")
    return text
