"""Runs a sampler against a denoiser: one step at a time, with previews, cancellation and a check that every number is finite."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import NumericalError
from sfumato.types import Prediction

Denoise = Callable[[Tensor, float], Prediction]
"""(x, t) -> Prediction: a denoiser with its conditioning and guidance already inside."""


@dataclass(frozen=True)
class Step:
    """One network call of a run: index of count (from 0), time, the noisy latent that was asked about and the prediction there."""

    index: int
    count: int
    t: float
    x: Tensor
    prediction: Prediction


class SeededNoise:
    """Standard-normal tensors in which image k is drawn from its own generator, seeded with seeds[k].

    Drawn on the CPU in float32, so that image k of a batch can be made again alone, on any device.
    """

    def __init__(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.shape, self.device = tuple(shape), device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Float[Tensor, "B C h w"]:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def check_finite(value: Tensor, stage: str) -> None:
    """`NumericalError` naming the stage and dtype if any number is NaN or infinite."""
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise NumericalError(
            f"{bad} of {value.numel()} numbers are NaN or infinite in {stage} ({str(value.dtype).removeprefix('torch.')}): nothing was written; "
            "try float32, or other weights"
        )


def run(sampler: Generator[tuple[Tensor, float], Prediction, Tensor], denoise: Denoise, count: int) -> Iterator[Step | Tensor]:
    """Yields a `Step` after each network call and, last, the final latent. Stop iterating to cancel: nothing is left behind.

    count: the number of calls to expect, for progress. Raises `NumericalError` at the first step whose output is not finite.
    """
    try:
        x, t = next(sampler)
        index = 0
        while True:
            prediction = denoise(x, t)
            for part in (prediction.x0, prediction.eps):
                check_finite(part, f"step {index + 1} of {count} (t = {t:.4g})")
            yield Step(index, count, t, x, prediction)
            index += 1
            x, t = sampler.send(prediction)
    except StopIteration as stop:
        check_finite(stop.value, "the last step")
        yield stop.value
    finally:
        sampler.close()


def sample(
    sampler: Generator[tuple[Tensor, float], Prediction, Tensor],
    denoise: Denoise,
    count: int,
    on_step: Callable[[Step], bool | None] | None = None,
) -> Tensor | None:
    """Runs to the end and returns the latent; `on_step` sees every step and cancels the run by returning False (then: None)."""
    for event in run(sampler, denoise, count):
        if isinstance(event, Tensor):
            return event
        if on_step is not None and on_step(event) is False:
            return None
    return None
