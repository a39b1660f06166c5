"""Samplers: generator functions of pure algebra, one file each, found by name.

    @traits(order=1)
    def name(x, times, schedule, noise, **options):
        ... prediction = yield x, t ...
        return x

    x           noisy latent (B, C, h, w) at times[0]
    times       floats, strictly descending, ending where the run ends (0 is clean)
    schedule    t -> (alpha, sigma)
    noise       draws the next standard-normal tensor
    options     numbers, words and flags with defaults; `UserError` before the first call

A sampler holds no model, no device and no state between runs. Its calls do not depend on the values
of predictions: `calls` counts them with an empty run. Arithmetic on x is multiplications and
additions of whole tensors, one at a time, so that an image's bits do not depend on its batch.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sfumato.diffuse.schedule import Schedule
from sfumato.registry import find
from sfumato.types import Noise as Noise
from sfumato.types import Prediction

Times = Sequence[float]
"""Times of a run, strictly descending, in [0, 1]: 1 is noise, 0 is clean."""
Run = Generator[tuple[Tensor, float], Prediction, Tensor]
"""A sampler's generator: yields (x, t), is sent the prediction there, returns the latent."""

Sampler = Callable[..., Run]
"""(x, times, schedule, noise, **options) -> run."""
F = TypeVar("F", bound=Sampler)


@dataclass(frozen=True)
class Traits:
    """Properties of a sampler, checked by the contract tests and printed in the documentation.

    Attributes:
        order: Order of the error in the step size; of the deterministic part, if it draws noise.
        calls: Network calls a step, at most.
        noise: True if it draws noise with its default options.
        network_type: "denoiser" (E[z | x]), or "consistency": the end of the flow through x, as
            distilled models predict it.
        uses_x0_and_eps: True if it uses x0 and eps as they are, so that the pair need not add up to
            x (CFG++).
        inverts: True if it runs from clean to noise: x is at the last of the times, the result at
            the first.
        exact: Options with which its samples have the data's distribution, where the defaults trade
            that for something else.
    """

    order: int
    calls: int = 1
    noise: bool = False
    network_type: Literal["denoiser", "consistency"] = "denoiser"
    uses_x0_and_eps: bool = False
    inverts: bool = False
    exact: dict[str, Any] = field(default_factory=dict)


def traits(**values: Any) -> Callable[[F], F]:
    """Set the `Traits` of a sampler."""

    def mark(sampler: F) -> F:
        sampler.traits = Traits(**values)  # pyright: ignore[reportFunctionMemberAccess]
        return sampler

    return mark


def traits_of(sampler: Sampler) -> Traits:
    """Return the traits of a sampler; of one without any, those of order 1."""
    return getattr(sampler, "traits", Traits(order=1))


def get_sampler(name: str) -> Sampler:
    """Return a sampler by name; `UserError` for an unknown one."""
    return find("diffuse.samplers", name)


def calls(sampler: Sampler, times: Times, schedule: Schedule, **options: Any) -> int:
    """Count the network calls of a run."""
    return _empty_run(sampler, tuple(times), schedule, tuple(options.items()), True)[0]


def draws(sampler: Sampler, times: Times, schedule: Schedule, **options: Any) -> int:
    """Count the draws of noise of a run."""
    return _empty_run(sampler, tuple(times), schedule, tuple(options.items()), True)[1]


def draws_noise(sampler: Sampler, times: Times, schedule: Schedule, **options: Any) -> bool:
    """Return True if a run with these options draws noise."""
    return draws(sampler, times, schedule, **options) > 0


def check_run(
    sampler: Sampler,
    times: Times,
    schedule: Schedule,
    options: Mapping[str, Any],
    variance: bool = True,
) -> None:
    """Run a sampler on one number, without a network.

    Args:
        sampler: The sampler.
        times: Times of the run.
        schedule: t -> (alpha, sigma).
        options: The sampler's options.
        variance: True if the network predicts a variance.

    Raises:
        UserError: For options or times that the sampler refuses, and a variance that it needs.
    """
    _empty_run(sampler, tuple(times), schedule, tuple(options.items()), variance)


@lru_cache(maxsize=256)
def _empty_run(
    sampler: Sampler,
    times: tuple[float, ...],
    schedule: Schedule,
    options: tuple[tuple[str, Any], ...],
    variance: bool,
) -> tuple[int, int]:
    """Count the (network calls, draws of noise) of a run on one number."""
    zeros, drawn = torch.zeros(1, 1, 1, 1), []

    def noise() -> Tensor:
        drawn.append(True)
        return zeros

    run, count = sampler(zeros, times, schedule, noise, **dict(options)), 0
    prediction = Prediction(zeros, zeros, zeros if variance else None)
    try:
        next(run)
        while True:
            count += 1
            run.send(prediction)
    except StopIteration:
        return count, len(drawn)
