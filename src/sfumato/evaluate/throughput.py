"""Speed: the median of repeated calls, after a warm-up.

A mean would count the other programs of a shared machine.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfumato.validate import positive_int, whole_number


@dataclass(frozen=True)
class Speed:
    """Times of repeated calls.

    Attributes:
        seconds_per_call: Median of the calls.
        seconds_per_image: That of one image.
        fastest_call: In seconds.
        calls: Number of timed calls.
        images: Number of images of a call.
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
    """Time `call()`, synchronising a CUDA device before the clock is read.

    Args:
        call: Makes `images` images.
        images: Number of images of a call.
        calls: Number of timed calls.
        warmup: Number of calls before them.
        clock: Returns the time in seconds.

    Raises:
        UserError: For fewer than one call or image.
    """
    positive_int("calls", calls)
    positive_int("images", images)
    whole_number("warmup", warmup, 0)
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(calls):
        _synchronise()
        start = clock()
        call()
        _synchronise()
        seconds.append(clock() - start)
    median = statistics.median(seconds)
    return Speed(median, median / images, min(seconds), calls, images)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
