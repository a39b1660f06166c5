"""Settings from JSON as a frozen dataclass.

An unknown field is refused: it might change the result.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sfumato.errors import UserError

T = TypeVar("T")


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


MOST = 2**31 - 1
"""Largest whole number of a config: no size, count or seed of a network is larger."""
MOST_LAYERS = 1000
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Return True for a value of a type's kind, and for types that are not plain."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint not in (int, float, str)
    if hint is int:
        return isinstance(value, int) and abs(value) <= MOST
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, str) if hint is str else hint is not type(None) or value is None


def _checked(cls: type, name: str, value: Any) -> Any:
    """Return a field's value; `UserError` for one of another kind than the field's.

    Null passes: published configs have it where they mean the default.
    """
    hint = _hints(cls).get(name)
    if value is not None and not _fits(value, hint):
        plain = [_WORDS[part] for part in (hint, *get_args(hint)) if part in _WORDS]
        raise UserError(
            f"config field {name}={str(value)[:80]} has a value of the wrong kind: "
            f"expected {plain[0] if plain else 'a list of values of one kind'}"
        )
    if isinstance(value, int) and "layers" in name and value > MOST_LAYERS:
        raise UserError(f"config field {name}={value}: expected at most {MOST_LAYERS}")
    return value


def read_config(cls: type[T], values: Mapping[str, Any], fixed: Mapping[str, Any]) -> T:
    """Build a dataclass from the fields of a config.

    Args:
        cls: The dataclass.
        values: Field -> value. Names that start with an underscore are notes.
        fixed: Fields that `cls` does not have, each with the one value that it stands for; other
            values are refused.

    Raises:
        UserError: For a field that is neither, another value of a fixed one, and missing fields.
    """
    names = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name in names:
            settings[name] = _checked(cls, name, _plain(value))
        elif name.startswith("_"):
            continue
        elif name not in fixed:
            raise UserError(
                f"config field {name}={value!r} is not known to {cls.__name__}: "
                "it might change the result, so it is refused"
            )
        elif _plain(value) != _plain(fixed[name]):
            raise UserError(
                f"config field {name}={value!r} is not supported by {cls.__name__}: "
                f"expected {fixed[name]!r}"
            )
    missing = [
        f.name
        for f in fields(cls)  # pyright: ignore[reportArgumentType]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in settings
    ]
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}: {cls.__name__} needs them")
    return cls(**settings)
