"""The two errors of sfumato.

`UserError`: the input is wrong; the message is one sentence with the value, the expected one and
the remedy. The command line prints it and exits with code 2, the server answers 4xx.
`NumericalError`: a NaN or an infinity was found; the message names the stage, the step and the
dtype. Nothing is written then.
`Stopped` is no error: Ctrl-C or a batch system ended a run that can go on.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN = 50
"""Most names that an error lists: ImageNet's thousand would bury the sentence."""
CLOSE = 0.62
"""Least similarity of a name that an error suggests: "karas" is karras, not crash."""
WRONG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that Python and torch raise for a value of the wrong kind."""


class UserError(ValueError):
    """Wrong input, explained in one sentence."""


class NumericalError(ArithmeticError):
    """A value that is not finite, with the stage, step and dtype in which it appeared."""


class Stopped(KeyboardInterrupt):
    """A run that a signal ended, with a sentence that says how to go on.

    Attributes:
        signal: Number of the signal; the command line exits with 128 + signal.
    """

    def __init__(self, signal: int, sentence: str):
        super().__init__(sentence)
        self.signal = int(signal)


def unknown(kind: str, value: object, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not in a list, with near matches.

    Args:
        kind: Kind of the names, in the singular ("sampler").
        value: The name.
        choices: The names of the list, of which the error has at most `SHOWN`.
    """
    names = sorted(choices)
    lower = [n.lower() for n in names]
    word = str(value).lower()
    near = difflib.get_close_matches(word, lower, n=3, cutoff=CLOSE)
    near = near or [name for name in lower if len(word) > 1 and name.startswith(word)][:3]
    near = near or [n for n in lower if difflib.get_close_matches(word, _words(n), 1, CLOSE)][:3]
    close = [n for best in near for n in names if n.lower() == best]  # the nearest first
    hint = f"did you mean {' or '.join(repr(n) for n in close)}? " if close else ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = f"expected one of {', '.join(names[:SHOWN])}{more}" if names else "there are none"
    return UserError(f"unknown {kind} {value!r}: {hint}{listed}")


def _words(name: str) -> list[str]:
    """The words of a name ("ankle boot", "dpmpp_2m_sde"), without short ones."""
    return [word for word in re.split(r"[\W_]+", name) if len(word) > 2]


def quoted(text: str) -> str:
    """Quote a text for an error message, without the middle of a long one."""
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")


def system_error(error: BaseException) -> UserError | None:
    """Return the `UserError` for a file, a text or memory that the system refuses.

    Args:
        error: Any error.

    Returns:
        None for another error, and for one of sfumato.
    """
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    if isinstance(error, OSError):
        place = "a file, or the output," if error.filename is None else str(error.filename)[:200]
        return UserError(
            f"{place} cannot be read or written ({reason}): check that it is there, that you may "
            "use it, and that the disk has space"
        )
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        return UserError(
            f"a text or the name of a file does not fit the encoding {error.encoding} ({reason}): "
            "use a UTF-8 locale, or set PYTHONUTF8=1"
        )
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return UserError(
            f"the memory does not suffice ({reason or 'none is left'}): ask for smaller or fewer "
            "images, or a smaller batch; `sfumato info MODEL` shows what a model needs"
        )
    return None


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "Storage size calculation overflowed",
)
"""Signs of torch's errors, which are RuntimeErrors."""


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
