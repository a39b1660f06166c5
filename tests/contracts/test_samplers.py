"""The contract of every sampler: a file in diffuse/samplers is tested by being there.

The data are one Gaussian with a different mean and variance at each position, whose denoiser is exact:
E[z | x] = m + alpha s^2/(alpha^2 s^2 + sigma^2) (x - alpha m).
"""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sfumato.diffuse.sample import SeededNoise, Step, run, sample
from sfumato.diffuse.schedule import SCHEDULES, schedule
from sfumato.diffuse.timesteps import timesteps
from sfumato.registry import find, names
from sfumato.types import Prediction

SAMPLERS = {name: find("diffuse.samplers", name) for name in names("diffuse.samplers")}
SHAPE = (2, 2, 3)
MEAN = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(SHAPE)
STD = torch.linspace(0.4, 1.2, 12, dtype=torch.float64).reshape(SHAPE)
every = pytest.mark.parametrize("name", SAMPLERS)
everywhere = pytest.mark.parametrize("kind", SCHEDULES)


def gaussian(chosen, asked: list[float] | None = None) -> Callable[[Tensor, float], Prediction]:
    def denoise(x: Tensor, t: float) -> Prediction:
        if asked is not None:
            asked.append(t)
        alpha, sigma = (float(v) for v in chosen.at(t))
        mean, variance = MEAN.to(x.dtype), STD.to(x.dtype).square()
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def point(chosen) -> Callable[[Tensor, float], Prediction]:
    def denoise(x: Tensor, t: float) -> Prediction:
        alpha, sigma = (float(v) for v in chosen.at(t))
        return Prediction(MEAN.to(x.dtype).expand(x.shape), (x - alpha * MEAN.to(x.dtype)) / sigma)

    return denoise


def begin(name: str, chosen, times: list[float], seeds: list[int], dtype: torch.dtype = torch.float32):
    """A sampler's generator as `LatentDiffusion.generate` builds it."""
    noise = SeededNoise(SHAPE, seeds)
    x = (float(chosen.at(times[0])[1]) * noise()).to(dtype)
    return SAMPLERS[name](x, times, chosen, lambda: noise().to(dtype))


def finish(name: str, chosen, times: list[float], seeds: list[int], denoise, dtype: torch.dtype = torch.float32) -> Tensor:
    result = sample(begin(name, chosen, times, seeds, dtype), denoise, len(times) - 1)
    assert result is not None
    return result


def test_the_folder_is_the_registry() -> None:
    assert {"ddim", "ddpm"} <= SAMPLERS.keys()


@every
def test_a_sampler_is_a_generator_function_of_x_times_schedule_and_noise(name: str) -> None:
    sampler = SAMPLERS[name]
    inside = inspect.unwrap(sampler)
    assert inspect.isgeneratorfunction(inside) and inside.__name__ == name
    assert not inside.__closure__
    parameters = list(inspect.signature(sampler).parameters.values())
    assert [p.name for p in parameters[:4]] == ["x", "times", "schedule", "noise"]
    assert all(p.default is not p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters[4:])
    module = inspect.getmodule(inside)
    assert inside.__doc__ and module is not None and module.__doc__ and "arXiv" in module.__doc__  # says what it is, and whose
    assert not [k for k, v in vars(module).items() if isinstance(v, list | dict | set | Tensor) and not k.startswith("__")]  # no state


@every
@everywhere
def test_it_asks_once_a_step_at_the_times_it_was_given(name: str, kind: str) -> None:
    chosen = schedule(kind)
    times = timesteps("trailing", 7, chosen)
    steps = list(run(begin(name, chosen, times, [0, 1]), gaussian(chosen), 7))
    asked = [s.t for s in steps if isinstance(s, Step)]
    assert asked == times[:-1] and isinstance(steps[-1], Tensor)
    assert all(s.x.shape == (2, *SHAPE) for s in steps if isinstance(s, Step)) and steps[-1].shape == (2, *SHAPE)


@every
@everywhere
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_number_is_finite_from_t_one_to_t_zero(name: str, kind: str, steps: int) -> None:
    """`run` raises at the first NaN; the last step lands at t = 0 on what the denoiser said, without noise."""
    chosen = schedule(kind)
    for spacing in ("trailing", "linspace", "leading"):
        *asked, result = run(begin(name, chosen, timesteps(spacing, steps, chosen), [0]), gaussian(chosen), steps)
        assert isinstance(result, Tensor) and torch.isfinite(result).all() and len(asked) == steps
        assert isinstance(asked[-1], Step) and torch.allclose(result, asked[-1].prediction.x0, atol=1e-5)


@every
@everywhere
@pytest.mark.parametrize("steps", [1, 4])
def test_a_distribution_that_is_one_point_is_reached_exactly(name: str, kind: str, steps: int) -> None:
    chosen = schedule(kind)
    found = finish(name, chosen, timesteps("trailing", steps, chosen), [3, 4], point(chosen), torch.float64)
    assert torch.allclose(found, MEAN.expand(2, *SHAPE), atol=1e-8)


@every
@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_samples_have_the_mean_and_variance_of_the_data(name: str, kind: str) -> None:
    """2000 images, 12 positions, default options, 100 steps: within 5.5 standard errors, one of which the discretisation may use up.

    False alarms if the seeds were drawn anew: below 24 * 2 * P(N > 4.5) = 0.02 % a run.
    """
    chosen, count = schedule(kind), 2000
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn((count, *SHAPE), generator=generator, dtype=torch.float64)

    x = float(chosen.at(1.0)[1]) * draw()
    found = sample(SAMPLERS[name](x, timesteps("trailing", 100, chosen), chosen, draw), gaussian(chosen), 100)
    assert found is not None
    assert ((found.mean(0) - MEAN) / (STD / math.sqrt(count))).abs().max() < 5.5
    assert ((found.var(0) - STD.square()) / (STD.square() * math.sqrt(2 / count))).abs().max() < 5.5


@every
@everywhere
def test_two_interleaved_runs_are_two_separate_runs(name: str, kind: str) -> None:
    """Nothing is held outside the generator: other steps, seeds and data in between change no bit."""
    chosen, other = schedule(kind), schedule("flow")
    times, more = timesteps("trailing", 6, chosen), timesteps("trailing", 9, chosen)
    alone = finish(name, chosen, times, [0, 1], gaussian(chosen)), finish(name, other, more, [5], gaussian(other))
    runs = [run(begin(name, chosen, times, [0, 1]), gaussian(chosen), 6), run(begin(name, other, more, [5]), gaussian(other), 9)]
    latest: list = [None, None]
    for _ in range(10):
        for i, events in enumerate(runs):
            latest[i] = next(events, latest[i])
    assert torch.equal(latest[0], alone[0]) and torch.equal(latest[1], alone[1])


@every
def test_the_same_seed_gives_the_same_bits_and_another_does_not(name: str) -> None:
    chosen, times = schedule("cosine"), timesteps("trailing", 8, chosen)
    first, again = (finish(name, chosen, times, [0, 1], gaussian(chosen)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    assert not torch.allclose(finish(name, chosen, times, [9], gaussian(chosen))[0], first[0], atol=1e-3)


@every
def test_image_k_of_a_batch_is_the_image_of_its_seed_alone(name: str) -> None:
    chosen, times = schedule("scaled_linear"), timesteps("trailing", 8, chosen)
    together = finish(name, chosen, times, [10, 11, 12], gaussian(chosen))
    for k in range(3):
        assert torch.equal(finish(name, chosen, times, [10 + k], gaussian(chosen))[0], together[k])


@every
def test_tensors_that_come_in_are_not_written_to(name: str) -> None:
    chosen, times = schedule("cosine"), timesteps("trailing", 4, chosen)
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    start, given = x.clone(), []
    noise = torch.ones(1, *SHAPE)

    def denoise(x: Tensor, t: float) -> Prediction:
        found = gaussian(chosen)(x, t)
        given.append((x, x.clone(), found, found.x0.clone(), found.eps.clone()))
        return found

    sample(SAMPLERS[name](x, times, chosen, lambda: noise), denoise, 4)
    assert torch.equal(x, start) and torch.equal(noise, torch.ones(1, *SHAPE))
    for seen, before, found, x0, eps in given:
        assert torch.equal(seen, before) and torch.equal(found.x0, x0) and torch.equal(found.eps, eps)


@every
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(name: str, kind: str, dtype: torch.dtype) -> None:
    chosen = schedule(kind)
    for event in run(begin(name, chosen, timesteps("trailing", 3, chosen), [0], dtype), gaussian(chosen), 3):
        assert (event.x if isinstance(event, Step) else event).dtype == dtype


@every
@everywhere
def test_a_run_may_end_before_t_zero(name: str, kind: str) -> None:
    """The last time is where it ends: at s the data's marginal has mean alpha_s m and variance alpha_s^2 s^2 + sigma_s^2."""
    chosen, times = schedule(kind), [1.0, 0.8, 0.6]
    assert len(list(run(begin(name, chosen, times, [0]), gaussian(chosen), 2))) == 3
    alpha, sigma = (float(v) for v in chosen.at(0.6))
    count = 1500
    found = finish(name, chosen, times, list(range(count)), point(chosen), torch.float64)
    error = (found.mean(0) - alpha * MEAN) / (sigma / math.sqrt(count))
    # the spread is pooled over the 12 positions; 5 standard errors, 13 comparisons: 7e-6 false alarms
    assert error.abs().max() < 5
    pooled = float((found - alpha * MEAN).square().mean())
    assert abs(pooled / sigma**2 - 1) < 5 * math.sqrt(2 / (12 * count))


@every
def test_cancelling_closes_it(name: str) -> None:
    chosen = schedule("flow")
    sampler = begin(name, chosen, timesteps("trailing", 9, chosen), [0])
    asked: list[float] = []
    assert sample(sampler, gaussian(chosen, asked), 9, lambda step: step.index < 2) is None
    assert len(asked) == 3 and next(sampler, "closed") == "closed"
