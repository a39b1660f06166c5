"""Samplers: generator functions of pure algebra, one file each, found by name.

    @traits(order=1)
    def name(x, times, schedule, noise, **options):
        ... prediction = yield x, t ...
        return x

x (B, C, h, w) noisy latent at times[0]; times: floats, strictly descending, ending where the run
ends (0 is clean); schedule gives (alpha, sigma); noise() draws the next standard-normal tensor. A
sampler holds no model, no device and no state between runs, and what it asks does not depend on the
answers' values: `calls` counts them with an empty run. Arithmetic on x is multiplications and
additions of whole tensors, one at a time, so that an image's bits do not depend on its batch.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.types import Prediction

Run = Generator[tuple[Tensor, float], Prediction, Tensor]
"""What a sampler returns: yields (x, t), is sent the prediction there, ends with the latent."""

F = TypeVar("F", bound=Callable[..., Run])


@dataclass(frozen=True)
class Traits:
    """What a sampler promises. The contract tests hold it to that, and the documentation prints it.

    order   of the error in the step size, for a deterministic one; of its deterministic part
            otherwise
    calls   network calls a step, at most
    noise   whether it draws noise on the way, with its default options
    network "denoiser" (E[z | x]), or "consistency": the end of the flow through x, which distilled
    models give
    both    whether it uses x0 and eps as it is given them, and so may be given a pair that does not
            add up to x (CFG++)
    upward  whether it runs from clean to noise: x is at the last of the times, and the result at
            the first
    exact   options under which its samples have the data's distribution, where the defaults trade
            that for something else
    """

    order: int
    calls: int = 1
    noise: bool = False
    network: str = "denoiser"
    both: bool = False
    upward: bool = False
    exact: dict[str, Any] = field(default_factory=dict)


def traits(**values: Any) -> Callable[[F], F]:
    """Marks a sampler with its `Traits`."""

    def mark(sampler: F) -> F:
        sampler.traits = Traits(**values)  # pyright: ignore[reportFunctionMemberAccess]
        return sampler

    return mark


def traits_of(sampler: Callable[..., Run]) -> Traits:
    """The traits of a sampler; without any it is taken for a denoiser's, of order 1."""
    return getattr(sampler, "traits", Traits(order=1))


def calls(
    sampler: Callable[..., Run], times: Sequence[float], schedule: Any, **options: Any
) -> int:
    """How many network calls a run makes."""
    return _empty_run(sampler, tuple(times), schedule, tuple(options.items()))[0]


def check_run(
    sampler: Callable[..., Run],
    times: Sequence[float],
    schedule: Any,
    options: Mapping[str, Any],
    variance: bool = True,
) -> None:
    """Run a sampler on one number, without a network.

    Args:
        variance: whether the network predicts a variance

    Raises:
        UserError: options or times that the sampler refuses, or a variance that it needs
    """
    arguments = sampler, tuple(times), schedule, tuple(options.items())
    # the former is remembered for `calls`
    _empty_run(*arguments) if variance else _empty_run(*arguments, False)


def draws_noise(
    sampler: Callable[..., Run], times: Sequence[float], schedule: Any, **options: Any
) -> bool:
    """Whether a run draws noise on the way, with these options."""
    return draws(sampler, times, schedule, **options) > 0


def draws(
    sampler: Callable[..., Run], times: Sequence[float], schedule: Any, **options: Any
) -> int:
    """How many times a run draws noise on the way."""
    return _empty_run(sampler, tuple(times), schedule, tuple(options.items()))[1]


@lru_cache(maxsize=256)
def _empty_run(
    sampler: Callable[..., Run],
    times: tuple[float, ...],
    schedule: Any,
    options: tuple[tuple[str, Any], ...],
    variance: bool = True,
) -> tuple[int, int]:
    """(network calls, draws of noise) of a run on one number, with answers of nothing."""
    nothing, drawn = torch.zeros(1, 1, 1, 1), []

    def noise() -> Tensor:
        drawn.append(True)
        return nothing

    run, count = sampler(nothing, times, schedule, noise, **dict(options)), 0
    answer = Prediction(nothing, nothing, nothing if variance else None)
    try:
        next(run)
        while True:
            count += 1
            run.send(answer)
    except StopIteration:
        return count, len(drawn)
