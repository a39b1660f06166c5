"""Speed: the median of repeated calls, after a warm-up. A mean would count the neighbours of a
shared machine.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfumato.validate import positive_int, whole_number


@dataclass(frozen=True)
class Speed:
    """Seconds: median of a call, of an image, and the fastest call; `calls` were timed, each making
    `images` images.
    """

    seconds_per_call: float
    seconds_per_image: float
    fastest_call: float
    calls: int
    images: int


def measure_speed(
    call: Callable[[], object],
    images: int = 1,
    calls: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Times `call()`, which makes `images` images. A CUDA device is waited for before the clock is
    read.

    Errors: `UserError` for fewer than one call or image.
    """
    positive_int("calls", calls)
    positive_int("images", images)
    whole_number("warmup", warmup, 0)
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(calls):
        _wait()
        start = clock()
        call()
        _wait()
        seconds.append(clock() - start)
    median = statistics.median(seconds)
    return Speed(median, median / images, min(seconds), calls, images)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
