"""Settings from JSON: known fields become a frozen dataclass, a field that would change behaviour
unseen is refused.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from sfumato.errors import UserError

T = TypeVar("T")


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def read_config(cls: type[T], values: Mapping[str, Any], fixed: Mapping[str, Any]) -> T:
    """Builds the dataclass `cls` from a config's fields.

    `fixed` names fields that `cls` does not carry, each with the one value that our code stands
    for: absent or equal is fine, another value is a `UserError`, and so is a field that neither
    knows. Names that start with an underscore are notes.
    """
    known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    taken: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            taken[name] = _plain(value)
        elif name.startswith("_"):
            continue
        elif name not in fixed:
            raise UserError(
                f"config field {name}={value!r} is not known to {cls.__name__}: it might change the result, so it is refused"
            )
        elif _plain(value) != _plain(fixed[name]):
            raise UserError(
                f"config field {name}={value!r} is not supported by {cls.__name__}: expected {fixed[name]!r}"
            )
    missing = [
        f.name
        for f in fields(cls)  # pyright: ignore[reportArgumentType]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in taken
    ]
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}: {cls.__name__} needs them")
    return cls(**taken)
