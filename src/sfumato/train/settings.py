"""Checks of settings: every value is of its field's type, and every number a number.

A recipe is Python that anybody writes, so that a text may stand where a number belongs. Each
settings class calls `check_fields` when it is made: the error then has the recipe's line.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sfumato.errors import UserError

LARGEST = 2**64 - 1
"""Largest whole number of a setting."""
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_WORDS |= {type(None): "None", Path: "a path"}


def check_fields(settings: Any, owner: str = "") -> None:
    """Raise `UserError` for a field whose value is not of its annotated type.

    Whole numbers must be smaller than 2^64 in size, numbers must not be NaN. Lists pass for tuples
    and texts for paths.

    Args:
        settings: A dataclass.
        owner: Name before the fields' names in the message, such as "network.".
    """
    hints = _hints(type(settings))
    for f in fields(settings):
        value, hint = getattr(settings, f.name), hints.get(f.name, Any)
        if not _fits(value, hint):
            raise UserError(f"{owner}{f.name}={_shown(value)}: expected {_words(hint)}")


def check_counts(config: Any, owner: str = "network.") -> None:
    """`check_fields` of a network's config, whose whole numbers are sizes and counts.

    Raises:
        UserError: For a value of another type, a number below 0 or no number, and more layers than
            any machine holds.
    """
    check_fields(config, owner)
    for f in fields(config):
        value = getattr(config, f.name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            most = 10_000 if "layers" in f.name else 2**31 - 1
            if isinstance(number, int) and not 0 <= number <= most:
                raise UserError(
                    f"{owner}{f.name}={_shown(value)}: expected whole numbers from 0 to {most}"
                )
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{owner}{f.name}={_shown(value)}: expected finite numbers")


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # annotations of a recipe's own class may name what only checkers import
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:  # another text is refused with near matches, by `one_of`
        return isinstance(value, str) or value in get_args(hint)
    if origin is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple | list):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(v, parts[0]) for v in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is not None:
        return isinstance(value, origin) if isinstance(origin, type) else True
    if hint in (int, float):
        if isinstance(value, bool):
            return False
        if isinstance(value, int):
            return abs(value) <= LARGEST
        return hint is float and isinstance(value, float) and not math.isnan(value)
    if hint is Path:
        return isinstance(value, Path | str) and str(value) not in ("", ".")
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            return f"a tuple, each {_words(parts[0])}"
        return f"{len(parts)} values, ({', '.join(map(_words, parts))})"
    if origin is not None:
        return "a mapping" if issubclass(origin, Mapping) else f"a {origin.__name__}"
    name = getattr(hint, "__name__", str(hint))
    article = "an" if name[:1] in "AEIOU" else "a"
    return _WORDS.get(hint) or f"{article} {name}"


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return f"{value.__name__} (the class itself, write {value.__name__}(...))"
    if isinstance(value, int) and abs(value) > 10**40:
        return "a whole number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
