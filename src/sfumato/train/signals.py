"""Ctrl-C, SIGTERM and SIGHUP in a training loop: stop after the step, with a checkpoint.

The first signal is a request that the loop reads between two steps. A second Ctrl-C raises
`Stopped` at once, wherever the run is; files are written atomically, so that none is half written.
Batch systems send SIGTERM, some of them several times: only Ctrl-C counts twice. A signal stays
ignored where it was: SIGHUP under nohup, SIGINT in the background job of a script.
"""

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Self

import torch

from sfumato.errors import Stopped

logger = logging.getLogger(__name__)


class _Interrupted(BaseException):
    """Leaves work that can be repeated; caught by `Signals.attempt`."""


class Signals:
    """A context in which signals are requests to stop.

    Outside of the main thread Python has no signal handlers, and nothing changes.

    Args:
        newest: Returns the sentence of a run that is stopped at once.

    Attributes:
        received: The first signal of this process; None before.
    """

    def __init__(self, newest: Callable[[], str]):
        self.newest, self._raises = newest, False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _numbers() -> list[int]:
        numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
        if (hang_up := getattr(signal, "SIGHUP", None)) is not None:  # Windows has none
            numbers.append(hang_up)
        return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            with suppress(RuntimeError):  # the signal came while a line was written
                logger.warning(
                    "%s: stopping after this step, with a checkpoint; Ctrl-C%s stops at once",
                    signal.Signals(number).name,
                    " again" if number == signal.SIGINT else "",
                )
            if self._raises:
                raise _Interrupted
        elif number == signal.SIGINT:
            raise Stopped(number, self.newest())

    def time_is_over(self) -> None:
        """Request a stop as a signal does, because the time of the run is over."""
        if self.received is None:
            self.received = int(getattr(signal, "SIGALRM", signal.SIGTERM))
            logger.warning("the time of loop.limit_time is over: stopping with a checkpoint")

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do work that can be done again later; the first signal breaks it off.

        Returns:
            True where the work was finished.
        """
        try:
            self._raises = self.received is None
            if not self._raises:
                return False
            work()
            return True
        except _Interrupted:
            return False
        finally:
            self._raises = False

    def agreed(self, accelerator: Any) -> bool:
        """Return True where any process received a signal: all stop at one step.

        The others' signals are not this process's: its own first Ctrl-C stays the first.
        """
        if accelerator.num_processes == 1:
            return self.received is not None
        request = torch.tensor(float(self.received or 0), device=accelerator.device)
        return float(accelerator.reduce(request, "sum")) > 0

    @property
    def number(self) -> int:
        """The signal for which the run stops; SIGTERM where another process received one."""
        return self.received or int(signal.SIGTERM)
