"""Wrappers against their promises.

A known region stays known, windows add up, features are reused and never mixed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.models import random_network
from helpers.tensors import normal
from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, drive, gather
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, Step, sampler_coroutine
from sfumato.diffuse.samplers import traits_of
from sfumato.diffuse.schedule import SCHEDULES, Schedule, schedule
from sfumato.diffuse.timesteps import timesteps
from sfumato.errors import UserError
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.moment import Moment
from sfumato.predict.guidance.rules.linear import Linear
from sfumato.predict.guidance.weights.constant import Constant
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.predict.wrappers.feature_cache import feature_cache
from sfumato.predict.wrappers.known_region import finish, known_region, start
from sfumato.predict.wrappers.multidiffusion import _windows, multidiffusion
from sfumato.registry import find, names
from sfumato.types import Conditioning, Prediction

SAMPLERS = {name: find("diffuse.samplers", name) for name in names("diffuse.samplers")}
DOWNWARD = [name for name, sampler in SAMPLERS.items() if not traits_of(sampler).inverts]
FLOW = schedule("flow")


def denoise_fn(predict: Callable[[Tensor, float], Prediction]) -> DenoiseFn:
    """A denoiser that needs no conditioning, as questions."""

    def ask(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        return (
            yield [DenoiserCall(lambda x, t, conditioning: predict(x, t), x, t, Conditioning())]
        )[0]

    return ask


# ---- known region --------------------------------------------------------------------------------


def tangled(chosen: Schedule) -> DenoiseFn:
    """A denoiser in which every cell depends on its neighbours, bounded so that nothing
    diverges.
    """

    def predict(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        x0 = torch.tanh((x + x.roll(1, 3) - x.roll(1, 2)) / math.hypot(alpha, sigma))
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise_fn(predict)


# LCM's boundary condition, c_skip x + c_out z, is made for timesteps in 0..1000. pndm's first step
# multiplies the rounding of eps by alpha_s/alpha_t three times over, hundreds each where a cosine
# begins: there it does not reach even a point mass in float32.
ELSEWHERE = {("lcm", "ve"), ("lcm", "edm"), ("pndm", "cosine")}


@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in product(DOWNWARD, SCHEDULES) if pair not in ELSEWHERE]
)
def test_the_known_region_is_z_with_the_right_noise_at_every_level_and_z_at_the_end(
    name: str, kind: str
) -> None:
    """Without added noise: alpha z + sigma times the run's first noise, to rounding.

    With it: noise of mean 0 and variance 1. 2592 known cells, 5.5 standard errors. LCM gives c_skip
    x + c_out z instead of z, with a c_skip of up to 1e-3 at these levels.
    """
    chosen, z, first = (
        schedule(kind),
        normal(2, 3, 24, 24, seed=1, dtype=torch.float64),
        normal(2, 3, 24, 24, seed=2, dtype=torch.float64),
    )
    mask = torch.zeros(1, 1, 24, 24, dtype=torch.float64)
    mask[:, :, :, :18] = 1
    times, generator, steps = timesteps("trailing", 8, chosen), torch.Generator().manual_seed(3), []
    x = start(first, z, mask, chosen.point, times[0])
    run = SAMPLERS[name](
        x, times, chosen, lambda: torch.randn(first.shape, generator=generator, dtype=torch.float64)
    )
    result = drive(
        sampler_coroutine(
            run, known_region(tangled(chosen), z, mask, chosen.point), 8, steps.append
        ),
        evaluate_calls,
    )
    inside, tolerance = mask.bool().expand_as(z), 1e-8
    for step in steps:
        alpha, sigma = chosen.point(step.t)
        if not traits_of(SAMPLERS[name]).noise:
            assert ((step.x - alpha * z - sigma * first)[inside]).abs().max() < tolerance * (
                alpha + sigma
            )
        else:
            noise = ((step.x - alpha * z) / sigma)[inside]
            assert abs(float(noise.mean())) < 5.5 / math.sqrt(len(noise))
            assert abs(float(noise.var()) - 1) < 5.5 * math.sqrt(2 / len(noise))
        assert torch.equal(step.prediction.x0[inside], z[inside])
    assert ((result - z)[inside]).abs().max() < (1e-3 if name == "lcm" else tolerance)
    whole = finish(result, z, mask)
    assert torch.equal(whole[inside], z[inside]) and torch.equal(whole[~inside], result[~inside])
    assert (result - z)[~inside].abs().max() > 0.1


def test_an_empty_known_region_changes_no_start_and_a_full_one_ends_at_z() -> None:
    noise, z = normal(2, 1, 3, 3), normal(1, 1, 3, 3, seed=1)
    for t in (1.0, 0.4):
        alpha, sigma = FLOW.point(t)
        assert torch.equal(
            start(noise, z, torch.zeros(1, 1, 3, 3), FLOW.point, t),
            math.hypot(alpha, sigma) * noise,
        )
        assert torch.equal(
            start(noise, z, torch.ones(1, 1, 3, 3), FLOW.point, t), alpha * z + sigma * noise
        )
    assert torch.equal(finish(noise, z, torch.ones(2, 1, 3, 3)), z.expand(2, -1, -1, -1))


def test_a_soft_mask_blends_the_predictions_and_they_still_add_up_to_x() -> None:
    x, z, mask = (
        normal(2, 3, 4, 4, dtype=torch.float64),
        normal(2, 3, 4, 4, seed=1, dtype=torch.float64),
        torch.rand(2, 1, 4, 4).double(),
    )
    plain = drive(tangled(FLOW)(x, 0.3), evaluate_calls)
    result = drive(known_region(tangled(FLOW), z, mask, FLOW.point)(x, 0.3), evaluate_calls)
    assert torch.allclose(result.x0, mask * z + (1 - mask) * plain.x0, atol=1e-12)
    assert torch.allclose(0.7 * result.x0 + 0.3 * result.eps, x, atol=1e-12)


def two_pixels(rho: float, chosen: Schedule) -> DenoiseFn:
    """The exact denoiser of two cells of variance 1 and correlation rho."""
    covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def predict(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        gain = (
            alpha
            * covariance
            @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
        )
        x0 = x @ gain.T
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise_fn(predict)


def inpainted(
    rho: float, z: Tensor, noise: Tensor, sampler: str, steps: int, kind: str, **options: Any
) -> Tensor:
    chosen, mask, generator = (
        schedule(kind),
        torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64),
        torch.Generator().manual_seed(5),
    )
    times = timesteps("trailing", steps, chosen)
    x = start(noise, z, mask, chosen.point, times[0])
    run = SAMPLERS[sampler](
        x,
        times,
        chosen,
        lambda: torch.randn(noise.shape, generator=generator, dtype=torch.float64),
        **options,
    )
    return finish(
        drive(
            sampler_coroutine(
                run, known_region(two_pixels(rho, chosen), z, mask, chosen.point), steps
            ),
            evaluate_calls,
        ),
        z,
        mask,
    )


@pytest.mark.parametrize("kind", ["flow", "cosine"])
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_error_of_a_run_without_added_noise(kind: str, rho: float) -> None:
    """x_2 is linear in z_1, the known noise n_1 and its own n_2.

    The coefficients solve a linear ODE in r = sigma/alpha: with D(r) = (1 + r^2)^2 - rho^2, those
    of z_1 and n_1 are rho D(0)^1/4 times the integrals of r D^-5/4 and r^2 D^-5/4, that of n_2 is
    D(0)^1/4. The exact answer is rho z_1 with variance 1 - rho^2: right for rho = 0 only.
    """
    z = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1) * torch.ones(
        1, 1, 1, 2, dtype=torch.float64
    )
    noise = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).reshape(
        3, 1, 1, 2
    )
    result = inpainted(rho, z, noise, "ddim", 1000, kind)[:, 0, 0, 1].tolist()
    angle = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)[1:-1]  # r = tan(angle)
    r, width = angle.tan(), (math.pi / 2 / 20000) / angle.cos().square()
    below, corner = ((1 + r.square()).square() - rho**2) ** -1.25, (1 - rho**2) ** 0.25
    expected = [rho * corner * float((below * r**k * width).sum()) for k in (1, 2)] + [corner]
    assert result == pytest.approx(expected, abs=5e-3)
    slope, spread = result[0], result[1] ** 2 + result[2] ** 2
    if rho:
        # the docstring's: 0.8 and 0.36 would be exact
        assert abs(slope - 0.343) < 0.005 and abs(spread - 0.67) < 0.01
    else:
        assert abs(slope) < 1e-9 and abs(spread - 1) < 0.01


@pytest.mark.parametrize(
    ("sampler", "rho", "slope", "spread"),
    [
        ("ddpm", 0.8, 0.5, 0.52),
        ("ddpm", 0.0, 0.0, 0.97),
        ("edm", 0.8, 0.69, 0.43),
        ("edm", 0.0, 0.0, 1.0),
        ("dpmpp_2m_sde", 0.8, 0.5, 0.54),
    ],
)
def test_noise_on_the_way_brings_it_nearer(
    sampler: str, rho: float, slope: float, spread: float
) -> None:
    """The limit of ancestral samplers is (1 - sqrt(1 - rho^2))/rho; 20,000 draws, 100 steps, 4
    standard errors and 0.02 for the steps.

    The docstring's figures; 0.8 with 0.36 would be exact.
    """
    z, noise = (
        normal(20_000, 1, 1, 2, dtype=torch.float64),
        normal(20_000, 1, 1, 2, seed=1, dtype=torch.float64),
    )
    exact, result = inpainted(rho, z, noise, sampler, 100, "cosine")[:, 0, 0].T
    measured = float((exact * result).mean() / exact.square().mean())
    assert abs(measured - slope) < 0.02 + 4 / math.sqrt(20_000)
    assert abs(float((result - measured * exact).var()) - spread) < 0.02 + 4 * spread * math.sqrt(
        2 / 20_000
    )


@pytest.mark.parametrize(
    ("z", "mask", "complaint"),
    [
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 5), "mask of shape"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4), "mask of shape"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(3, 1, 4, 4), "mask of shape"),
        (torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), 1.5), r"expected \[0, 1\]"),
        (torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), math.nan), r"expected \[0, 1\]"),
        (torch.full((1, 2, 4, 4), math.inf), torch.zeros(1, 1, 4, 4), "expected finite"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(1, 1, 4, 4), "for latents of shape"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 4, 4), "for latents of shape"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), "for latents of shape"),
    ],
)
def test_a_region_that_does_not_fit_is_refused(z: Tensor, mask: Tensor, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        drive(
            known_region(tangled(FLOW), z, mask, FLOW.point)(torch.zeros(3, 2, 4, 4), 0.5),
            evaluate_calls,
        )


def test_without_noise_nothing_is_evaluated() -> None:
    z = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="0 has no noise to predict"):
        drive(
            known_region(denoise_fn(lambda x, t: Prediction(x, x)), z, z, FLOW.point)(z, 0.0),
            evaluate_calls,
        )


# ---- large canvas --------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_windows_leave_no_gap_and_end_flush_with_the_edge(data: st.DataObject) -> None:
    length, size, around = (
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 40)),
        data.draw(st.booleans()),
    )
    stride = data.draw(st.integers(1, size))
    windows = _windows(length, size, stride, around)
    assert sorted(set(torch.cat(windows).tolist())) == list(range(length))
    assert all(len(w) == min(size, length) == len(set(w.tolist())) for w in windows)
    starts = [int(w[0]) for w in windows]
    assert starts == sorted(set(starts)) and (around or int(windows[-1][-1]) == length - 1)


def pixelwise(x: Tensor, t: float) -> Prediction:
    return Prediction(0.3 * x, 0.7 * x)


@pytest.mark.parametrize("weights", ["uniform", "smooth"])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(4, 3), ((4, 6), (2, 5)), (4, 4), (3, 1)])
def test_a_denoiser_of_single_cells_gives_the_same_on_the_whole(
    weights: str, around: bool, size: Any, stride: Any
) -> None:
    x = normal(2, 3, 9, 14)
    result = drive(
        multidiffusion(denoise_fn(pixelwise), size, stride, weights, around)(x, 0.5), evaluate_calls
    )
    assert torch.allclose(result.x0, 0.3 * x, atol=1e-6) and torch.allclose(
        result.eps, 0.7 * x, atol=1e-6
    )
    # the first of each four cells lie in one window each: all its own
    if (size, stride, around) == (4, 4, False):
        assert torch.equal(result.x0[:, :, :4, :8], (0.3 * x)[:, :, :4, :8])


@pytest.mark.parametrize("weights", ["uniform", "smooth"])
@pytest.mark.parametrize("around", [False, True])
def test_the_result_is_the_weighted_average_of_the_windows(weights: str, around: bool) -> None:
    """Eq. 5 cell by cell, with windows that disagree: each answers with its number."""
    count = iter(range(100))
    x = torch.zeros(1, 1, 5, 9)
    result = drive(
        multidiffusion(
            denoise_fn(lambda x, t: Prediction(x + (n := next(count)), x - n)),
            (3, 4),
            (2, 3),
            weights,
            around,
        )(x, 0.5),
        evaluate_calls,
    )
    columns = [
        [c, (c + 1) % 9, (c + 2) % 9, (c + 3) % 9] for c in ((0, 3, 6) if around else (0, 3, 5))
    ]
    profile = [
        [1.0] * n
        if weights == "uniform"
        else [math.sin(math.pi * (i + 0.5) / n) ** 2 for i in range(n)]
        for n in (3, 4)
    ]
    top, bottom = torch.zeros(5, 9), torch.zeros(5, 9)
    for n, (row, cells) in enumerate(product((0, 2), columns)):
        for (i, a), (j, b) in product(enumerate(profile[0]), enumerate(profile[1])):
            top[row + i, cells[j]] += a * b * n
            bottom[row + i, cells[j]] += a * b
    assert torch.allclose(result.x0[0, 0], top / bottom, atol=1e-5) and torch.allclose(
        result.eps, -result.x0, atol=1e-6
    )


class Pictures(nn.Module):
    """y = sin(x + concat) + a number for each class, position-independent.

    It records the sizes of its calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append(tuple(x.shape))
        y = x if cond.concat is None else x + cond.concat
        return (
            y.sin()
            + (0 if cond.vector is None else cond.vector @ self.classes)[:, None, None, None]
        )


def guided(
    denoiser: Denoiser, conditioning: Conditioning, null: Conditioning, weight: Any = 3.0
) -> DenoiseFn:
    weigh = weight if hasattr(weight, "active") else Constant(weight)
    return guide(
        denoiser, conditioning, [(denoiser, null)], weigh, Linear(), denoiser.process.schedule.point
    )


def test_guidance_inside_and_conditioning_that_is_cut_as_x_is() -> None:
    network = Pictures().requires_grad_(False)
    denoiser = Denoiser(network, Process(FLOW, parameterization("flow")))
    x, concat = normal(2, 3, 6, 10), normal(2, 3, 6, 10, seed=1)
    conditioning, null = (
        Conditioning(vector=torch.eye(3)[[a, b]], concat=concat) for a, b in ((0, 1), (2, 2))
    )
    ask = multidiffusion(guided(denoiser, conditioning, null), 4, 2)
    result = drive(ask(x, 0.6), evaluate_calls)
    # 2 rows and 4 columns of windows, 2 images, 2 classes: one pass
    assert network.calls == [(2 * 4 * 2 * 2, 3, 4, 4)]
    whole = drive(guided(denoiser, conditioning, null)(x, 0.6), evaluate_calls)
    assert torch.allclose(result.x0, whole.x0, atol=1e-5) and torch.allclose(
        result.eps, whole.eps, atol=1e-5
    )
    for k in range(2):
        alone = multidiffusion(guided(denoiser, conditioning[k : k + 1], null[k : k + 1]), 4, 2)
        assert torch.equal(drive(alone(x[k : k + 1], 0.6), evaluate_calls).x0[0], result.x0[k])


def test_a_canvas_that_goes_around_has_no_place_where_it_begins() -> None:
    """The network depends on a window's own edges (convolutions, attention).

    Turning the canvas by whole strides turns the prediction.
    """
    denoiser = tiny()
    x, conditioning = normal(1, 2, 8, 16), Conditioning(vector=torch.eye(3)[[0]])
    ask = multidiffusion(
        guided(denoiser, conditioning, Conditioning(vector=torch.eye(3)[[2]])),
        8,
        4,
        "smooth",
        circular=True,
    )
    with torch.inference_mode():
        straight, turned = (drive(ask(v, 0.6), evaluate_calls).x0 for v in (x, x.roll(4, 3)))
        flat = drive(
            multidiffusion(guided(denoiser, conditioning, conditioning), 8, 4, "smooth")(x, 0.6),
            evaluate_calls,
        ).x0
    assert same(straight.roll(4, 3), turned) and not torch.allclose(straight, flat, atol=1e-3)


def test_a_canvas_that_cannot_be_cut_is_refused() -> None:
    for size, stride in ((4, 5), (4, 0), ((4, 8), (5, 5))):
        with pytest.raises(UserError, match="expected strides from 1 to"):
            multidiffusion(denoise_fn(pixelwise), size, stride)
    with pytest.raises(UserError, match="did you mean 'smooth'"):
        multidiffusion(denoise_fn(pixelwise), 4, 2, "smoth")
    x = torch.zeros(1, 3, 4, 8)
    for wrong in (
        Conditioning(concat=torch.zeros(1, 3, 4, 4)),
        Conditioning(residuals=(torch.zeros(1, 3, 4, 8),)),
    ):
        denoiser = Denoiser(Pictures(), Process(FLOW, parameterization("flow")))
        with pytest.raises(
            UserError, match="residuals" if wrong.residuals else "the canvas' height and width"
        ):
            drive(multidiffusion(guided(denoiser, wrong, wrong, 1.0), 4, 2)(x, 0.5), evaluate_calls)


# ---- feature cache -------------------------------------------------------------------------------

SMALL = {
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 3,
    "sample_size": 8,
}
PLAIN = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    **SMALL,
)
CROSS = UNetConfig(
    block_out_channels=(8, 16, 16),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=6,
    attention_head_dim=2,
    **SMALL | {"layers_per_block": 2},
)


def unet(config: UNetConfig) -> UNet:
    network = random_network(lambda: UNet(config))
    network.class_embedding.weight.mul_(3)
    return network


def tiny() -> Denoiser:
    return Denoiser(unet(PLAIN), Process(FLOW, parameterization("flow")))


def classes(*labels: int) -> Conditioning:
    return Conditioning(vector=torch.eye(3)[list(labels)])


def ran(
    sampler: str,
    ask: DenoiseFn,
    seeds: list[int],
    steps: int = 7,
    size: int = 8,
    on_step: Any = None,
) -> DenoiseCalls[Tensor | None]:
    draw = SeededNoise((2, size, size), seeds)
    times = timesteps("trailing", steps, FLOW)
    return sampler_coroutine(SAMPLERS[sampler](draw(), times, FLOW, draw), ask, steps, on_step)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal but for rounding.

    Convolutions and matrix products choose their algorithm by the batch.
    """
    assert a is not None and b is not None
    return torch.allclose(a, b, atol=1e-3)


class Counting:
    """Counts the rows that go below the cut."""

    def __init__(self, network: UNet, monkeypatch: pytest.MonkeyPatch):
        self.rows: list[int] = []
        deep = network.deep

        def counted(x: Tensor, *rest: Any) -> Tensor:
            self.rows.append(len(x))
            return deep(x, *rest)

        monkeypatch.setattr(network, "deep", counted)


@pytest.mark.parametrize("config", [PLAIN, CROSS], ids=["plain", "cross"])
@pytest.mark.parametrize("size", [8, 7])
@torch.inference_mode()
def test_a_network_cut_anywhere_is_the_network(config: UNetConfig, size: int) -> None:
    network, x, timestep = unet(config), normal(2, 2, size, size), torch.tensor([10.0, 700.0])
    conditioning = replace(
        classes(0, 1),
        tokens=normal(2, 5, 6, seed=1),
        mask=torch.arange(5)[None] < torch.tensor([[3], [5]]),
    )
    top, _ = network.shallow_down(x, timestep, conditioning, len(network._way_up()))
    middle = network._descend(
        top[-1],
        network._way_down()[len(top) - 1 :],
        network.embed(timestep, conditioning, x.dtype),
        conditioning,
    )[-1]
    residuals = tuple(normal(*v.shape, seed=k) for k, v in enumerate((*top, middle)))
    for cond in (conditioning, replace(conditioning, residuals=residuals)):
        expected = network(x, timestep, cond)
        for count in range(1, len(top) + 1):
            skips, time = network.shallow_down(x, timestep, cond, count)
            assert len(skips) == count
            assert torch.equal(
                network.shallow_up(network.deep(skips[-1], time, cond, count), skips, time, cond),
                expected,
            )
    with pytest.raises(UserError, match="do not fit this U-Net"):
        network.deep(top[-1], time, replace(conditioning, residuals=residuals[:-1]), len(top))
    with pytest.raises(UserError, match="which is how many this U-Net has"):
        network.shallow_down(x, timestep, conditioning, len(top) + 1)


@pytest.mark.parametrize("skips", [1, 2, 4])
@pytest.mark.parametrize(
    ("every", "keys"), [(1, range(7)), (3, (0, 3, 6)), ((2, 3, 5), (0, 2, 3, 5)), (100, (0,))]
)
@torch.inference_mode()
def test_it_is_deepcache_written_out_by_hand(every: Any, keys: Any, skips: int) -> None:
    """Two memories, one a class; Euler's steps of a flow; each pass alone."""
    denoiser, times = tiny(), timesteps("trailing", 7, FLOW)
    network, kept = denoiser.network, {}
    x = first = SeededNoise((2, 8, 8), [5, 6])()
    for call, t in enumerate(times[:-1]):
        velocity = []
        for branch in ((0, 1), (2, 2)):
            cond = classes(*branch)
            layers, time = network.shallow_down(x, torch.full((2,), 1000 * t), cond, skips)
            if call in keys:
                kept[branch] = network.deep(layers[-1], time, cond, skips)
            velocity.append(network.shallow_up(kept[branch], layers, time, cond))
        x = x + (times[call + 1] - t) * (velocity[1] + 3.0 * (velocity[0] - velocity[1]))
    ask = feature_cache(guided(denoiser, classes(0, 1), classes(2, 2)), every, skips=skips)
    result = drive(
        sampler_coroutine(SAMPLERS["euler"](first, times, FLOW, lambda: first), ask, 7),
        evaluate_calls,
    )
    assert torch.allclose(result, x, atol=2e-5)
    exact = drive(
        sampler_coroutine(
            SAMPLERS["euler"](first, times, FLOW, lambda: first),
            guided(denoiser, classes(0, 1), classes(2, 2)),
            7,
        ),
        evaluate_calls,
    )
    assert torch.equal(result, exact) if every == 1 else (result - exact).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_sde", "unipc"])
@torch.inference_mode()
def test_every_call_whole_changes_no_bit(sampler: str) -> None:
    denoiser = tiny()
    plain = drive(
        ran(sampler, guided(denoiser, classes(0, 1), classes(2, 2)), [0, 1]), evaluate_calls
    )
    for options in ({"every": 1}, {"every": None, "threshold": 0.0}, {"every": 1, "skips": 3}):
        result = drive(
            ran(
                sampler,
                feature_cache(guided(denoiser, classes(0, 1), classes(2, 2)), **options),
                [0, 1],
            ),
            evaluate_calls,
        )
        assert torch.equal(result, plain)


@torch.inference_mode()
def test_between_key_calls_the_deep_part_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = tiny()
    counting = Counting(denoiser.network, monkeypatch)
    drive(
        ran("ddim", feature_cache(guided(denoiser, classes(0, 1), classes(2, 2)), 3), [0, 1]),
        evaluate_calls,
    )
    assert counting.rows == [4, 4, 4]  # calls 0, 3 and 6, both images of both classes in one pass


@torch.inference_mode()
def test_runs_never_mix_and_share_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs with other classes, images, sizes, rules and samplers, in one list of calls.

    Each is the same as alone.
    """
    denoiser = tiny()

    def runs() -> list[DenoiseCalls[Tensor | None]]:
        return [
            ran("ddim", feature_cache(guided(denoiser, classes(0, 1), classes(2, 2)), 3), [0, 1]),
            ran("heun", feature_cache(guided(denoiser, classes(1), classes(2)), 2), [7], 5),
            ran("ddim", feature_cache(guided(denoiser, classes(1), classes(0)), None, 0.3), [7]),
            ran("ddim", feature_cache(guided(denoiser, classes(1), classes(2)), 3), [9], size=12),
        ]

    alone = [drive(run, evaluate_calls) for run in runs()]
    assert all(
        same(a, b) for a, b in zip(drive(gather(runs()), evaluate_calls), alone, strict=True)
    )
    assert not any(same(a, b) for a, b in ((alone[0][1:], alone[2]), (alone[1], alone[2])))
    in_parts = drive(gather(runs()), lambda queries: evaluate_calls(queries, rows=3))
    assert all(same(a, b) for a, b in zip(in_parts, alone, strict=True))
    counting = Counting(denoiser.network, monkeypatch)
    drive(gather(runs()[:2]), evaluate_calls)
    assert counting.rows[0] == 6  # the first calls of both runs: one pass


@pytest.mark.parametrize("config", [PLAIN, CROSS], ids=["plain", "cross"])
@torch.inference_mode()
def test_the_threshold_decides_for_each_image_alone(
    config: UNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, tokens = (
        Denoiser(unet(config), Process(FLOW, parameterization("flow"))),
        3 * normal(3, 5, 6),
    )
    counting = Counting(denoiser.network, monkeypatch)

    def run(labels: list[int], seeds: list[int]) -> Tensor | None:
        words, nothing = (
            replace(classes(*v), tokens=tokens[list(v)]) for v in (labels, [2] * len(labels))
        )
        ask = guided(denoiser, words, nothing)
        return drive(ran("ddim", feature_cache(ask, None, 0.35), seeds, 15), evaluate_calls)

    result = run([0, 1], [0, 1])
    # some rows, not all
    assert result is not None and counting.rows[0] == 4 and any(n < 4 for n in counting.rows[1:])
    for k in range(2):
        assert same(run([k], [k]), result[k : k + 1])


@torch.inference_mode()
def test_where_guidance_stops_and_begins_again_features_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows and classes.

    Where the second class is not evaluated, other rows stand at the places of a call.
    """

    class Sometimes(Constant):
        def active(self, moment: Moment) -> bool:
            return not 0.3 < moment.t < 0.8

    denoiser, seen = tiny(), []
    deep = denoiser.network.deep

    def traced(x: Tensor, time: Tensor, cond: Conditioning, count: int) -> Tensor:
        seen.append(cond.vector.argmax(1).tolist())
        return deep(x, time, cond, count)

    monkeypatch.setattr(denoiser.network, "deep", traced)
    inside = multidiffusion(
        guided(denoiser, classes(0), classes(2), Sometimes(3.0)), 8, 4, circular=True
    )
    draw, times = SeededNoise((2, 8, 16), [0]), timesteps("trailing", 10, FLOW)
    drive(
        sampler_coroutine(
            SAMPLERS["ddim"](draw(), times, FLOW, draw), feature_cache(inside, 100), 10
        ),
        evaluate_calls,
    )
    # at the first call of each kind; then nothing is due for a hundred calls
    assert seen == [[0, 2] * 4, [0] * 4]
    seen.clear()
    result = drive(
        sampler_coroutine(
            SAMPLERS["ddim"](draw(), times, FLOW, draw), feature_cache(inside, 4), 10
        ),
        evaluate_calls,
    )
    # calls 0 to 2 with both, 3 to 6 with one, 7 to 9 with both
    assert seen == [[0, 2] * 4, [0] * 4, [0, 2] * 4]
    assert torch.isfinite(result).all()


@torch.inference_mode()
def test_a_cache_that_cannot_be_or_is_used_twice_at_once_is_refused() -> None:
    ask = guided(tiny(), classes(0), classes(2))
    for options, complaint in (
        ({"every": 0}, "every=0"),
        ({"every": (1, -2)}, "every="),
        ({"every": None}, "without a threshold"),
        ({"threshold": -1.0}, "threshold=-1"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"skips": 0}, "skips=0"),
    ):
        with pytest.raises(UserError, match=complaint):
            feature_cache(ask, **options)
    shared = feature_cache(ask, 2)
    with pytest.raises(UserError, match="serves one run"):
        drive(gather([ran("ddim", shared, [0]), ran("ddim", shared, [1])]), evaluate_calls)
    with pytest.raises(UserError, match="serves one run"):
        drive(multidiffusion(feature_cache(ask, 2), 8, 4)(normal(1, 2, 8, 12), 0.5), evaluate_calls)
    with pytest.raises(UserError, match="Pictures cannot"):
        denoiser = Denoiser(Pictures(), Process(FLOW, parameterization("flow")))
        drive(
            feature_cache(guided(denoiser, classes(0), classes(2)), 2)(normal(1, 2, 8, 8), 0.5),
            evaluate_calls,
        )
    with pytest.raises(UserError, match="which is how many this U-Net has"):
        drive(feature_cache(ask, 2, skips=5)(normal(1, 2, 8, 8), 0.5), evaluate_calls)


# ---- all at once ---------------------------------------------------------------------------------


@torch.inference_mode()
def test_they_stack() -> None:
    """A known region in a large canvas of windows with guidance, with a cache.

    The known part is z, and each image is the same as alone.
    """
    denoiser, z, mask = tiny(), normal(1, 2, 8, 20, seed=9), torch.zeros(1, 1, 8, 20)
    mask[:, :, 2:6, 3:12] = 1
    times = timesteps("trailing", 6, FLOW)

    def run(labels: list[int], seeds: list[int], steps: list[Step]) -> Tensor:
        ask = multidiffusion(
            guided(denoiser, classes(*labels), classes(*[2] * len(labels))), 8, 4, "smooth"
        )
        ask = known_region(feature_cache(ask, 2), z, mask, FLOW.point)
        draw = SeededNoise((2, 8, 20), seeds)
        x = start(draw(), z, mask, FLOW.point, times[0])
        return finish(
            drive(
                sampler_coroutine(SAMPLERS["ddim"](x, times, FLOW, draw), ask, 6, steps.append),
                evaluate_calls,
            ),
            z,
            mask,
        )

    steps: list[Step] = []
    result, inside = run([0, 1], [0, 1], steps), mask.bool().expand(2, 2, -1, -1)
    assert len(steps) == 6 and torch.equal(result[inside], z.expand(2, -1, -1, -1)[inside])
    assert (result - z)[~inside].abs().max() > 0.1
    for k in range(2):
        assert same(run([k], [k], []), result[k : k + 1])
