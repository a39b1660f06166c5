"""The contract of every sampler: a file in diffuse/samplers is tested by being there, against what
its `Traits` promise.

The data are one Gaussian with a different mean and variance at each position, whose denoiser is
exact: E[z | x] = m + alpha s^2/(alpha^2 s^2 + sigma^2) (x - alpha m); and so is the flow through x,
which ends at m + s (x - alpha m)/sqrt(alpha^2 s^2 + sigma^2): what a network distilled for
consistency gives.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, Step, iterate_steps, run_sampler
from sfumato.diffuse.samplers import calls, traits_of
from sfumato.diffuse.schedule import SCHEDULES, Schedule, schedule
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR
from sfumato.diffuse.timesteps import timesteps
from sfumato.prediction import LinearPrediction
from sfumato.registry import find, names
from sfumato.types import Prediction

SAMPLERS = {name: find("diffuse.samplers", name) for name in names("diffuse.samplers")}
TRAITS = {name: traits_of(sampler) for name, sampler in SAMPLERS.items()}
DOWN = [name for name in SAMPLERS if not TRAITS[name].inverts]
UP = [name for name in SAMPLERS if TRAITS[name].inverts]
KINDS = {name: schedule(name) for name in SCHEDULES}
KINDS |= {
    "zero terminal SNR": ZeroTerminalSNR(schedule("scaled_linear")),
    "shifted flow": Shifted(schedule("flow")),
}
SHAPE = (2, 2, 3)
MEAN = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(SHAPE)
STD = torch.linspace(0.4, 1.2, 12, dtype=torch.float64).reshape(SHAPE)
every = pytest.mark.parametrize("name", DOWN)
everywhere = pytest.mark.parametrize("kind", KINDS)


def gaussian(
    chosen: Schedule, evaluated: list[float] | None = None, network: str = "denoiser"
) -> Callable[[Tensor, float], Prediction]:
    def denoise(x: Tensor, t: float) -> Prediction:
        if evaluated is not None:
            evaluated.append(t)
        alpha, sigma = chosen.point(t)
        mean, std = MEAN.to(x.dtype), STD.to(x.dtype)
        total = alpha**2 * std.square() + sigma**2
        x0 = mean + (
            alpha * std.square() / total if network == "denoiser" else std / total.sqrt()
        ) * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def point(chosen: Schedule) -> Callable[[Tensor, float], Prediction]:
    def denoise(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        return Prediction(MEAN.to(x.dtype).expand(x.shape), (x - alpha * MEAN.to(x.dtype)) / sigma)

    return denoise


def wavy(chosen: Schedule) -> Callable[[Tensor, float], Prediction]:
    """The exact denoiser of a mixture of two points' neighbourhoods in each position: smooth, and
    not linear in x.
    """

    def denoise(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        # z = +-1 + 0.6 n: E[z|x] has a tanh for which of the two
        total = (alpha * 0.6) ** 2 + sigma**2
        side = torch.tanh(alpha * x / total)
        x0 = side + alpha * 0.36 / total * (x - alpha * side)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def begin(
    name: str,
    chosen: Schedule,
    times: list[float],
    seeds: list[int],
    dtype: torch.dtype = torch.float32,
):
    """A sampler's generator as `LatentDiffusion.generate` builds it."""
    noise = SeededNoise(SHAPE, seeds)
    x = (math.hypot(*chosen.point(times[0])) * noise()).to(dtype)
    return SAMPLERS[name](x, times, chosen, lambda: noise().to(dtype))


def finish(
    name: str,
    chosen: Schedule,
    times: list[float],
    seeds: list[int],
    denoise,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    result = run_sampler(begin(name, chosen, times, seeds, dtype), denoise, len(times) - 1)
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
    assert all(
        p.default is not p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        for p in parameters[4:]
    )
    module = inspect.getmodule(inside)
    # names the method and its source
    assert inside.__doc__ and module is not None and module.__doc__ and "arXiv" in module.__doc__
    # no state
    assert not [
        k
        for k, v in vars(module).items()
        if isinstance(v, list | dict | set | Tensor) and not k.startswith("__")
    ]


@every
@everywhere
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_network_is_evaluated_at_the_times_as_often_as_calls_counts(
    name: str, kind: str, steps: int
) -> None:
    """The network is evaluated first at the first time, and at each time of the list.

    No time is 0 or below, or above 1; `calls` counts the evaluations without a network.
    """
    chosen = KINDS[kind]
    times = timesteps("trailing", steps, chosen)
    output = list(iterate_steps(begin(name, chosen, times, [0, 1]), gaussian(chosen), steps))
    evaluated = [s.t for s in output if isinstance(s, Step)]
    assert (
        evaluated[0] == times[0]
        and all(0 < t <= 1 for t in evaluated)
        and isinstance(output[-1], Tensor)
    )
    assert len(evaluated) == calls(SAMPLERS[name], times, chosen)
    assert all(s.x.shape == (2, *SHAPE) for s in output if isinstance(s, Step)) and output[
        -1
    ].shape == (2, *SHAPE)
    if name not in ("restart", "edm"):  # they go up again, and edm asks above the times
        assert set(times[:-1]) <= set(evaluated) and len(evaluated) <= TRAITS[name].calls * steps
    if TRAITS[name].calls == 1:
        assert evaluated == times[:-1]


@every
@everywhere
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_number_is_finite_from_t_one_to_t_zero(name: str, kind: str, steps: int) -> None:
    """`run` raises at the first NaN.

    One step gives the prediction at t = 1, whatever the sampler: no noise is left, none is added.
    """
    chosen = KINDS[kind]
    for spacing in ("trailing", "linspace", "leading", "karras", "log_snr"):
        *evaluated, result = iterate_steps(
            begin(name, chosen, timesteps(spacing, steps, chosen), [0]), gaussian(chosen), steps
        )
        assert (
            isinstance(result, Tensor)
            and torch.isfinite(result).all()
            and isinstance(evaluated[-1], Step)
        )
        # The data lie within 1.5 + 1.2 * 5. Slopes overshoot in 2 or 3 steps, as published; not in
        # 50.
        assert steps in (2, 3) or float(result.abs().max()) < 15, spacing
        if steps == 1:
            # lcm: c_skip
            assert len(evaluated) == 1 and (
                name == "lcm" or torch.allclose(result, evaluated[-1].prediction.x0, atol=1e-4)
            )


@every
@everywhere
@pytest.mark.parametrize("steps", [1, 4])
def test_a_distribution_that_is_one_point_is_reached_exactly(
    name: str, kind: str, steps: int
) -> None:
    chosen = KINDS[kind]
    output = finish(
        name, chosen, timesteps("trailing", steps, chosen), [3, 4], point(chosen), torch.float64
    )
    assert torch.allclose(output, MEAN.expand(2, *SHAPE), atol=1e-8)


@every
@pytest.mark.parametrize("kind", ["cosine", "flow", "edm", "zero terminal SNR"])
def test_samples_have_the_mean_and_variance_of_the_data(name: str, kind: str) -> None:
    """2000 images, 12 positions, 150 steps: within 5.5 standard errors, one of which the
    discretisation may use up.

    False alarms if the seeds were drawn anew: below 24 * 2 * P(N > 4.5) = 0.02 % a run. Samplers of
    consistency models are given the exact flow's end, the others the exact denoiser.
    """
    chosen, count = KINDS[kind], 2000
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn((count, *SHAPE), generator=generator, dtype=torch.float64)

    alpha, sigma = chosen.point(1.0)
    # the exact marginal: only the sampler is measured
    x = alpha * (MEAN + STD * draw()) + sigma * draw()
    times = (
        timesteps("trailing", 150, chosen) if kind != "edm" else timesteps("karras", 150, chosen)
    )
    sampler = SAMPLERS[name](x, times, chosen, draw, **TRAITS[name].exact)
    output = run_sampler(sampler, gaussian(chosen, network=TRAITS[name].network_type), 150)
    assert output is not None
    mean = (output.mean(0) - MEAN) / (STD / math.sqrt(count))
    variance = (output.var(0) - STD.square()) / (STD.square() * math.sqrt(2 / count))
    assert mean.abs().max() < 5.5 and variance.abs().max() < 5.5, (
        mean.abs().max(),
        variance.abs().max(),
    )


@every
def test_noise_is_drawn_by_the_traits(name: str) -> None:
    chosen, drawn = KINDS["flow"], []

    def draw() -> Tensor:
        drawn.append(1)
        return torch.zeros(1, *SHAPE)

    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    run_sampler(
        SAMPLERS[name](x, timesteps("trailing", 9, chosen), chosen, draw), gaussian(chosen), 9
    )
    assert bool(drawn) == TRAITS[name].noise


def graded(steps: int, order: int = 1) -> list[float]:
    """Times from 0.95 to 0.15 in equal steps h; before them steps that grow from h^(order/2), each
    half as long again as the last.
    """
    h, times = 0.8 / steps, [0.95]
    short = h ** (order / 2)
    while order > 1 and short < h:
        times.append(times[-1] - short)
        short *= 1.5
    last = times[-1]
    return [*times, *(last + (0.15 - last) * i / steps for i in range(1, steps + 1))]


@cache
def solved(name: str, kind: str, times: tuple[float, ...]) -> Tensor:
    """The end of a deterministic run from one fixed x at times[0]."""
    chosen = KINDS[kind]
    x = math.hypot(*chosen.point(0.95)) * torch.randn(
        (16, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def never() -> Tensor:
        raise AssertionError("a deterministic run asked for noise")

    output = run_sampler(SAMPLERS[name](x, times, chosen, never), wavy(chosen), 1)
    assert output is not None
    return output


@every
@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_deterministic_ones_have_the_order_that_they_promise(name: str, kind: str) -> None:
    """Slope of log error over log steps, within 0.3, from t = 0.95 to t = 0.15 in equal steps,
    against DPM-Solver-3 in 1000 steps.

    A multistep method of order p needs p starting values of that order; it begins with lower
    orders, so it is given short steps at first, where these cost nothing.
    """
    promised = TRAITS[name]
    if promised.noise:
        pytest.skip("draws noise: its distribution is tested instead")
    reference, errors, counts = (
        solved("dpm_solver_3", kind, tuple(graded(1000))),
        [],
        [90, 135, 200, 300],
    )
    for n in counts:
        times = tuple(graded(n, promised.order if promised.calls == 1 else 1))
        errors.append(float((solved(name, kind, times) - reference).square().mean().sqrt()))
    slope = -stats.linregress(np.log(counts), np.log(errors)).slope
    assert slope > promised.order - 0.3, (slope, errors)
    assert slope < promised.order + 0.3, (slope, errors)


@every
@pytest.mark.parametrize("kind", ["cosine", "edm"])
def test_two_interleaved_runs_are_two_separate_runs(name: str, kind: str) -> None:
    """Nothing is held outside the generator: other steps, seeds and data in between change no
    bit.
    """
    chosen, other = KINDS[kind], schedule("flow")
    times, more = timesteps("trailing", 6, chosen), timesteps("trailing", 9, chosen)
    alone = (
        finish(name, chosen, times, [0, 1], gaussian(chosen)),
        finish(name, other, more, [5], gaussian(other)),
    )
    runs = [
        iterate_steps(begin(name, chosen, times, [0, 1]), gaussian(chosen), 6),
        iterate_steps(begin(name, other, more, [5]), gaussian(other), 9),
    ]
    latest: list = [None, None]
    while any(not isinstance(output, Tensor) for output in latest):
        for i, events in enumerate(runs):
            latest[i] = next(events, latest[i])
    assert torch.equal(latest[0], alone[0]) and torch.equal(latest[1], alone[1])


@every
def test_the_same_seed_gives_the_same_bits_and_another_does_not(name: str) -> None:
    chosen = KINDS["cosine"]
    times = timesteps("trailing", 8, chosen)
    first, again = (finish(name, chosen, times, [0, 1], gaussian(chosen)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    assert not torch.allclose(
        finish(name, chosen, times, [9], gaussian(chosen))[0], first[0], atol=1e-3
    )


@pytest.mark.invariance
@every
def test_image_k_of_a_batch_is_the_image_of_its_seed_alone(name: str) -> None:
    chosen = KINDS["scaled_linear"]
    times = timesteps("trailing", 8, chosen)
    together = finish(name, chosen, times, [10, 11, 12], gaussian(chosen))
    for k in range(3):
        assert torch.equal(finish(name, chosen, times, [10 + k], gaussian(chosen))[0], together[k])


@every
@everywhere
def test_an_answer_that_is_worked_out_late_is_the_pair_that_it_stands_for(
    name: str, kind: str
) -> None:
    """A network's output is kept as it is (`LinearPrediction`); the same run with x0 and eps
    themselves ends at the same place.
    """
    chosen = KINDS[kind]
    process, times, late = (
        Process(chosen, parameterization("v")),
        timesteps("trailing", 5, chosen),
        [],
    )

    def denoise(x: Tensor, t: float) -> Prediction:
        pair = wavy(chosen)(x, t)
        late.append(process.split(x, process.target(pair.x0, pair.eps, t), t))
        return late[-1]

    output = finish(name, chosen, times, [0, 1], denoise, torch.float64)
    assert all(isinstance(p, LinearPrediction) for p in late)
    expected = finish(name, chosen, times, [0, 1], wavy(chosen), torch.float64)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


@every
def test_tensors_that_come_in_are_not_written_to(name: str) -> None:
    chosen = KINDS["cosine"]
    times = timesteps("trailing", 4, chosen)
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    start, records = x.clone(), []
    noise = torch.ones(1, *SHAPE)

    def denoise(x: Tensor, t: float) -> Prediction:
        output = gaussian(chosen)(x, t)
        records.append((x, x.clone(), output, output.x0.clone(), output.eps.clone()))
        return output

    run_sampler(SAMPLERS[name](x, times, chosen, lambda: noise), denoise, 4)
    assert torch.equal(x, start) and torch.equal(noise, torch.ones(1, *SHAPE))
    for seen, before, output, x0, eps in records:
        assert (
            torch.equal(seen, before)
            and torch.equal(output.x0, x0)
            and torch.equal(output.eps, eps)
        )


@every
@pytest.mark.parametrize("kind", ["cosine", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(name: str, kind: str, dtype: torch.dtype) -> None:
    chosen = KINDS[kind]
    for event in iterate_steps(
        begin(name, chosen, timesteps("trailing", 3, chosen), [0], dtype), gaussian(chosen), 3
    ):
        assert (event.x if isinstance(event, Step) else event).dtype == dtype


@every
@everywhere
def test_a_run_may_end_before_t_zero(name: str, kind: str) -> None:
    """The last time is where it ends: for a point at m the marginal at s has mean alpha_s m and
    variance sigma_s^2.
    """
    chosen, times = KINDS[kind], [1.0, 0.8, 0.6]
    alpha, sigma = chosen.point(0.6)
    count = 1500
    noise = SeededNoise(SHAPE, list(range(count)))
    # the point's own marginal at t = 1
    x = chosen.point(1.0)[0] * MEAN + chosen.point(1.0)[1] * noise().double()
    output = run_sampler(
        SAMPLERS[name](x, times, chosen, lambda: noise().double()), point(chosen), 2
    )
    assert output is not None
    error = (output.mean(0) - alpha * MEAN) / (sigma / math.sqrt(count))
    # the spread is pooled over the 12 positions; 5 standard errors, 13 comparisons: 7e-6 false
    # alarms
    assert error.abs().max() < 5
    pooled = float((output - alpha * MEAN).square().mean())
    assert abs(pooled / sigma**2 - 1) < 5 * math.sqrt(2 / (12 * count))


@every
def test_cancelling_closes_it(name: str) -> None:
    chosen = schedule("flow")
    sampler = begin(name, chosen, timesteps("trailing", 9, chosen), [0])
    evaluated: list[float] = []
    assert run_sampler(sampler, gaussian(chosen, evaluated), 9, lambda step: step.index < 2) is None
    assert len(evaluated) == 3 and next(sampler, "closed") == "closed"


@pytest.mark.parametrize("kind", ["cosine", "flow"])
@pytest.mark.parametrize("steps", [3, 4, 7])
def test_tcd_without_noise_is_ddim_whatever_the_steps(kind: str, steps: int) -> None:
    """Times off the table's grid are not rounded away: eta 0 draws nothing."""
    chosen, x = (
        KINDS[kind],
        torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    times = timesteps("trailing", steps, chosen)

    def never() -> Tensor:
        raise AssertionError("eta 0 asked for noise")

    output = [
        run_sampler(SAMPLERS[n](x, times, chosen, never, **o), gaussian(chosen), 1)
        for n, o in (("tcd", {"eta": 0.0}), ("ddim", {}))
    ]
    assert torch.equal(output[0], output[1])


def test_half_of_the_quadratic_term_costs_an_order() -> None:
    """DPM-Solver++(3M) as its authors, k-diffusion and diffusers have it (`published=True`) is of
    order two.
    """
    chosen, slopes = KINDS["cosine"], []
    x = math.hypot(*chosen.point(0.95)) * torch.randn(
        (16, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    reference, counts = solved("dpm_solver_3", "cosine", tuple(graded(1000))), [90, 135, 200, 300]
    for published in (False, True):
        ends = [
            run_sampler(
                SAMPLERS["dpmpp_3m"](x, graded(n, 3), chosen, lambda: x, published=published),
                wavy(chosen),
                1,
            )
            for n in counts
        ]
        errors = [
            float((end - reference).square().mean().sqrt()) for end in ends if end is not None
        ]
        slopes.append(-stats.linregress(np.log(counts), np.log(errors)).slope)
    assert slopes[0] > 2.7 and slopes[1] < 2.4, slopes


@pytest.mark.parametrize("name", UP)
@everywhere
def test_upward_ones_end_at_the_first_time_and_come_back(name: str, kind: str) -> None:
    """From a clean latent to noise; with enough iterations DDIM makes the very latent again from
    it, also from alpha = 0.
    """
    chosen = KINDS[kind]
    z = MEAN + STD * torch.randn(
        (3, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    times = timesteps(
        "linspace", 12, chosen, start=1.0 if "flow" in kind else 0.9 if kind != "edm" else 0.6
    )
    evaluated: list[float] = []
    x = run_sampler(
        SAMPLERS[name](z, times, chosen, lambda: z, iterations=60),
        gaussian(chosen, evaluated),
        12 * 60,
    )
    assert x is not None and evaluated[-1] == times[0] and min(evaluated) == times[-2]
    again = run_sampler(SAMPLERS["ddim"](x, times, chosen, lambda: z), gaussian(chosen), 12)
    assert again is not None and float((again - z).abs().max()) < 1e-6
    rough = run_sampler(SAMPLERS[name](z, times, chosen, lambda: z), gaussian(chosen), 12)
    assert (
        rough is not None and 1e-6 < float((rough - x).abs().max()) < 3 * chosen.point(times[0])[1]
    )
