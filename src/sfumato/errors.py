"""The two errors of sfumato.

`UserError`: the input is wrong; the message is one sentence with the value, the expected one and
the remedy. The command line prints it and exits with code 2, the server answers 4xx.
`NumericalError`: a NaN or an infinity was found; the message names the stage, the step and the
dtype. Nothing is written then.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN = 50
"""Most names that an error lists: ImageNet's thousand would bury the sentence."""
WRONG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that Python and torch raise for a value of the wrong kind."""


class UserError(ValueError):
    """Wrong input, explained in one sentence."""


class NumericalError(ArithmeticError):
    """A value that is not finite, with the stage, step and dtype in which it appeared."""


def unknown(kind: str, value: object, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not in a list, with near matches.

    Args:
        kind: Kind of the names, in the singular ("sampler").
        value: The name.
        choices: The names of the list, of which the error has at most `SHOWN`.
    """
    names = sorted(choices)
    lower = [n.lower() for n in names]
    near = difflib.get_close_matches(str(value).lower(), lower, n=3, cutoff=0.5)
    close = [n for best in near for n in names if n.lower() == best]  # the nearest first
    hint = f"did you mean {' or '.join(repr(n) for n in close)}? " if close else ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = f"expected one of {', '.join(names[:SHOWN])}{more}" if names else "there are none"
    return UserError(f"unknown {kind} {value!r}: {hint}{listed}")


def quoted(text: str) -> str:
    """Quote a text for an error message, without the middle of a long one."""
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")


@contextmanager
def usable_device(device: object) -> Iterator[None]:
    """Turn torch's errors about a device into one `UserError`.

    Args:
        device: The device to which the body moves tensors, as the caller gave it.

    Raises:
        UserError: For an unknown name and a device that is missing.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # which of the two depends on the device's type
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}): expected one such as cpu or cuda"
        ) from error


@contextmanager
def explained(path: str | Path, kinds: tuple[type[Exception], ...] = WRONG) -> Iterator[None]:
    """Turn errors about a file's values into a `UserError` that names the file.

    Args:
        path: The file.
        kinds: Errors to turn, besides a `UserError` that does not name the file.

    Raises:
        UserError: For each of them.
    """
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except kinds as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} has a value of the wrong kind ({type(error).__name__}: {reason}): "
            "correct it, or copy the file again"
        ) from error
