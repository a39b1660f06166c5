"""Checks of settings. Each returns the value, or raises a `UserError` of one sentence.

The sentence is "name=value: expected ...; hint". A name may begin with the setting's owner
("scheduler config steps", "guidance rescale phi"). A hint gives a usual value or its effect.
"""

import math
from collections.abc import Iterable
from typing import Any

from sfumato.errors import UserError, unknown

LONGEST_SIDE = 1 << 20
"""Most pixels of an image's side, above all that fits into memory."""


def whole_number(
    name: str,
    value: Any,
    at_least: int | None = None,
    at_most: int | None = None,
    unit: str = "",
    hint: str = "",
) -> int:
    """Return an int from `at_least` to `at_most`, where None is no bound.

    True and 2.0 are refused.

    Args:
        name: Name of the setting.
        value: Its value.
        at_least: Smallest value.
        at_most: Largest value.
        unit: Unit of the number, in the plural ("pixels").
        hint: Added to the sentence.
    """
    low, high = (
        -math.inf if at_least is None else at_least,
        math.inf if at_most is None else at_most,
    )
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        if at_least is None and at_most is None:
            bounds = ""
        elif at_least is None or at_most is None:
            bound = f"at least {at_least}" if at_most is None else f"at most {at_most}"
            bounds = f", {bound}" if unit else f" of {bound}"
        else:
            bounds = f" from {at_least} to {at_most}"
        raise _refusal(name, value, "a whole number" + f" of {unit}" * bool(unit) + bounds, hint)
    return value


def positive_int(name: str, value: Any, unit: str = "", hint: str = "") -> int:
    """Return an int of at least 1, see `whole_number`."""
    return whole_number(name, value, at_least=1, unit=unit, hint=hint)


MOST_IMAGES = 2**20
"""Images of a request: the seeds of many more would fill the memory."""


MOST_STEPS = 2**20
"""Steps of a run: the times of many more would fill the memory."""


def image_count(name: str, value: Any) -> int:
    """Return a number of images, from 1 to `MOST_IMAGES`."""
    positive_int(name, value)
    return whole_number(name, value, at_most=MOST_IMAGES)


def step_count(name: str, value: Any) -> int:
    """Return a number of steps, from 1 to `MOST_STEPS`."""
    positive_int(name, value)
    return whole_number(name, value, at_most=MOST_STEPS)


def seed_number(name: str, value: Any, n: int = 1) -> int:
    """Return the first seed of n images, which have seed, seed + 1, ... up to 2^64 - 1.

    Numbers outside are refused: taken modulo 2^64 they would be other names of the same images.

    Args:
        name: Name of the setting.
        value: Its value; True and 2.0 are refused.
        n: Number of images.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**64 - n:
        images = "" if n == 1 else f" for {n} images"
        hint = (
            "--seed random draws one"
            if name.startswith("--")
            else "sfumato.sampling.random_seed() draws one"
        )
        raise _refusal(name, value, f"a whole number from 0 to 2^64 - {n}{images}", hint)
    return value


def number_in(
    name: str,
    value: Any,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    hint: str = "",
) -> float:
    """Return a finite number with at_least <= number <= at_most and above < number < below.

    Args:
        name: Name of the setting.
        value: Its value; True, NaN and infinity are refused.
        at_least: Smallest value.
        at_most: Largest value.
        above: Bound below all values.
        below: Bound above all values.
        hint: Added to the sentence.
    """
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if not (valid and at_least <= value <= at_most and above < value < below):
        low, high = max(at_least, above), min(at_most, below)
        if math.isinf(low) and math.isinf(high):
            kind = "a finite number"
        elif math.isinf(high):
            kind = f"a number above {low:g}" if above == low else f"a number of at least {low:g}"
        else:
            begin, end = "(" if above == low else "[", ")" if below == high else "]"
            kind = f"a number in {begin}{low:g}, {high:g}{end}"
        raise _refusal(name, value, kind, hint)
    return value


def flag(name: str, value: Any, hint: str = "") -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise _refusal(name, value, "true or false", hint)
    return value


def one_of(kind: str, value: Any, choices: Iterable[str]) -> str:
    """Return one of the choices; `kind` is their kind, in the singular ("solver")."""
    choices = tuple(choices)
    if value not in choices:
        raise unknown(kind, value, choices)
    return value


def _refusal(name: str, value: Any, expected: str, hint: str) -> UserError:
    return UserError(f"{name}={value!r}: expected {expected}{'; ' * bool(hint)}{hint}")
