"""Guidance against its algebra: linear, the same in every parameterization, one call where it is
off, one of twice the size elsewhere.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.batching import DenoiseFn, drive
from sfumato.diffuse.parameterization import PARAMETERIZATIONS, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import SCHEDULES, schedule
from sfumato.errors import UserError
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.algebra import total
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.moment import Moment
from sfumato.predict.guidance.rules.linear import Linear
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.guidance.weights.constant import Constant
from sfumato.registry import find
from sfumato.types import Conditioning, Prediction


def solvable(kind: str, name: str) -> bool:
    """True if `Process` takes the pair.

    It refuses a time at which y does not depend on z, or x not on eps.
    """
    try:
        Process(schedule(kind), parameterization(name))
    except UserError:
        return False
    return True


PAIRS = [pair for pair in product(SCHEDULES, PARAMETERIZATIONS) if solvable(*pair)]
assert ("flow", "eps") not in PAIRS and len(PAIRS) > 30


def classifier_free(denoiser, reference, weight):
    """The guided denoiser as a function."""

    def guided(x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        point = (
            denoiser.process.schedule.point
            if isinstance(denoiser, Denoiser)
            else schedule("cosine").point
        )
        ask = guide(
            denoiser, conditioning, [(denoiser, reference)], Constant(weight), Linear(), point
        )
        return drive(ask(x, t), evaluate_calls)

    return guided


class Counted(nn.Module):
    """y = scale * sin(x) + the class's own picture; remembers the size of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = nn.Parameter(
            torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        )
        self.calls: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.vector is not None
        self.calls.append(len(x))
        return (
            0.3 * x.sin()
            + (timestep / 1000)[:, None, None, None]
            + torch.einsum("bk,kchw->bchw", conditioning.vector, self.pictures)
        )


def classes(*labels: int) -> Conditioning:
    return Conditioning(vector=torch.eye(3)[list(labels)])


def setup(
    kind: str = "cosine", name: str = "v"
) -> tuple[Denoiser, Tensor, Conditioning, Conditioning]:
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return (
        Denoiser(Counted().requires_grad_(False), Process(schedule(kind), parameterization(name))),
        x,
        classes(0, 1, 0),
        classes(2, 2, 2),
    )


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_calls_are_counted(weight: float) -> None:
    """w = 1 is one pass of B; anything else is one pass of 2B, never two passes."""
    denoiser, x, conditioning, reference = setup()
    result = classifier_free(denoiser, reference, weight)(x, 0.4, conditioning)
    assert denoiser.network.calls == ([3] if weight == 1 else [6])
    assert result.x0.shape == result.eps.shape == x.shape


def condition(process: Process, t: float) -> float:
    """By how much `split` may enlarge a rounding error of x and y: the largest coefficient of its
    2x2 solve.
    """
    alpha, sigma = process.schedule.at(t)
    a, b = process.parameterization.row(alpha, sigma)
    return max(
        1.0,
        float(
            torch.stack([a, b, alpha, sigma]).abs().max()
            / process.parameterization.determinant(alpha, sigma).abs()
        ),
    )


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 3.0, 7.5])
def test_the_combination_does_not_depend_on_the_parameterization(
    kind: str, name: str, weight: float
) -> None:
    """Mixing predictions is mixing the network's outputs: split is linear in (x, y), and the
    weights of a mixture sum to 1.
    """
    denoiser, x, conditioning, reference = setup(kind, name)
    t = 0.4
    conditional, unconditional = (
        denoiser.output(x, t, c).double() for c in (conditioning, reference)
    )
    expected = denoiser.process.split(
        x.double(), unconditional + weight * (conditional - unconditional), t
    )
    result = classifier_free(denoiser, reference, weight)(x, t, conditioning)
    size = 2e-6 * (1 + weight) * condition(denoiser.process, t)
    for a, b in ((result.x0, expected.x0), (result.eps, expected.eps)):
        assert (a - b).abs().max() < size * max(1.0, float(b.abs().max()))
    # and what it claims is consistent: x = alpha*x0 + sigma*eps
    assert torch.allclose(denoiser.process.add_noise(result.x0, result.eps, t), x, atol=1e-4)


def test_weight_one_is_the_condition_and_weight_zero_the_reference() -> None:
    denoiser, x, conditioning, reference = setup()
    on, off = denoiser(x, 0.4, conditioning), denoiser(x, 0.4, reference)
    one = classifier_free(denoiser, reference, 1.0)(x, 0.4, conditioning)
    zero = classifier_free(denoiser, reference, 0.0)(x, 0.4, conditioning)
    assert torch.equal(one.x0, on.x0) and torch.equal(one.eps, on.eps)
    assert torch.equal(zero.x0, off.x0) and torch.equal(zero.eps, off.eps)
    assert not torch.allclose(on.x0, off.x0)


@settings(
    max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(weight=st.floats(0, 20), seed=st.integers(0, 99))
def test_the_combination_is_linear_in_its_weight(weight: float, seed: int) -> None:
    """prediction(w) = (1 - w) * prediction(0) + w * prediction(1), eq. 6; for conditions that are
    equal w does not matter.
    """
    denoiser, _, conditioning, reference = setup()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    at = [classifier_free(denoiser, reference, w)(x, 0.7, conditioning) for w in (0.0, 1.0, weight)]
    for zero, one, result in zip(*((p.x0, p.eps) for p in at), strict=True):
        assert torch.allclose(result, (1 - weight) * zero + weight * one, atol=1e-5 * (1 + weight))
    same = classifier_free(denoiser, conditioning, weight)(x, 0.7, conditioning)
    assert torch.allclose(same.x0, at[1].x0, atol=1e-5 * (1 + weight))


def test_guidance_sharpens_a_gaussian_by_its_formula() -> None:
    """Classes N(m, 1) and N(-m, 1), both equally likely: at w the score is that of p(x) p(c | x)^w
    (Ho & Salimans 2022, section 3.2).
    """
    table, m, t, weight = schedule("cosine"), 1.3, 0.5, 3.0
    alpha, sigma = (float(v) for v in table.at(t))

    def denoise(x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        assert conditioning.vector is not None
        mean = conditioning.vector @ torch.tensor(
            [m, -m, math.nan], dtype=torch.float64
        ).nan_to_num(0)
        mean = torch.where(
            conditioning.vector[:, 2] > 0, m * torch.tanh(alpha * m * x.flatten()), mean
        ).reshape(x.shape)
        # alpha^2 + sigma^2 = 1
        return Prediction(mean + alpha * (x - alpha * mean), sigma * (x - alpha * mean))

    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    both = (
        Conditioning(vector=torch.eye(3, dtype=torch.float64)[[0] * 9]),
        Conditioning(vector=torch.eye(3, dtype=torch.float64)[[2] * 9]),
    )
    result = classifier_free(denoise, both[1], weight)(x, t, both[0])
    points = x.clone().requires_grad_()
    log_p = -points.square() / 2 + torch.log(torch.cosh(alpha * m * points)) - (alpha * m) ** 2 / 2
    log_class = torch.nn.functional.logsigmoid(2 * alpha * m * points)
    (score,) = torch.autograd.grad((log_p + weight * log_class).sum(), points)
    torch.testing.assert_close(result.eps, -sigma * score, rtol=1e-9, atol=1e-9)


def test_a_batch_is_guided_row_by_row() -> None:
    """Row k of a batch is the same as alone.

    Neighbours do not leak through the doubled batch.
    """
    denoiser, x, conditioning, reference = setup()
    together = classifier_free(denoiser, reference, 4.0)(x, 0.3, conditioning)
    for k in range(3):
        row = slice(k, k + 1)
        alone = classifier_free(denoiser, reference[row], 4.0)(x[row], 0.3, conditioning[row])
        assert torch.allclose(alone.x0, together.x0[row], atol=1e-6)


class Open(nn.Module):
    """A network that takes a vector, tokens or nothing, and remembers the size of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append(len(x))
        pulls = [
            v.flatten(1).sum(1)[:, None, None, None]
            for v in (conditioning.vector, conditioning.tokens)
            if v is not None
        ]
        return 0.3 * x + sum(pulls, torch.zeros(()))


def test_conditions_of_different_inputs_take_two_passes() -> None:
    """An image prompt and no image prompt, for example.

    Evaluations whose conditions have different fields cannot be one batch.
    """
    _, x, conditioning, other = setup()
    denoiser = Denoiser(Open(), Process(schedule("cosine"), parameterization("v")))
    nothing, tokens = Conditioning(), Conditioning(tokens=torch.ones(3, 2, 2))
    for reference, calls in ((other, [6]), (nothing, [3, 3]), (tokens, [3, 3])):
        denoiser.network.calls.clear()
        result = classifier_free(denoiser, reference, 2.0)(x, 0.4, conditioning)
        assert denoiser.network.calls == calls
        on, off = denoiser(x, 0.4, conditioning), denoiser(x, 0.4, reference)
        torch.testing.assert_close(result.x0, off.x0 + 2.0 * (on.x0 - off.x0))
        torch.testing.assert_close(result.eps, off.eps + 2.0 * (on.eps - off.eps))


class InItsOwnDtype(nn.Module):
    """Record the inputs of a call, and return zeros in the network's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.seen: tuple = ()

    def forward(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.vector is not None
        self.seen = (x.dtype, timestep.dtype, conditioning.vector.dtype, timestep.tolist())
        return x * 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_denoiser_casts_for_the_network_and_back(dtype: torch.dtype) -> None:
    network = InItsOwnDtype(dtype)
    denoiser = Denoiser(network, Process(schedule("linear"), parameterization("v")))
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    result = denoiser(x, 0.5, Conditioning(vector=torch.ones(2, 3)))
    # Timesteps and the vector, which may hold sizes in pixels, stay exact: 999 is no bfloat16.
    assert network.seen == (dtype, torch.float32, torch.float32, [499.0, 499.0])
    assert result.x0.dtype == result.eps.dtype == torch.float32
    alpha, sigma = (float(v) for v in denoiser.process.schedule.at(0.5))
    assert torch.allclose(result.x0, alpha * x) and torch.allclose(result.eps, sigma * x)  # v = 0
    denoiser(x, torch.tensor([0.001, 1.0]), Conditioning(vector=torch.ones(2, 3)))
    assert network.seen[3] == pytest.approx([0.0, 999.0], abs=1e-4)


def test_dropping_and_joining_conditions() -> None:
    """`drop` takes rows from the null condition, `cat` joins batches, indexing gives them back;
    unequal doors are refused.
    """
    a = Conditioning(
        tokens=torch.randn(3, 4, 5),
        mask=torch.ones(3, 4, dtype=torch.bool),
        residuals=(torch.ones(3, 1, 2, 2),),
    )
    null = Conditioning(
        tokens=torch.zeros(3, 4, 5),
        mask=torch.zeros(3, 4, dtype=torch.bool),
        residuals=(torch.zeros(3, 1, 2, 2),),
    )
    dropped = a.drop(torch.tensor([False, True, False]), null)
    assert torch.equal(dropped.tokens[[0, 2]], a.tokens[[0, 2]]) and (dropped.tokens[1] == 0).all()
    assert dropped.mask.sum(1).tolist() == [4, 0, 4] and dropped.residuals[0].sum(
        (1, 2, 3)
    ).tolist() == [4, 0, 4]
    joined = Conditioning.cat([a, null])
    assert torch.equal(joined[:3].tokens, a.tokens) and torch.equal(
        joined[3:].residuals[0], null.residuals[0]
    )
    half = a.to(dtype=torch.bfloat16)
    assert (
        half.tokens.dtype == torch.bfloat16
        and half.mask.dtype == torch.bool
        and a.tokens.dtype == torch.float32
    )
    with pytest.raises(ValueError, match="missing in others"):
        Conditioning.cat([a, Conditioning(tokens=a.tokens)])


@pytest.mark.parametrize(
    "folder", ["predict.guidance.weights", "predict.guidance.rules", "predict.guidance_models"]
)
def test_unknown_parts_are_refused(folder: str) -> None:
    with pytest.raises(UserError, match=f"unknown {folder.split('.')[-1][:-1]} 'interva'"):
        find(folder, "interva")
    assert (
        find("predict.guidance.weights", "constant") is Constant
        and find("predict.guidance.rules", "linear") is Linear
    )


# ---- the formulas of combines, written again -----------------------------------------------------

POINTS = [(0.0, 1.0), (0.3, 0.954), (0.5, 0.5), (1.0, 14.6), (0.999, 0.04)]
points = pytest.mark.parametrize("point", POINTS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(
        shape or (3, 2, 4, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def pair(x: Tensor, velocity: Tensor, point: tuple[float, float]) -> Prediction:
    """The prediction at x with eps - x0 = velocity."""
    alpha, sigma = point
    return Prediction(
        (x - sigma * velocity) / (alpha + sigma), (x + alpha * velocity) / (alpha + sigma)
    )


def predictions(
    point: tuple[float, float], count: int = 2, seed: int = 0
) -> tuple[Tensor, Moment, list[Prediction]]:
    x = normal(seed)
    return (
        x,
        Moment(0.5, *point, index=9),
        [pair(x, 0.4 * x + normal(seed + k + 1), point) for k in range(count)],
    )


def join(
    name: str, inputs: tuple[Tensor, Moment, list[Prediction]], w: float | Tensor, **options
) -> Prediction:
    return find("predict.guidance.rules", name)(**options).begin()(*inputs, w)


def near(result: Prediction, expected: Prediction, tolerance: float = 1e-10) -> None:
    for a, b in ((result.x0, expected.x0), (result.eps, expected.eps)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@points
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_keeps_the_conditionals_contrast(point: tuple[float, float], phi: float) -> None:
    """Lin et al., eq. 15-16, on x0: at phi 1 each image has the conditional's standard deviation,
    at phi 0 that of plain guidance.
    """
    inputs = predictions(point)
    result, (conditional, _), plain = (
        join("rescale", inputs, 5.0, phi=phi),
        inputs[2],
        join("linear", inputs, 5.0),
    )
    width, wide, kept = (p.x0.flatten(1).std(1) for p in (result, plain, conditional))
    torch.testing.assert_close(width, phi * kept + (1 - phi) * wide)
    direction = [(p.x0 / p.x0.flatten(1).norm(dim=1)[:, None, None, None]) for p in (result, plain)]
    torch.testing.assert_close(*direction)  # only the length changes
    if phi == 0:
        near(result, plain, 1e-8)


@points
def test_projection_with_nothing_taken_away_is_plain_guidance(point: tuple[float, float]) -> None:
    inputs = predictions(point)
    near(join("project", inputs, 4.0, eta=1.0), join("linear", inputs, 4.0), 1e-8)


@points
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_projection_damps_the_part_along_the_conditional(
    point: tuple[float, float], eta: float
) -> None:
    """Of the step from x0_c, the part along x0_c is eta times that of plain guidance, and the part
    across is the same.
    """
    inputs = predictions(point)
    base = inputs[2][0].x0
    steps = [join("project", inputs, 4.0, eta=eta).x0 - base, join("linear", inputs, 4.0).x0 - base]
    along = [
        torch.linalg.vecdot(s.flatten(1), base.flatten(1)) / base.flatten(1).square().sum(1)
        for s in steps
    ]
    across = [s - a[:, None, None, None] * base for s, a in zip(steps, along, strict=True)]
    torch.testing.assert_close(along[0], eta * along[1])
    torch.testing.assert_close(*across)


def test_projection_bounds_its_step_and_remembers() -> None:
    """Each image's ||x0 - x0_c|| is at most (w - 1) times the threshold; momentum is D_k + m
    D_(k-1) + m^2 D_(k-2) ...
    """
    inputs = [predictions((0.5, 0.5), seed=10 * k) for k in range(3)]
    steps = [g[2][0].x0 - g[2][1].x0 for g in inputs]
    bound = 0.7 * steps[0].flatten(1).norm(dim=1).median()
    for k, size in enumerate(
        (join("project", inputs[0], 3.0, eta=1.0, threshold=float(bound)).x0 - inputs[0][2][0].x0)
        .flatten(1)
        .norm(dim=1)
    ):
        torch.testing.assert_close(size, 2.0 * torch.minimum(bound, steps[0][k].norm()))
    combine = find("predict.guidance.rules", "project")(eta=1.0, momentum=-0.5).begin()
    for k in range(3):
        result = combine(*inputs[k], 3.0)
        torch.testing.assert_close(
            result.x0 - inputs[k][2][0].x0,
            2.0 * sum((-0.5) ** (k - j) * steps[j] for j in range(k + 1)),
        )


@points
@pytest.mark.parametrize("w", [0.0, 1.0, 3.5])
def test_zero_star_scales_the_reference_as_well_as_can_be(
    point: tuple[float, float], w: float
) -> None:
    """v = (1 - w) s v_ref + w v_c, where s minimises ||v_c - s v_ref||: no other s is nearer, and
    the residual is orthogonal to v_ref.
    """
    inputs = predictions(point)
    result = join("zero_star", inputs, w, zero_steps=0)
    conditional, unconditional = (p.eps - p.x0 for p in inputs[2])
    flat = [v.flatten(1) for v in (conditional, unconditional)]
    s = torch.stack(
        [
            torch.linalg.lstsq(b[:, None], a[:, None]).solution[0, 0]
            for a, b in zip(*flat, strict=True)
        ]
    )[:, None, None, None]
    torch.testing.assert_close(
        result.eps - result.x0, (1 - w) * s * unconditional + w * conditional
    )
    left = (conditional - s * unconditional).flatten(1)
    assert torch.linalg.vecdot(left, flat[1]).abs().max() < 1e-10
    assert all(
        (left.norm(dim=1) <= (conditional - (s + d) * unconditional).flatten(1).norm(dim=1)).all()
        for d in (-0.1, -1e-3, 1e-3, 0.1)
    )


@points
def test_zero_star_begins_without_moving(point: tuple[float, float]) -> None:
    """At the first times of a run x/(alpha + sigma) stays where it is: for a flow x itself, by one
    step of Euler.
    """
    x, _, pairs = predictions(point)
    for index in range(3):
        result = join("zero_star", (x, Moment(0.5, *point, index), pairs), 3.0, zero_steps=2)
        assert torch.allclose(result.x0, result.eps) == (index < 2)
        if index < 2:
            torch.testing.assert_close(0.3 * result.x0 + 0.7 * result.eps, x / sum(point))


def test_zero_steps_are_those_of_the_run_and_not_of_the_guidance() -> None:
    """With an interval that begins later nothing stands still in the middle of the run; two
    questions at one time are one time.
    """
    denoiser, x, conditioning, reference = setup("flow", "flow")
    point = denoiser.process.schedule.point
    combine, weight = (
        find("predict.guidance.rules", "zero_star")(),
        find("predict.guidance.weights", "interval")(3.0, low=0.0, high=0.5),
    )
    ask = guide(denoiser, conditioning, [(denoiser, reference)], weight, combine, point)

    def stands(ask: DenoiseFn, t: float) -> bool:
        result = drive(ask(x, t), evaluate_calls)
        return torch.equal(result.x0, result.eps)

    assert not any(stands(ask, t) for t in (1.0, 0.7, 0.5, 0.2))
    always = guide(denoiser, conditioning, [(denoiser, reference)], Constant(3.0), combine, point)
    assert [stands(always, t) for t in (1.0, 1.0, 0.7, 0.7)] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["cosine", "ve", "edm", "scaled_linear"])
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.7), (0.5, 0.45), (0.3, 0.0)])
@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0])
def test_plus_plus_by_ddim_is_plain_guidance_by_ddim_with_a_weight_of_the_step(
    kind: str, t: float, s: float, scale: float
) -> None:
    """alpha_s x0_lambda + sigma_s eps_ref is DDIM's step with w = lambda/(1 - e^-h), h the step in
    log(alpha/sigma).

    Pairs that add up to x have eps_c - eps_ref = -(alpha/sigma)(x0_c - x0_ref); put that into both.
    """
    table = schedule(kind)
    here, there = table.point(t), table.point(s)
    inputs = predictions(here)
    decay = there[1] * here[0] / (there[0] * here[1])  # e^-h
    ends = []
    for name, w in (("plus_plus", scale), ("linear", scale / (1 - decay))):
        sampler = find("diffuse.samplers", "ddim")(inputs[0], [t, s], table, lambda: inputs[0])
        next(sampler)
        with pytest.raises(StopIteration) as stop:
            sampler.send(join(name, inputs, w))
        ends.append(stop.value.value)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


@points
@pytest.mark.parametrize("kind", ["chain", "sum", "away"])
def test_two_references(point: tuple[float, float], kind: str) -> None:
    """Brooks et al. eq. 3, Liu et al. and the sum of two guidances; with equal references all are
    plain guidance.
    """
    inputs = predictions(point, 3)
    x, moment, (c, one, two) = inputs
    expected = {
        "chain": lambda c, a, b: b + 2.5 * (a - b) + 7.0 * (c - a),
        "sum": lambda c, a, b: a + 7.0 * (c - a) + 2.5 * (b - a),
        "away": lambda c, a, b: c + 6.0 * (c - a) + 1.5 * (c - b),
    }[kind]
    result = join("dual", inputs, 7.0, kind=kind, second=2.5)
    near(result, Prediction(expected(c.x0, one.x0, two.x0), expected(c.eps, one.eps, two.eps)))
    same = join("dual", (x, moment, [c, one, one]), 7.0, kind=kind, second=2.5)
    near(same, join("linear", (x, moment, [c, one]), 8.5 if kind == "away" else 7.0))


@settings(max_examples=40, deadline=None, database=None)
@given(w=st.floats(0, 12), seed=st.integers(0, 999), t=st.floats(0.02, 0.98))
def test_linear_rules_are_the_same_in_every_parameterization(w: float, seed: int, t: float) -> None:
    """A mixture of predictions is the prediction of the mixture of outputs, here of v: with one
    reference and with two.
    """
    alpha, sigma = point = (math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t))
    x, _, (c, one, two) = inputs = predictions(point, 3, seed)
    v = [alpha * p.eps - sigma * p.x0 for p in (c, one, two)]
    for name, count, mix in (("linear", 2, (w, 1 - w, 0.0)), ("dual", 3, (w, 2.0 - w, -1.0))):
        result = join(
            name,
            (x, inputs[1], [c, one, two][:count]),
            w,
            **({"kind": "chain", "second": 2.0} if name == "dual" else {}),
        )
        output = sum(k * value for k, value in zip(mix, v, strict=True))
        torch.testing.assert_close(
            alpha * result.eps - sigma * result.x0, output, rtol=1e-9, atol=1e-8
        )


# ---- weights along the run -----------------------------------------------------------------------


def weight_at(
    weight, t: float, point: tuple[float, float] = (0.6, 0.8), pairs: list[Prediction] | None = None
) -> float | Tensor:
    return weight.begin()(Moment(t, *point), *(pairs or predictions(point)[2]))


@pytest.mark.parametrize(
    "weight",
    [
        "interval:low=0.3,high=0.6",
        "adaptive:low=-1.5,high=1",
        "ramp:first=0,last=1",
        "ramp:first=1,last=0",
    ],
)
def test_the_second_pass_is_made_only_where_the_weight_is_not_one(weight: str) -> None:
    """Counted at the network: B images where w is 1, 2B elsewhere."""
    denoiser, x, conditioning, reference = setup("flow", "flow")
    point = denoiser.process.schedule.point
    ask = build(Guidance(3.0, weight=weight), denoiser, conditioning, reference, point)
    times = [1.0, 0.8, 0.6, 0.45, 0.3, 0.1]
    for t in times:
        drive(ask(x, t), evaluate_calls)
    inside = {
        "interval": [0.6, 0.45, 0.3],
        "adaptive": [0.6, 0.45],
        "ramp": times[1:] if "first=0" in weight else times,
    }
    assert denoiser.network.calls == [6 if t in inside[weight.split(":")[0]] else 3 for t in times]


def test_ramps_go_from_first_to_last() -> None:
    ramp = find("predict.guidance.weights", "ramp")
    for shape in ("linear", "cosine", "power"):
        weight = ramp(5.0, first=0.5, last=2.0, shape=shape, power=3.0)
        values = [weight_at(weight, t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
        assert values[0] == 3.0 and values[-1] == 9.0 and values == sorted(values)
    assert weight_at(ramp(5.0, shape="linear"), 0.25) == 4.0
    assert weight_at(ramp(5.0, shape="cosine"), 0.5) == pytest.approx(3.0)
    assert weight_at(ramp(5.0, shape="power", power=2.0), 0.5) == 4.0
    mean = sum(weight_at(ramp(5.0, 0.0, 2.0), (k + 0.5) / 100) for k in range(100)) / 100
    assert mean == pytest.approx(5.0), "Wang et al.'s linear scheduler keeps the mean"


@settings(max_examples=60, deadline=None, database=None)
@given(
    scale=st.floats(-2, 12),
    threshold=st.floats(0.01, 3),
    power=st.floats(0.3, 4),
    ratios=st.lists(st.floats(0, 50), min_size=2, max_size=8),
    lowers=st.booleans(),
)
def test_adaptive_weights_are_bounded_and_monotone(
    scale: float, threshold: float, power: float, ratios: list[float], lowers: bool
) -> None:
    """w lies between 1 and scale, and is half way at the threshold.

    It moves with the disagreement in the documented direction.
    """
    ratios = sorted([*ratios, threshold])
    reference = normal(1, 1, 2, 4, 5).expand(len(ratios), -1, -1, -1)
    away = normal(2, 1, 2, 4, 5)
    away = away * reference[:1].norm() / away.norm()
    eps = reference + torch.tensor(ratios, dtype=torch.float64)[:, None, None, None] * away
    weight = find("predict.guidance.weights", "adaptive")(
        scale, "lowers" if lowers else "raises", threshold, power
    )
    pairs = [Prediction(reference, e) for e in (eps, reference)]
    w = (
        torch.as_tensor(weight_at(weight, 0.5, pairs=pairs), dtype=torch.float64)
        .expand(len(ratios), 1, 1, 1)
        .flatten()
    )
    part = (w - 1) / (scale - 1) if scale != 1 else torch.full_like(w, 0.5)
    assert (
        (part >= -1e-12).all()
        and (part <= 1 + 1e-12).all()
        and part[ratios.index(threshold)] == pytest.approx(0.5)
    )
    steps = part.diff() if lowers else -part.diff()
    assert (steps <= 1e-12).all()
    if lowers and power == 1.0:
        assert (
            (w - 1).abs() * torch.tensor(ratios, dtype=torch.float64)
            <= abs(scale - 1) * threshold + 1e-9
        ).all()


def test_adaptive_steps_stay_below_the_threshold() -> None:
    """(w - 1)||eps_c - eps_ref|| < (scale - 1) threshold ||eps_ref||, with power 1, however far the
    two are apart.
    """
    weight = find("predict.guidance.weights", "adaptive")(8.0, threshold=0.2)
    reference = normal(0)
    sizes = []
    for ratio in (0.01, 0.2, 1.0, 100.0, 1e6):
        conditional = reference + ratio * normal(1)
        w = weight_at(
            weight, 0.5, pairs=[Prediction(reference, e) for e in (conditional, reference)]
        )
        sizes.append(
            ((w - 1) * (conditional - reference)).flatten(1).norm(dim=1)
            / reference.flatten(1).norm(dim=1)
        )
    assert all((a < b).all() for a, b in pairwise(sizes)) and (sizes[-1] <= 7.0 * 0.2).all()


@pytest.mark.invariance
def test_sums_over_an_image_do_not_depend_on_its_batch_or_the_threads() -> None:
    """A sum over dims (1, 2, 3) does, from 32768 numbers and two threads on: alone an image is
    split among them, in a batch it is not.
    """
    value, before = (
        torch.randn(4, 4, 256, 256, generator=torch.Generator().manual_seed(0)),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(2)
        together = total(value)
        for k in range(4):
            assert torch.equal(total(value[k : k + 1]), together[k : k + 1])
            assert torch.equal(
                total(value.to(memory_format=torch.channels_last)[k : k + 1]), together[k : k + 1]
            )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together.flatten(), value.sum((1, 2, 3)), rtol=1e-4, atol=1e-2)
