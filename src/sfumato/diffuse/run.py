"""Runs of a sampler against a denoiser, with previews, cancellation and a check for NaN.

`sampler_coroutine` yields a run's calls to denoisers, so that `sfumato.batching.gather` can put
many runs into one forward pass. `run_sampler` and `iterate_steps` drive a single run with a
function.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, drive
from sfumato.diffuse.samplers import Run
from sfumato.diffuse.seeds import seeded_generator
from sfumato.errors import NumericalError
from sfumato.types import Conditioning, Prediction

Denoise = Callable[[Tensor, float], Prediction]
"""A denoiser (x, t) -> Prediction with its conditioning and guidance inside."""


@dataclass(frozen=True)
class Step:
    """One network call of a run.

    Attributes:
        index: Number of calls before it.
        count: Number of calls of the whole run.
        t: Time in (0, 1].
        x: Noisy latent (B, C, h, w) that the network was called with.
        prediction: The prediction at x.
    """

    index: int
    count: int
    t: float
    x: Tensor
    prediction: Prediction


class SeededNoise:
    """Standard-normal tensors (B, C, h, w) in which image k has a generator of its own seed.

    They are drawn on the CPU in float32, so that image k of a batch can be made again alone, on any
    device.

    Args:
        shape: (C, h, w) of one image.
        seeds: One seed an image.
        device: Device of the tensors.
    """

    def __init__(
        self, shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu"
    ):
        self.shape, self.device = tuple(shape), device
        self.generators = [seeded_generator(seed) for seed in seeds]
        self.ahead: list[Tensor] = []
        self.count = 1

    def __call__(self) -> Float[Tensor, "B C h w"]:
        """Draw the next tensor."""
        # After the first draw, with which many runs end, some are made in advance: a generator that
        # goes on at once is cheaper than one that is called again.
        if not self.ahead:
            drawn = torch.empty(self.count, len(self.generators), *self.shape)
            for k, generator in enumerate(self.generators):
                for row in drawn[:, k]:
                    row.normal_(generator=generator)
            self.ahead, self.count = [*reversed(drawn.to(self.device))], 4
        return self.ahead.pop()


def all_finite(value: Tensor) -> bool:
    """Return True if no number is NaN or infinite.

    A finite sum shows this for less. A sum that overflows does not show the opposite.
    """
    return math.isfinite(float(value.sum())) or bool(torch.isfinite(value).all())


def check_finite(value: Tensor, stage: str) -> None:
    """Raise `NumericalError`, with the stage and the dtype, if any number is NaN or infinite."""
    if not all_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        dtype = str(value.dtype).removeprefix("torch.")
        raise NumericalError(
            f"{bad} of {value.numel()} numbers are NaN or infinite in {stage} ({dtype}): "
            "nothing was written; try float32, or other weights"
        )


def sampler_coroutine(
    sampler: Run,
    denoise: DenoiseFn,
    count: int,
    on_step: Callable[[Step], bool | None] | None = None,
) -> DenoiseCalls[Tensor | None]:
    """Run a sampler as a coroutine: yield its calls to denoisers, return the latent.

    Args:
        sampler: A sampler's generator.
        denoise: The denoiser with its conditioning, guidance and wrappers.
        count: Number of times that the sampler calls it, for `Step.count` and errors.
        on_step: Called with each step; False cancels the run.

    Returns:
        The latent (B, C, h, w), or None if the run was cancelled.

    Raises:
        NumericalError: At the first step whose prediction is not finite.
    """
    try:
        x, t = next(sampler)
        for index in itertools.count():
            prediction = yield from denoise(x, t)
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


def iterate_steps(sampler: Run, denoise: Denoise, count: int) -> Iterator[Step | Tensor]:
    """Yield a `Step` after each network call and, last, the final latent.

    A caller that stops iterating cancels the run.

    Args:
        sampler: A sampler's generator.
        denoise: The denoiser.
        count: Number of calls to expect, for `Step.count` and errors.

    Raises:
        NumericalError: At the first step whose prediction is not finite.
    """
    steps: list[Step] = []
    coroutine = sampler_coroutine(
        sampler, lambda x, t: _single_call(denoise, x, t), count, steps.append
    )
    try:
        calls = next(coroutine)
        while True:
            prediction = denoise(calls[0].x, calls[0].t)
            try:
                calls = coroutine.send([prediction])
            finally:
                yield from steps
                steps.clear()
    except StopIteration as stop:
        assert stop.value is not None
        yield stop.value
    finally:
        coroutine.close()


def _single_call(denoise: Denoise, x: Tensor, t: float) -> DenoiseCalls[Prediction]:
    call = DenoiserCall(lambda x, t, conditioning: denoise(x, t), x, t, Conditioning())
    return (yield [call])[0]


def run_sampler(
    sampler: Run, denoise: Denoise, count: int, on_step: Callable[[Step], bool | None] | None = None
) -> Tensor | None:
    """Run a sampler to its end.

    Args:
        sampler: A sampler's generator.
        denoise: The denoiser.
        count: Number of calls to expect, for `Step.count` and errors.
        on_step: Called with each step; False cancels the run.

    Returns:
        The latent (B, C, h, w), or None if the run was cancelled.

    Raises:
        NumericalError: At the first step whose prediction is not finite.
    """
    coroutine = sampler_coroutine(sampler, lambda x, t: _single_call(denoise, x, t), count, on_step)
    return drive(coroutine, lambda calls: [denoise(call.x, call.t) for call in calls])
