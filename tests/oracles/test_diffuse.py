"""Act 2 against exact answers: closed forms of the schedules, the 2x2 solve, and samplers on a
Gaussian mixture whose denoiser is known.

With data sum_k w_k N(m_k, s_k^2 I) and x = alpha*z + sigma*eps, E[z | x] = sum_k r_k(x) (m_k +
alpha s_k^2/v_k (x - alpha m_k)) with v_k = alpha^2 s_k^2 + sigma^2 and responsibilities r_k
proportional to w_k N(x; alpha m_k, v_k I) (Bayes' rule for Gaussians).
"""

import inspect
import math
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from helpers.mixture import MEANS, STDS, WEIGHTS, exact_denoiser, log_densities, noisy_points
from helpers.tensors import normal as draw_normal
from sfumato.diffuse.parameterization import PARAMETERIZATIONS, edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, Step, check_finite, iterate_steps, run_sampler
from sfumato.diffuse.samplers import traits_of
from sfumato.diffuse.samplers.ddim import ddim
from sfumato.diffuse.samplers.ddpm import ddpm
from sfumato.diffuse.schedule import SCHEDULES, BetaTable, schedule, table
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR, dynamic_shift
from sfumato.diffuse.seeds import random_seed, seed_torch, seeded_generator
from sfumato.diffuse.timesteps import ALIGN_YOUR_STEPS, SPACINGS, check_times, timesteps, truncate
from sfumato.diffuse.weighting import draw_times, loss_weight
from sfumato.errors import NumericalError, UserError
from sfumato.registry import find, names
from sfumato.types import Prediction

F64 = torch.float64
TABLES = ("linear", "scaled_linear", "cosine", "sigmoid")
EXPLODING = ("ve", "edm")  # alpha is 1, sigma large
PRESERVING = (*TABLES, "vp")  # alpha^2 + sigma^2 = 1
WRAPPED = {
    "zero terminal SNR": ZeroTerminalSNR(schedule("scaled_linear")),
    "zero terminal SNR, continuous": ZeroTerminalSNR(schedule("vp")),
    "shifted flow": Shifted(schedule("flow"), 3.0),
    "zero terminal SNR, shifted": ZeroTerminalSNR(Shifted(schedule("linear"), 0.3)),
    "shifted table": Shifted(schedule("linear"), 0.5),
}
ALL = {name: schedule(name) for name in SCHEDULES} | WRAPPED
quick = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

normal = partial(draw_normal, dtype=F64)


def stream(shape, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=F64)


def never() -> Tensor:
    raise AssertionError("a deterministic run asked for noise")


def test_the_oracle_obeys_tweedies_formula() -> None:
    """eps = -sigma * grad log p_t(x) (Efron 2011, eq. 1.5), with the gradient from autograd."""
    table = schedule("cosine")
    x = 2 * normal(50, 2, 1, 1)
    for t in (0.05, 0.4, 0.9):
        alpha, sigma = (float(v) for v in table.at(t))
        points = x.flatten(1).requires_grad_()
        (score,) = torch.autograd.grad(
            log_densities(points, alpha, sigma).logsumexp(1).sum(), points
        )
        assert torch.allclose(
            exact_denoiser(table)(x, t).eps.flatten(1), -sigma * score, atol=1e-12
        )


# ---- schedules -----------------------------------------------------------------------------------


def closed_form(kind: str, steps: int) -> list[float]:
    """log alpha_i^2 = sum of log(1 - beta_j), in Python's own floats."""
    ramp = [i / (steps - 1) for i in range(steps)]
    if kind == "cosine":
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in pairwise(f)]
    elif kind == "scaled_linear":
        low, high = math.sqrt(0.00085), math.sqrt(0.012)
        betas = [(low + (high - low) * u) ** 2 for u in ramp]
    elif kind == "sigmoid":
        betas = [0.0001 + 0.0199 / (1 + math.exp(6 - 12 * u)) for u in ramp]
    else:
        betas = [0.0001 + 0.0199 * u for u in ramp]
    return [math.fsum(math.log1p(-b) for b in betas[: i + 1]) for i in range(steps)]


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("steps", [50, 200])
def test_tables_are_the_products_of_their_papers(kind: str, steps: int) -> None:
    expected = torch.tensor(closed_form(kind, steps), dtype=F64)
    alpha, sigma = schedule(kind, steps=steps).at(torch.arange(1, steps + 1, dtype=F64) / steps)
    torch.testing.assert_close(alpha.square(), expected.exp(), rtol=1e-10, atol=0)
    torch.testing.assert_close(sigma.square(), -torch.expm1(expected), rtol=1e-10, atol=0)


def test_cosine_is_nichols_closed_form_until_the_clip() -> None:
    """Products telescope: alpha_i^2 = f((i+1)/T) / f(0), eq. 17, but for the last beta, which is
    cut to 0.999.
    """
    t = torch.arange(1, 1000, dtype=F64) / 1000
    f = (
        torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    torch.testing.assert_close(schedule("cosine").at(t)[0].square(), f, rtol=1e-8, atol=0)
    torch.testing.assert_close(
        schedule("cosine").at(1.0)[0].square(), f[-1] * 0.001, rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("kind", ALL)
def test_every_schedule_runs_from_clean_to_noise(kind: str) -> None:
    """alpha falls, sigma rises, the log-SNR falls strictly: on the grid, between its points and
    below the first of them.
    """
    chosen = ALL[kind]
    t = torch.cat(
        [torch.linspace(0, 0.003, 61, dtype=F64), torch.linspace(0.003, 1, 2500, dtype=F64)[1:]]
    )
    alpha, sigma = chosen.at(t)
    assert alpha.dtype == sigma.dtype == F64
    assert (alpha[0], sigma[0]) == (1, 0)
    log_snr = chosen.log_snr(t)
    assert log_snr[0] == math.inf and (log_snr.diff() < 0).all() and log_snr[-1] < 2 * math.log(0.1)
    assert np.allclose(
        [chosen.point(float(v)) for v in t[::100]],
        torch.stack([alpha, sigma], 1)[::100],
        rtol=1e-12,
        atol=0,
    )
    if kind in EXPLODING:
        assert (alpha == 1).all() and sigma[-1] == pytest.approx({"ve": 50, "edm": 80}[kind])
    elif "flow" in kind:
        assert torch.allclose(alpha + sigma, torch.ones_like(t), atol=1e-15) and alpha[-1] == 0
        assert kind != "flow" or torch.equal(sigma, t)
    else:
        assert (alpha.square() + sigma.square() - 1).abs().max() < 1e-14  # variance preserving
    assert chosen.bounded == (kind not in ("flow", "shifted flow", "cosine") and "zero" not in kind)
    if "zero" in kind:
        assert chosen.point(1.0) == (0.0, 1.0)
    # no jump where a table or a foot begins
    edge = torch.tensor([chosen.first * (1 - 1e-9), chosen.first], dtype=F64)
    assert chosen.at(edge)[1].diff().abs() < 1e-8


@quick
@given(kind=st.sampled_from(list(ALL)), t=st.floats(1e-4, 1 - 1e-4), steps=st.integers(2, 1200))
def test_log_snr_and_timestep_have_inverses(kind: str, t: float, steps: int) -> None:
    chosen = (
        schedule(kind, steps=min(steps, 100) if kind == "cosine" else steps)
        if kind in TABLES
        else ALL[kind]
    )
    assert float(chosen.from_log_snr(chosen.log_snr(t))) == pytest.approx(t, abs=1e-7)
    # networks are trained on no noise below the first
    nearest = max(t, chosen.first if chosen.grid or kind in EXPLODING else 0.0)
    assert float(chosen.time(chosen.timestep(torch.tensor(t, dtype=F64)))) == pytest.approx(
        nearest, abs=1e-7
    )
    many = torch.tensor([[t, 0.5], [1.0, t / 2]], dtype=F64)
    assert torch.allclose(chosen.from_log_snr(chosen.log_snr(many)), many, atol=1e-7)  # any shape
    ends = chosen.from_log_snr(torch.tensor([math.inf, 800.0, -800.0, -math.inf], dtype=F64))
    assert torch.allclose(ends, torch.tensor([0.0, 0, 1, 1], dtype=F64), atol=1e-9)
    level = chosen.noise_level(t)
    assert (
        chosen.at_noise_level(level) == pytest.approx(t, abs=1e-7)
        and chosen.at_noise_level(0.0) == 0
    )


def test_continuous_schedules_are_those_of_their_papers() -> None:
    t = torch.linspace(0.01, 1, 100, dtype=F64)
    # Song et al. 2021, eq. 33: the mean's coefficient is exp(-t^2 (b - a)/4 - t a/2)
    a, b = 0.1, 20.0
    torch.testing.assert_close(
        schedule("vp").at(t)[0], torch.exp(-0.25 * t**2 * (b - a) - 0.5 * t * a), rtol=1e-12, atol=0
    )
    # eq. 30
    torch.testing.assert_close(schedule("ve").at(t)[1], 0.01 * 5000.0**t, rtol=1e-12, atol=0)
    # Karras et al. 2022, eq. 5 with sigma_min 0
    ladder = (80 ** (1 / 7) + (1 - t) * (0 - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule("edm").at(t)[1], ladder, rtol=1e-10, atol=1e-30)
    # A table of many small betas tends to the continuous schedule: beta_i = beta(i/T)/T.
    fine = schedule("linear", steps=20_000, start=a / 20_000, end=b / 20_000)
    torch.testing.assert_close(fine.at(t)[0], schedule("vp").at(t)[0], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_zero_terminal_snr_is_lins_algorithm(kind: str) -> None:
    """Algorithm 1 on the square roots of the cumulative products: shifted so that the last is 0,
    scaled so that the first stays.
    """
    base = schedule(kind)
    grid = torch.arange(1, 1001, dtype=F64) / 1000
    root = torch.tensor(closed_form(kind, 1000), dtype=F64).exp().sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    output = ZeroTerminalSNR(base)
    torch.testing.assert_close(output.at(grid)[0], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(output.timestep(grid), base.timestep(grid))
    nearly = ZeroTerminalSNR(base, last=2.0**-24)
    assert nearly.point(1.0)[0] == pytest.approx(2.0**-12) and nearly.point(0.001)[
        0
    ] == pytest.approx(float(root[0]))
    for wrong in (schedule("flow"), schedule("edm")):
        with pytest.raises(
            UserError, match="zero terminal SNR is for variance-preserving schedules"
        ):
            ZeroTerminalSNR(wrong)
    with pytest.raises(UserError, match="last="):
        ZeroTerminalSNR(base, last=0.9)
    with pytest.raises(UserError, match="'eps' cannot be solved at t = 1"):
        Process(output, parameterization("eps"))
    Process(output, parameterization("v")), Process(nearly, parameterization("eps"))


def test_shift_divides_the_signal_to_noise_ratio_of_a_flow() -> None:
    """Esser et al. 2024, eq. 23: t' = s t / (1 + (s - 1) t).

    The timestep of the network is that of its noise level.
    """
    t = torch.linspace(0.01, 1, 50, dtype=F64)
    for shift in (0.5, 3.0):
        output, base = Shifted(schedule("flow"), shift), schedule("flow")
        alpha, sigma = output.at(t)
        torch.testing.assert_close(sigma, shift * t / (1 + (shift - 1) * t), rtol=1e-12, atol=0)
        torch.testing.assert_close(alpha / sigma, (1 - t) / t / shift, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output.timestep(t), 1000 * sigma, rtol=1e-12, atol=0)
        # Even steps of the shifted schedule are the shifted steps of the plain one.
        shifted_steps = [base.point(v) for v in timesteps("shifted", 7, base, shift=shift)]
        assert np.allclose(
            shifted_steps, [output.point(v) for v in timesteps("trailing", 7, output)], atol=1e-12
        )
    with pytest.raises(UserError, match="shift=0"):
        Shifted(schedule("flow"), 0)


def test_dynamic_shift_is_a_line_in_tokens() -> None:
    """FLUX: mu is 0.5 at 256 tokens and 1.15 at 4096, the shift its exponential."""
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5)) and dynamic_shift(
        4096
    ) == pytest.approx(math.exp(1.15))
    assert dynamic_shift(2176, exponential=False) == pytest.approx(0.825)
    with pytest.raises(UserError, match="tokens=0"):
        dynamic_shift(0)


def test_edm_is_karras_preconditioning() -> None:
    """D = c_skip x + c_out F(c_in x, c_noise), table 1, for their sigma_data 0.5 on their own
    schedule.
    """
    process = Process(schedule("edm"), edm(0.5))
    x, raw = normal(3, 1, 2, 2, seed=0), normal(3, 1, 2, 2, seed=1)
    for t in (0.3, 0.6, 1.0):
        sigma = process.schedule.point(t)[1]
        total = math.sqrt(sigma**2 + 0.25)
        expected = 0.25 / total**2 * x + sigma * 0.5 / total * raw
        torch.testing.assert_close(process.split(x, raw, t).x0, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(process.network_input(x, t), x / total, rtol=1e-12, atol=0)
        assert float(process.schedule.timestep(torch.tensor(t))) == pytest.approx(
            math.log(sigma) / 4
        )
    # on a variance-preserving schedule with unit data it is -v
    other = Process(schedule("vp"), edm(1.0))
    torch.testing.assert_close(
        other.target(x, raw, 0.4),
        -Process(schedule("vp"), parameterization("v")).target(x, raw, 0.4),
    )
    mixed = torch.tensor([0.3, 0.6, 1.0], dtype=F64)
    assert torch.equal(process.network_input(x, mixed)[1:2], process.network_input(x[1:2], 0.6))
    assert edm(0.5) == edm(0.5) != edm(1.0)
    with pytest.raises(UserError, match="sigma_data=-1"):
        edm(-1)


def test_units_of_time() -> None:
    t = torch.tensor([0.001, 0.5, 1.0], dtype=F64)
    assert torch.allclose(schedule("linear").timestep(t), torch.tensor([0.0, 499, 999], dtype=F64))
    assert torch.allclose(schedule("flow").timestep(t), torch.tensor([1.0, 500, 1000], dtype=F64))
    assert torch.allclose(
        schedule("linear", steps=10).time(torch.tensor([0, 9])), torch.tensor([0.1, 1.0], dtype=F64)
    )


def test_unknown_and_impossible_schedules_are_refused() -> None:
    with pytest.raises(UserError, match="unknown schedule 'cosin': did you mean 'cosine'"):
        schedule("cosin")
    for betas in ((), (0.1, 1.0), (0.0, 0.1)):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            BetaTable(betas)
        with pytest.raises(UserError, match="strictly between 0 and 1"):
            table(betas)
    assert table(schedule("linear", steps=30).betas).at(0.4) == schedule("linear", steps=30).at(0.4)
    for kind, options in (
        ("vp", {"beta_min": 0}),
        ("ve", {"sigma_max": 0.001}),
        ("edm", {"rho": 0.1}),
    ):
        with pytest.raises(UserError, match="expected"):
            schedule(kind, **options)


# ---- parameterizations and the process -----------------------------------------------------------

PAIRS = [pair for pair in product(SCHEDULES, PARAMETERIZATIONS) if pair != ("flow", "eps")]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_split_inverts_add_noise_and_target(kind: str, name: str, dtype: torch.dtype) -> None:
    """For every pair and t in (0, 1], up to the rounding of x and y times the size of the solve's
    coefficients.
    """
    process = Process(schedule(kind), parameterization(name))
    t = torch.tensor([1e-3, 0.0123, 0.3, 0.77, 0.999, 1.0], dtype=F64).clamp(
        min=process.schedule.first
    )
    z, eps = (normal(6, 3, 4, 5, seed=s, dtype=dtype) for s in (0, 1))
    x, y = process.add_noise(z, eps, t), process.target(z, eps, t)
    output = process.split(x, y, t)
    condition = 1 / process.parameterization.determinant(*process.schedule.at(t)).abs()
    size = process.schedule.at(t)[1].clamp(min=1)  # x is as large as the noise
    bound = (20 * torch.finfo(dtype).eps * condition.clamp_min(1) * size).reshape(-1, 1, 1, 1)
    assert output.x0.dtype == output.eps.dtype == dtype
    assert ((output.x0 - z).abs() < bound).all() and ((output.eps - eps).abs() < bound).all()
    for i, one in enumerate(t.tolist()):  # a t an image is the same as each image with its own t
        alone = process.split(x[i : i + 1], y[i : i + 1], one)
        assert torch.equal(alone.x0, output.x0[i : i + 1]) and torch.equal(
            process.add_noise(z, eps, one)[i], x[i]
        )


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_late_predictions_equal_those_of_the_pair(kind: str, name: str) -> None:
    """Combinations, lines through two predictions, and the finite check of a `LinearPrediction`
    against those of its x0 and eps.
    """
    process = Process(schedule(kind), parameterization(name))
    x, y, other, elsewhere = (normal(3, 2, 2, 2, seed=s) for s in range(4))
    w = torch.tensor([1.0, 2.5, 0.3], dtype=F64).reshape(-1, 1, 1, 1)
    for t in (max(0.05, process.schedule.first), 0.5, 0.9):
        late, reference = process.split(x, y, t), process.split(x, other, t)
        moved = [
            process.split(elsewhere, other, t),
            Process(schedule(kind), parameterization("v")).split(x, other, t),
        ]
        now, then = Prediction(late.x0, late.eps), Prediction(reference.x0, reference.eps)
        close = {
            "rtol": 1e-9,
            "atol": 1e-9
            * float(
                max(
                    now.x0.abs().max(),
                    now.eps.abs().max(),
                    then.x0.abs().max(),
                    then.eps.abs().max(),
                )
            ),
        }
        for alpha, sigma in ((0.7, 0.4), (1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)):
            assert torch.allclose(late.at(alpha, sigma), alpha * now.x0 + sigma * now.eps, **close)
            for place in (x, elsewhere, x.clone()):
                expected = alpha * now.x0 + sigma * now.eps + 0.6 * place
                assert torch.allclose(late.at(alpha, sigma, 0.6, place), expected, **close)
                assert torch.allclose(now.at(alpha, sigma, 0.6, place), expected, **close)
        for scale in (1.5, w):
            for one, two in ((late, reference), (now, then), (late, then), (now, reference)):
                output = one.away(two, scale)
                assert torch.allclose(output.x0, then.x0 + scale * (now.x0 - then.x0), **close)
                assert torch.allclose(output.eps, then.eps + scale * (now.eps - then.eps), **close)
            # of another x, or of another parameterization: not one line through one x
            for far in moved:
                output = late.away(far, scale)
                assert torch.allclose(
                    output.x0, far.x0 + scale * (now.x0 - far.x0), rtol=1e-9, atol=1e-6
                )
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = y.clone()
        wrong[2, 1, 0, 1] = bad
        assert not math.isfinite(float(process.split(x, wrong, 0.5).size())) and not math.isfinite(
            float(Prediction(x, wrong).size())
        )
        assert not math.isfinite(float(Prediction(wrong, x).size()))


def test_a_step_at_nearly_pure_noise_loses_nothing() -> None:
    """eps there is x, and x0 = (x - sigma eps)/alpha is what float32's rounding leaves; one
    combination of x and y does not go through it.
    """
    process, t, s = Process(schedule("cosine"), parameterization("eps")), 1.0, 0.999
    x, y = (normal(1, 4, 8, 8, seed=k, dtype=torch.float32) for k in (0, 1))
    exact = process.split(x.double(), y.double(), t).at(*process.schedule.point(s))
    late = process.split(x, y, t)
    size = exact.abs().max()
    assert (late.at(*process.schedule.point(s)) - exact).abs().max() < 1e-6 * size
    assert torch.isfinite(Prediction(late.x0, late.eps).at(*process.schedule.point(s))).all()


def test_targets_are_the_published_ones() -> None:
    z, eps = normal(2, 1, 2, 2, seed=0), normal(2, 1, 2, 2, seed=1)
    table = schedule("cosine")
    alpha, sigma = (float(v) for v in table.at(0.3))
    assert torch.equal(Process(table, parameterization("eps")).target(z, eps, 0.3), eps)
    assert torch.equal(Process(table, parameterization("x0")).target(z, eps, 0.3), z)
    assert torch.allclose(
        Process(table, parameterization("v")).target(z, eps, 0.3), alpha * eps - sigma * z
    )
    assert torch.allclose(
        Process(schedule("flow"), parameterization("flow")).target(z, eps, 0.3), eps - z
    )


def test_pairs_that_cannot_be_solved_are_refused_when_they_are_built() -> None:
    with pytest.raises(
        UserError, match=r"'eps' cannot be solved at t = 1: there alpha is 0.*use v or x0"
    ):
        Process(schedule("flow"), parameterization("eps"))
    with pytest.raises(UserError, match="unknown parameterization 'velocity'"):
        parameterization("velocity")


# ---- samplers on the mixture ---------------------------------------------------------------------


def start(chosen, count: int, seed: int = 0) -> Tensor:
    return float(chosen.at(1.0)[1]) * normal(count, 2, 1, 1, seed=seed)


def solve(sampler, chosen, steps: int, x: Tensor, noise=never, **options) -> Tensor:
    calls: list[float] = []
    times = timesteps("trailing", steps, chosen)
    result = run_sampler(
        sampler(x, times, chosen, noise, **options), exact_denoiser(chosen, calls), steps
    )
    assert calls == times[:-1]  # one network call a step, and none at t = 0
    assert result is not None
    return result


@pytest.mark.parametrize("kind", ["cosine", "linear", "flow"])
def test_ddim_converges_with_order_one(kind: str) -> None:
    """Slope of log error over log step size, against 2*x_512 - x_256 (Richardson: the reference's
    own error is of order two).
    """
    chosen = schedule(kind)
    x = start(chosen, 64)
    reference = 2 * solve(ddim, chosen, 512, x) - solve(ddim, chosen, 256, x)
    counts = [8, 16, 32, 64]
    errors = [(solve(ddim, chosen, n, x) - reference).square().mean().sqrt().item() for n in counts]
    fit = stats.linregress([math.log(n) for n in counts], [math.log(e) for e in errors])
    assert -fit.slope == pytest.approx(1, abs=0.3), errors
    assert errors[-1] < 0.05


def features(points: Tensor) -> Tensor:
    """Compared features: the coordinates, their products, and the component of a point (soft).

    The result is (N, 8).
    """
    a, b = points.T
    return torch.cat(
        [torch.stack([a, b, a * a, a * b, b * b], 1), log_densities(points, 1.0, 0.0).softmax(1)], 1
    )


def truth() -> Tensor:
    mean = WEIGHTS @ MEANS
    second = torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS, MEANS) + (
        WEIGHTS @ STDS.square()
    ) * torch.eye(2, dtype=F64)
    # E[r_k(z)] = w_k: responsibilities average to the weights of the components
    return torch.cat([mean, second[[0, 0, 1], [0, 1, 1]], WEIGHTS])


NOISY = [
    name for name in names("diffuse.samplers") if traits_of(find("diffuse.samplers", name)).noise
]


def flow_end(chosen) -> Callable[[Tensor, float], Prediction]:
    """The prediction of a perfectly distilled network: x0 is the end of the flow through x.

    It is computed by DPM-Solver-3 in 60 steps of log-SNR.
    """
    solver = find("diffuse.samplers", "dpm_solver_3")

    def end(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        x0 = run_sampler(
            solver(x, timesteps("log_snr", 60, chosen, start=t), chosen, never),
            exact_denoiser(chosen),
            1,
        )
        assert x0 is not None
        return Prediction(x0, (x - alpha * x0) / sigma)

    return end


@pytest.mark.parametrize("kind", ["scaled_linear", "flow", "edm"])
@pytest.mark.parametrize("name", [*NOISY, "ddim", "ddim, eta 1"])
def test_samples_have_the_mixtures_mean_covariance_and_mode_weights(kind: str, name: str) -> None:
    """Each of 8 averages over 4000 points within 5 standard errors, for every sampler of the folder
    that draws noise.

    False alarms: with 8 comparisons a run at 5 standard errors, of which the discretisation (100
    steps; 4 for consistency samplers) uses up at most one, below 8 * 2 * P(N > 4) = 0.05 % if the
    seed were drawn anew; it is fixed. From the exact marginal at t = 1.
    """
    sampler, options = (
        find("diffuse.samplers", name.split(",")[0]),
        {"eta": 1.0} if "eta" in name else {},
    )
    promised, chosen, count = traits_of(sampler), schedule(kind), 4000
    distilled = promised.network_type == "consistency"
    x = noisy_points(count, chosen.point(1.0), 0)
    times = timesteps("karras" if kind == "edm" else "trailing", 4 if distilled else 100, chosen)
    denoise = flow_end(chosen) if distilled else exact_denoiser(chosen)
    end = run_sampler(
        sampler(x, times, chosen, stream((count, 2, 1, 1)), **(promised.exact | options)),
        denoise,
        1,
    )
    assert end is not None
    output = features(end.flatten(1))
    score = (output.mean(0) - truth()) / (output.std(0) / math.sqrt(count))
    assert score.abs().max() < 5, score


def test_the_statistical_test_can_fail() -> None:
    """Half of DDPM's noise left out is seen at once."""
    chosen, count = schedule("cosine"), 1000
    draw = stream((count, 2, 1, 1))
    output = features(
        solve(ddpm, chosen, 50, start(chosen, count), lambda: 0.5 * draw()).flatten(1)
    )
    assert ((output.mean(0) - truth()) / (output.std(0) / math.sqrt(count))).abs().max() > 10


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_with_eta_one_is_ddpm_step_by_step(kind: str) -> None:
    chosen = schedule(kind)
    x, times, denoise = start(chosen, 20), timesteps("trailing", 25, chosen), exact_denoiser(chosen)
    a = iterate_steps(ddim(x, times, chosen, stream(x.shape), eta=1.0), denoise, 25)
    b = iterate_steps(ddpm(x, times, chosen, stream(x.shape)), denoise, 25)
    for left, right in zip(a, b, strict=True):
        left, right = (e.x if isinstance(e, Step) else e for e in (left, right))
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_is_euler_in_sigma_over_alpha(kind: str) -> None:
    """x/alpha moves along d(x/alpha) = eps d(sigma/alpha) (Song et al. 2021, eq. 14); for a flow
    also along dx = (eps - z) dt.
    """
    chosen = schedule(kind)
    denoise, times = exact_denoiser(chosen), timesteps("trailing", 20, chosen, start=0.98)
    x = start(chosen, 20)
    output = run_sampler(ddim(x, times, chosen, never), denoise, 20)
    y, flow = x, x
    for t, s in pairwise(times):
        (a_t, s_t), (a_s, s_s) = chosen.at(t), chosen.at(s)
        y = a_s * (y / a_t + (s_s / a_s - s_t / a_t) * denoise(y, t).eps)
        p = denoise(flow, t)
        flow = flow + (s - t) * (p.eps - p.x0)
    torch.testing.assert_close(output, y, rtol=1e-9, atol=1e-10)
    if kind == "flow":
        torch.testing.assert_close(output, flow, rtol=1e-9, atol=1e-10)


def linear_response(sampler, chosen, t: float, s: float, denoise, **options) -> tuple[float, float]:
    """(A, B) of one step x_s = A x_t + B noise + const."""
    outputs = []
    for x, n in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        noise = torch.full((1, 1, 1, 1), n, dtype=F64)
        run = sampler(
            torch.full((1, 1, 1, 1), x, dtype=F64),
            [t, s],
            chosen,
            lambda noise=noise: noise,
            **options,
        )
        outputs.append(float(run_sampler(run, denoise, 1)))
    return outputs[1] - outputs[0], outputs[2] - outputs[0]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.5, 0.35), (0.02, 0.004)])
def test_one_step_keeps_the_variance(kind: str, t: float, s: float) -> None:
    """For a point, x_s ~ N(alpha_s p, sigma_s^2) for every eta and for "small"; for a standard
    normal "large" keeps the variance.
    """
    chosen = schedule(kind)
    (a_t, s_t), (a_s, s_s) = ((float(v) for v in chosen.at(u)) for u in (t, s))

    def point(x: Tensor, _: float) -> Prediction:
        return Prediction(torch.full_like(x, 0.7), (x - 0.7 * a_t) / s_t)

    for sampler, options in (
        (ddpm, {}),
        (ddim, {"eta": 0.0}),
        (ddim, {"eta": 0.4}),
        (ddim, {"eta": 1.0}),
    ):
        gain, spread = linear_response(sampler, chosen, t, s, point, **options)
        assert (gain * s_t) ** 2 + spread**2 == pytest.approx(s_s**2, rel=1e-9)
        mean = run_sampler(
            sampler(
                torch.full((1, 1, 1, 1), 0.7 * a_t, dtype=F64),
                [t, s],
                chosen,
                lambda: torch.zeros(1, 1, 1, 1),
                **options,
            ),
            point,
            1,
        )
        assert float(mean) == pytest.approx(0.7 * a_s, rel=1e-9)
    if kind in PRESERVING:  # variance preserving: x ~ N(0, 1) at all times, with E[z | x] = alpha x

        def standard(x: Tensor, _: float) -> Prediction:
            return Prediction(a_t * x, (x - a_t**2 * x) / s_t)

        gain, spread = linear_response(ddpm, chosen, t, s, standard, variance="large")
        assert gain**2 + spread**2 == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("sampler", "options"), [(ddpm, {}), (ddpm, {"variance": "large"}), (ddim, {"eta": 1.0})]
)
def test_the_last_step_draws_no_noise(sampler, options) -> None:
    """At t = 0 nothing would remove it; `never` raises if it is called."""
    chosen = schedule("cosine")
    assert (
        run_sampler(
            sampler(start(chosen, 5), [0.3, 0.0], chosen, never, **options),
            exact_denoiser(chosen),
            1,
        )
        is not None
    )


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_eta_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"expected a number in \[0, 1\]"):
        next(ddim(torch.zeros(1, 2, 1, 1), [1.0, 0.0], schedule("flow"), never, eta=bad))


# ---- running a sampler ---------------------------------------------------------------------------


def test_run_streams_a_step_a_call_and_ends_with_the_latent() -> None:
    chosen, calls = schedule("flow"), []
    times = timesteps("trailing", 5, chosen)
    events = iterate_steps(
        ddim(start(chosen, 3), times, chosen, never), exact_denoiser(chosen, calls), 5
    )
    for index in range(5):
        step = next(events)
        assert isinstance(step, Step) and len(calls) == index + 1  # nothing runs ahead
        assert (step.index, step.count, step.t) == (index, 5, times[index])
        assert torch.equal(step.prediction.x0, exact_denoiser(chosen)(step.x, step.t).x0)
    assert torch.equal(next(events), solve(ddim, chosen, 5, start(chosen, 3)))
    assert next(events, None) is None and len(calls) == 5


def test_cancelling_stops_the_calls_and_closes_the_sampler() -> None:
    chosen, calls = schedule("flow"), []
    sampler = ddim(start(chosen, 3), timesteps("trailing", 10, chosen), chosen, never)
    assert (
        run_sampler(sampler, exact_denoiser(chosen, calls), 10, lambda step: step.index < 3) is None
    )
    assert len(calls) == 4
    sampler = ddim(start(chosen, 3), timesteps("trailing", 10, chosen), chosen, never)
    events = iterate_steps(sampler, exact_denoiser(chosen, calls), 10)
    next(events), next(events)
    events.close()
    assert len(calls) == 6 and inspect.getgeneratorstate(sampler) == inspect.GEN_CLOSED
    assert (
        run_sampler(
            ddim(start(chosen, 3), [1.0, 0.0], chosen, never),
            exact_denoiser(chosen),
            1,
            lambda step: None,
        )
        is not None
    )


@pytest.mark.parametrize("part", ["x0", "eps"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run(part: str, value: float) -> None:
    chosen, calls = schedule("flow"), []
    oracle = exact_denoiser(chosen, calls)

    def broken(x: Tensor, t: float) -> Prediction:
        output = oracle(x, t)
        if len(calls) == 3:
            getattr(output, part)[0, 0, 0, 0] = value
        return Prediction(output.x0.float(), output.eps.float())

    with pytest.raises(
        NumericalError, match=r"1 of 6 numbers .* step 3 of 8 \(t = 0\.75\) \(float32\)"
    ):
        run_sampler(
            ddim(start(chosen, 3).float(), timesteps("trailing", 8, chosen), chosen, never),
            broken,
            8,
        )
    assert len(calls) == 3
    with pytest.raises(NumericalError, match=r"the decoder \(bfloat16\)"):
        check_finite(torch.tensor([value], dtype=torch.bfloat16), "the decoder")


def test_image_k_of_a_batch_has_the_noise_of_its_own_seed() -> None:
    together = SeededNoise((4, 5, 3), [7, 8, 9])
    first, second = together(), together()
    assert (
        first.shape == (3, 4, 5, 3)
        and first.dtype == torch.float32
        and not torch.equal(first, second)
    )
    for k, seed in enumerate([7, 8, 9]):
        alone = SeededNoise((4, 5, 3), [seed])
        assert torch.equal(alone()[0], first[k]) and torch.equal(alone()[0], second[k])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32, 2**32 + 5, 5 * 2**32 + 7, 2**64 - 1])
def test_generators_begin_as_the_reference_does_for_words_of_a_seed(seed: int) -> None:
    """Python's `random` begins its Mersenne Twister with the words of an integer (CPython,
    Modules/_randommodule.c, init_by_array); torch's own begins with one word (init_genrand).
    """
    generator = seeded_generator(seed)
    drawn = torch.empty(1300, dtype=torch.int32).random_(generator=generator)
    if seed < 2**32:
        plain = torch.Generator().manual_seed(seed)
        expected = torch.empty(1300, dtype=torch.int32).random_(generator=plain)
        assert drawn.tolist() == expected.tolist()
    else:
        reference = random.Random(seed)
        assert drawn.tolist() == [reference.getrandbits(32) % 2**31 for _ in range(1300)]
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        assert torch.equal(torch.randn(5), torch.randn(5, generator=seeded_generator(seed)))


def test_random_seeds_differ_and_suit_every_program() -> None:
    drawn = {random_seed() for _ in range(8)}
    assert len(drawn) > 6 and all(0 <= seed < 2**32 for seed in drawn)


def test_noise_equals_successive_draws_of_torch_from_the_seed() -> None:
    """As with `torch.Generator().manual_seed(seed)` in other libraries, whatever is drawn in
    advance; odd sizes too.
    """
    for shape in ((4, 5, 3), (12, 7, 7), (1, 1, 1)):
        draw, generators = (
            SeededNoise(shape, [7, 8]),
            [torch.Generator().manual_seed(seed) for seed in (7, 8)],
        )
        for _ in range(11):
            torch.testing.assert_close(
                draw(),
                torch.stack([torch.randn(shape, generator=g) for g in generators]),
                rtol=0,
                atol=0,
            )


# ---- timesteps -----------------------------------------------------------------------------------


def largest(spacing: str, chosen) -> int:
    return (
        50
        if spacing == "lcm"
        else 10
        if chosen.grid is None and spacing == "align_your_steps"
        else 1000
    )


@settings(quick, max_examples=150)
@given(
    spacing=st.sampled_from(list(SPACINGS)),
    kind=st.sampled_from(list(ALL)),
    steps=st.integers(1, 1000),
)
def test_times_fall_strictly_for_every_spacing_and_number_of_steps(
    spacing: str, kind: str, steps: int
) -> None:
    steps = min(steps, largest(spacing, ALL[kind]))
    times = timesteps(spacing, steps, ALL[kind])
    assert len(times) == steps + 1 and times[-1] == 0 and 0 < times[0] <= 1
    assert all(a > b for a, b in pairwise(times))
    if spacing != "leading":
        assert times[0] == 1  # the full noise


@settings(quick, max_examples=150)
@given(
    spacing=st.sampled_from(list(SPACINGS)),
    kind=st.sampled_from(list(ALL)),
    steps=st.integers(1, 300),
    first=st.floats(0.31, 1.0),
)
def test_times_begin_at_the_requested_start(
    spacing: str, kind: str, steps: int, first: float
) -> None:
    steps = min(steps, largest(spacing, ALL[kind]) // 5)
    times = timesteps(spacing, steps, ALL[kind], start=first)
    assert len(times) == steps + 1 and all(a > b for a, b in pairwise(times))
    close = 0.021 if spacing == "lcm" else 0.0011
    assert times[0] <= first + 0.0011 and (spacing == "leading" or times[0] >= first - close)


@pytest.mark.parametrize("kind", ["scaled_linear", "vp", "ve", "edm"])
def test_spacings_by_noise_level_are_their_formulas(kind: str) -> None:
    chosen = ALL[kind]
    levels = {
        name: [chosen.noise_level(t) for t in timesteps(name, 9, chosen)[:-1]]
        for name in ("karras", "exponential", "log_snr")
    }
    high, low = chosen.noise_level(1.0), chosen.noise_level(chosen.first)
    ramp = torch.linspace(0, 1, 9, dtype=F64)
    karras = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert np.allclose(levels["karras"], karras, rtol=1e-9)
    assert np.allclose(
        levels["exponential"],
        torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high))),
        rtol=1e-9,
    )
    # the same thing where the level is finite at t = 1
    assert np.allclose(levels["log_snr"], levels["exponential"], rtol=1e-9)
    ended = timesteps("karras", 9, chosen, end=0.5)
    assert ended[-2] == 0.5 and len(ended) == 10


def test_spacings_of_a_flow_are_over_its_own_time() -> None:
    """sigma/alpha is infinite at t = 1: levels there are sigma/(alpha + sigma) = t, as in
    diffusers' flow schedulers.
    """
    flow = schedule("flow")
    assert np.allclose(timesteps("exponential", 5, flow)[:-1], np.geomspace(1, 0.001, 5))
    karras = (1 + np.linspace(0, 1, 5) * (0.001 ** (1 / 7) - 1)) ** 7
    assert np.allclose(timesteps("karras", 5, flow)[:-1], karras)
    lam = [float(flow.log_snr(t)) for t in timesteps("log_snr", 7, flow)[1:-1]]
    assert np.allclose(np.diff(lam), np.diff(lam)[0])


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.4, 2.0), (3.0, 0.7)])
def test_beta_times_are_quantiles(a: float, b: float) -> None:
    times = timesteps("beta", 20, schedule("flow"), a=a, b=b)
    assert np.allclose(stats.beta.cdf(times, a, b), np.arange(20, -1, -1) / 20, atol=1e-6)


def test_align_your_steps_is_its_table_at_ten_steps_and_log_linear_elsewhere() -> None:
    chosen = schedule("scaled_linear")
    ten = timesteps("align_your_steps", 10, chosen)
    assert [round(1000 * t) - 1 for t in ten[:-1]] == list(ALIGN_YOUR_STEPS["sd15"])
    nineteen = timesteps("align_your_steps", 19, chosen)
    assert np.allclose(nineteen[:-1:2], ten[:-1], atol=1e-9)  # every second is the table's
    for low, middle, high in zip(nineteen[2:-1:2], nineteen[1:-2:2], nineteen[:-3:2], strict=True):
        assert chosen.noise_level(middle) == pytest.approx(
            math.sqrt(chosen.noise_level(low) * chosen.noise_level(high)), rel=1e-6
        )


def test_truncated_runs_begin_at_the_requested_time() -> None:
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (
        truncate(times, 0.6) == [0.6, 0.5, 0.25, 0.0]
        and truncate(times, 0.5) == [0.5, 0.25, 0.0]
        and truncate(times, 1.0) == times
    )
    for start in (0.0, 1.1):
        with pytest.raises(UserError, match="start="):
            truncate(times, start)


@pytest.mark.parametrize(
    ("spacing", "steps", "options", "words"),
    [
        ("karas", 10, {}, "unknown timestep spacing 'karas': did you mean 'karras'"),
        ("trailing", 0, {}, "steps=0: expected a whole number of at least 1"),
        ("trailing", 5, {"start": 0.0}, r"start=0.0: expected a number in \(0, 1\]; 1 is noise"),
        ("trailing", 5, {"start": 1.1}, r"start=1.1: expected a number in \(0, 1\]; 1 is noise"),
        ("leading", 1001, {}, "the model's noise table has 1000 times"),
        ("karras", 5, {"rho": 0.0}, "rho=0.0"),
        ("karras", 5, {"end": 1.0}, "end=1.0"),
        ("shifted", 5, {"shift": -1.0}, "shift=-1.0"),
        ("beta", 5, {"a": 0.0}, "a=0.0"),
        ("lcm", 51, {}, "steps=51: a model distilled at 50 times"),
    ],
)
def test_impossible_times_are_refused(spacing: str, steps: int, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        timesteps(spacing, steps, schedule("scaled_linear"), **options)


@pytest.mark.parametrize(
    "times", [[1.0], [1.0, 1.0, 0.0], [0.5, 0.7], [1.2, 0.0], [0.5, -0.1], [math.nan, 0.0]]
)
def test_lists_of_times_that_do_not_fall_are_refused(times: list[float]) -> None:
    with pytest.raises(UserError, match="fall strictly"):
        check_times(times)


# ---- weights and times of training ---------------------------------------------------------------


@pytest.mark.parametrize("kind", (*PRESERVING, "flow"))
def test_min_snr_is_the_published_closed_form(kind: str) -> None:
    """Hang et al. 2023, section 3.4: min(SNR, 5) for x0, min(SNR, 5)/SNR for eps, min(SNR, 5)/(SNR
    + 1) for v.
    """
    chosen = schedule(kind)
    t = torch.linspace(0.001, 0.999, 200, dtype=F64)
    snr = chosen.log_snr(t).exp()
    clipped = snr.clamp(max=5)
    expected = {
        "x0": clipped,
        "eps": clipped / snr,
        "v": clipped / (snr + 1),
        "flow": clipped * t.square(),
    }
    # v = alpha*eps - sigma*z there has alpha^2 + sigma^2 != 1, and eps is refused
    if kind == "flow":
        del expected["eps"], expected["v"]
    else:
        del expected["flow"]
    for name, values in expected.items():
        output = loss_weight("min_snr", Process(chosen, parameterization(name)), t)
        torch.testing.assert_close(output, values, rtol=1e-9, atol=0)
        assert torch.equal(
            loss_weight("plain", Process(chosen, parameterization(name)), t),
            torch.ones(200, dtype=F64),
        )
    assert loss_weight(
        "min_snr", Process(chosen, parameterization("x0")), t[:1], gamma=2.0
    ) == pytest.approx(2)
    with pytest.raises(UserError, match="unknown weighting"):
        loss_weight("p2", Process(chosen, parameterization("v")), t)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_min_snr_weighs_the_error_of_x0_alike_in_every_parameterization(
    kind: str, name: str
) -> None:
    """weight * |y' - y|^2 = min(SNR, 5) * |x0' - x0|^2, whatever y is."""
    process = Process(schedule(kind), parameterization(name))
    x, y, other = (normal(1, 1, 2, 2, seed=s) for s in range(3))
    for t in (max(0.05, process.schedule.first), 0.5, 0.9):
        moved = process.split(x, other, t).x0 - process.split(x, y, t).x0
        weight = loss_weight("min_snr", process, torch.tensor([t], dtype=F64))
        left = weight * (other - y).square().sum()
        assert float(left) == pytest.approx(
            float(process.schedule.log_snr(t).exp().clamp(max=5) * moved.square().sum()), rel=1e-6
        )


ALARM = 1e-4  # false alarms of each distribution test, if its seed were drawn anew


def test_uniform_times_are_stratified_and_each_of_them_is_uniform() -> None:
    process = Process(schedule("flow"), parameterization("flow"))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_times("uniform", process, 16, generator) for _ in range(1500)])
    # one in each interval
    assert torch.equal(
        (draws * 16).floor().sort(1).values, torch.arange(16, dtype=F64).expand(1500, 16)
    )
    for column in (draws[:, 0], draws[:, 7]):
        assert stats.kstest(column.numpy(), "uniform").pvalue > ALARM
    # -1/15 in theory: no order in the batch
    assert abs(stats.pearsonr(draws[:, 0].numpy(), draws[:, 1].numpy()).statistic) < 0.2


def test_logit_normal_times_have_their_distribution() -> None:
    process = Process(schedule("flow"), parameterization("flow"))
    for mean, std in ((0.0, 1.0), (-0.5, 1.3)):
        t = draw_times(
            "logit_normal", process, 4000, torch.Generator().manual_seed(1), mean=mean, std=std
        )
        assert stats.kstest(torch.logit(t).numpy(), "norm", args=(mean, std)).pvalue > ALARM
        # it can fail
        assert stats.kstest(torch.logit(t).numpy(), "norm", args=(mean + 0.2, std)).pvalue < ALARM
    with pytest.raises(UserError, match="unknown distribution"):
        draw_times("cosmap", process, 4, torch.Generator())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_training_visits_every_time_and_never_zero(kind: str) -> None:
    process = Process(schedule(kind), parameterization("v"))
    t = draw_times("uniform", process, 5000, torch.Generator().manual_seed(0))
    assert t.dtype == F64 and t.min() > 0 and t.max() <= 1
    if kind not in TABLES:
        assert t.min() < 0.0005 and t.max() > 0.9995
    else:  # the grid itself: 5 draws at each of 1000 points, because they are stratified
        values, counts = torch.unique((t * 1000).round(), return_counts=True)
        assert torch.equal(values, torch.arange(1, 1001, dtype=F64)) and (counts == 5).all()
        assert (t * 1000 - (t * 1000).round()).abs().max() < 1e-9
    assert process.schedule.sample_times(torch.tensor([0.0, 1.0])).min() > 0


IDENTITIES = [
    ("euler", {}, "ddim", {}),
    ("dpm_solver_1", {}, "ddim", {}),
    ("lms", {"order": 1}, "ddim", {}),
    ("deis", {"order": 1}, "ddim", {}),
    ("unipc", {"order": 1, "corrector": False}, "ddim", {}),
    ("tcd", {"eta": 0.0}, "ddim", {}),
    ("euler_ancestral", {"eta": 0.0}, "ddim", {}),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", {}),
    ("edm", {"churn": 0.0}, "heun", {}),
    ("restart", {"restarts": 0}, "heun", {}),
    ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s", {}),
    ("euler_ancestral", {"eta": 1.0}, "ddpm", {}),
    ("ddim", {"eta": 1.0}, "ddpm", {}),
    ("tcd", {"eta": 1.0}, "consistency", {}),
]


@pytest.mark.parametrize("kind", ["scaled_linear", "cosine", "flow", "edm", "zero terminal SNR"])
@pytest.mark.parametrize(
    ("one", "options", "other", "others"),
    IDENTITIES,
    ids=lambda v: str(v) if isinstance(v, str) else "",
)
def test_samplers_that_are_one_and_the_same(
    kind: str, one: str, options: dict, other: str, others: dict
) -> None:
    """With the same noise, in the coordinates of every schedule, up to rounding."""
    chosen = ALL[kind]
    times = timesteps("trailing", 9, chosen) if kind != "edm" else timesteps("karras", 9, chosen)
    x = math.hypot(*chosen.point(1.0)) * normal(20, 2, 1, 1)
    ends = [
        run_sampler(
            find("diffuse.samplers", name)(x, times, chosen, stream(x.shape), **values),
            exact_denoiser(chosen),
            1,
        )
        for name, values in ((one, options), (other, others))
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-7, atol=1e-7)
