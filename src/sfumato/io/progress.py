"""Progress of long work: reported where it is done, shown by who runs it.

    with reporting(show):            # show(title, done, total)
        images = open_images(...)    # calls report("opening images", 64, 12_000)

Without a `reporting` around it a report does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Report = Callable[[str, int, int], None]
"""Called with a title, the number of finished items and the number of all."""

_report: ContextVar[Report | None] = ContextVar("report", default=None)


def report(title: str, done: int, total: int) -> None:
    """Pass progress on to the innermost `reporting` of this context.

    Args:
        title: Of the work, such as "encoding images".
        done: Number of finished items.
        total: Number of all items.
    """
    if (show := _report.get()) is not None:
        show(title, done, total)


@contextmanager
def reporting(show: Report) -> Iterator[None]:
    """Let `show` receive the reports of the body."""
    token = _report.set(show)
    try:
        yield
    finally:
        _report.reset(token)
