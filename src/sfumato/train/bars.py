"""Progress of a run: bars on a terminal and in a notebook, a line now and then elsewhere.

A log file must not fill up with bars: without a terminal long work has a line every ten seconds.
"""

import logging
import os
import sys
import time
from typing import Any, Self

from sfumato.io.progress import reporting

logger = logging.getLogger(__name__)

PAUSE = 10.0
"""Seconds between two lines of one piece of work, without a terminal."""


class Bars:
    """A context that shows the reports of its body (`io/progress.py`) on stderr.

    Of several processes the first alone shows them.
    """

    def __init__(self) -> None:
        self.progress: Any = None
        self.tasks: dict[str, Any] = {}
        self.times: dict[str, float] = {}
        self.silent = os.environ.get("RANK", "0") != "0"

    def __enter__(self) -> Self:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)  # stdout belongs to the program's answer
        if not self.silent and (sys.stderr.isatty() or console.is_jupyter):
            self.progress = progress.Progress(
                "{task.description}",
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                "{task.fields[text]}",
                console=console,
                refresh_per_second=2,
            )
            self.progress.start()
        self._context = reporting(self.update)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        if self.progress is not None:
            self.progress.stop()

    def update(self, title: str, done: int, total: int) -> None:
        """Show that `done` of `total` items of a piece of work are finished."""
        if self.progress is not None:
            if title not in self.tasks:
                self.tasks[title] = self.progress.add_task(title, total=total, text="")
            self.progress.update(self.tasks[title], completed=done, total=total)
            if done >= total:
                self.progress.remove_task(self.tasks.pop(title))
        elif not self.silent:
            now = time.monotonic()
            if now - self.times.setdefault(title, now) >= PAUSE and done < total:
                self.times[title] = now
                logger.info("%s: %d of %d", title, done, total)
            elif done >= total:
                del self.times[title]

    @property
    def visible(self) -> bool:
        """True where bars are drawn."""
        return self.progress is not None

    def step(self, title: str, done: int, total: int, text: str | None) -> None:
        """Move the bar of a training loop, which stays where it is at the end.

        Args:
            title: Of the bar.
            done: Number of finished steps.
            total: Number of all steps.
            text: Behind the bar; None leaves the last one.
        """
        if self.progress is None:
            return
        if title not in self.tasks:
            self.tasks[title] = self.progress.add_task(title, total=total, text="")
        fields = {} if text is None else {"text": text}
        self.progress.update(self.tasks[title], completed=done, total=total, **fields)
