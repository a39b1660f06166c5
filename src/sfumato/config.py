"""Settings from JSON as a frozen dataclass.

An unknown field is refused: it might change the result.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from sfumato.errors import UserError

T = TypeVar("T")


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


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
            settings[name] = _plain(value)
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
