"""Runs a sampler against a denoiser: one step at a time, with previews, cancellation and a check
that every number is finite.

A run is a coroutine of denoiser calls (`conduct`); `sfumato.batching.gather` makes one of many, so
that calls pending at once share a forward pass.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, drive
from sfumato.errors import NumericalError
from sfumato.types import Conditioning, Prediction

Sampling = Generator[tuple[Tensor, float], Prediction, Tensor]
"""A sampler at work: asks about (x, t), is sent the prediction, ends with the latent."""

Denoise = Callable[[Tensor, float], Prediction]
"""(x, t) -> Prediction: a denoiser with its conditioning and guidance already inside."""


@dataclass(frozen=True)
class Step:
    """One network call of a run: index of count (from 0), time, the noisy latent that was asked
    about and the prediction there.
    """

    index: int
    count: int
    t: float
    x: Tensor
    prediction: Prediction


class SeededNoise:
    """Standard-normal tensors in which image k is drawn from its own generator, seeded with
    seeds[k].

    Drawn on the CPU in float32, so that image k of a batch can be made again alone, on any device.
    """

    def __init__(
        self, shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu"
    ):
        self.shape, self.device = tuple(shape), device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.ahead: list[Tensor] = []
        self.count = 1

    def __call__(self) -> Float[Tensor, "B C h w"]:
        # after the first, which many runs leave it at, some in advance: a generator that is at it
        # goes on for less
        if not self.ahead:
            drawn = torch.empty(self.count, len(self.generators), *self.shape)
            for k, generator in enumerate(self.generators):
                for row in drawn[:, k]:
                    row.normal_(generator=generator)
            self.ahead, self.count = [*reversed(drawn.to(self.device))], 4
        return self.ahead.pop()


def all_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite. A finite sum says so for less; a sum that is too large
    does not say otherwise.
    """
    return math.isfinite(float(value.sum())) or bool(torch.isfinite(value).all())


def check_finite(value: Tensor, stage: str) -> None:
    """`NumericalError` naming the stage and dtype if any number is NaN or infinite."""
    if not all_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise NumericalError(
            f"{bad} of {value.numel()} numbers are NaN or infinite in {stage} ({str(value.dtype).removeprefix('torch.')}): nothing was written; "
            "try float32, or other weights"
        )


def conduct(
    sampler: Sampling,
    ask: DenoiseFn,
    count: int,
    on_step: Callable[[Step], bool | None] | None = None,
) -> DenoiseCalls[Tensor | None]:
    """A run as a string of questions, so that whoever answers can answer many runs at once. Ends
    with the latent, None if cancelled.

    count: the number of times that the sampler asks. on_step sees each step and cancels the run by
    returning False. Raises `NumericalError` at the first step whose prediction is not finite.
    """
    try:
        x, t = next(sampler)
        for index in itertools.count():
            prediction = yield from ask(x, t)
            if not math.isfinite(float(prediction.size())):
                for part in (prediction.x0, prediction.eps):
                    check_finite(part, f"step {index + 1} of {count} (t = {t:.4g})")
            if on_step is not None and on_step(Step(index, count, t, x, prediction)) is False:
                return None
            x, t = sampler.send(prediction)
    except StopIteration as stop:
        check_finite(stop.value, "the last step")
        return stop.value
    finally:
        sampler.close()


def run(sampler: Sampling, denoise: Denoise, count: int) -> Iterator[Step | Tensor]:
    """Yields a `Step` after each network call and, last, the final latent. Stop iterating to
    cancel: nothing is left behind.

    count: the number of calls to expect, for progress. Raises `NumericalError` at the first step
    whose output is not finite.
    """
    steps: list[Step] = []
    questions = conduct(sampler, lambda x, t: _plainly(denoise, x, t), count, steps.append)
    try:
        asked = next(questions)
        while True:
            prediction = denoise(asked[0].x, asked[0].t)
            try:
                asked = questions.send([prediction])
            finally:
                yield from steps
                steps.clear()
    except StopIteration as stop:
        assert stop.value is not None
        yield stop.value
    finally:
        questions.close()


def _plainly(denoise: Denoise, x: Tensor, t: float) -> DenoiseCalls[Prediction]:
    return (yield [DenoiserCall(denoise, x, t, Conditioning())])[0]


def sample(
    sampler: Sampling,
    denoise: Denoise,
    count: int,
    on_step: Callable[[Step], bool | None] | None = None,
) -> Tensor | None:
    """Runs to the end and returns the latent; `on_step` sees every step and cancels the run by
    returning False (then: None).
    """
    questions = conduct(sampler, lambda x, t: _plainly(denoise, x, t), count, on_step)
    return drive(questions, lambda asked: [denoise(query.x, query.t) for query in asked])
