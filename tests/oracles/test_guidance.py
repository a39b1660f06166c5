"""Guidance against its algebra: linear, the same in every parameterization, one call where it is off and one of twice the size where it is on."""

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.diffuse.parameterization import PARAMETERIZATIONS, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.sample import answered
from sfumato.diffuse.schedule import SCHEDULES, schedule
from sfumato.errors import UserError
from sfumato.predict.denoiser import Denoiser, answer
from sfumato.predict.guidance.combines.linear import Linear
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.weights.constant import Constant
from sfumato.types import Conditioning, Prediction

PAIRS = [pair for pair in product(SCHEDULES, PARAMETERIZATIONS) if pair != ("flow", "eps")]


def classifier_free(denoiser, reference, weight):
    """The guided denoiser as a function."""

    def guided(x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        point = denoiser.process.schedule.point if isinstance(denoiser, Denoiser) else schedule("cosine").point
        ask = guide(denoiser, conditioning, [(denoiser, reference)], Constant(weight), Linear(), point)
        return answered(ask(x, t), answer)

    return guided


class Counted(nn.Module):
    """y = scale * sin(x) + the class's own picture; remembers the size of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = nn.Parameter(torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.calls: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.vector is not None
        self.calls.append(len(x))
        return 0.3 * x.sin() + (timestep / 1000)[:, None, None, None] + torch.einsum("bk,kchw->bchw", conditioning.vector, self.pictures)


def classes(*labels: int) -> Conditioning:
    return Conditioning(vector=torch.eye(3)[list(labels)])


def setup(kind: str = "cosine", name: str = "v") -> tuple[Denoiser, Tensor, Conditioning, Conditioning]:
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return Denoiser(Counted().requires_grad_(False), Process(schedule(kind), parameterization(name))), x, classes(0, 1, 0), classes(2, 2, 2)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_calls_are_counted(weight: float) -> None:
    """w = 1 is one pass of B; anything else is one pass of 2B, never two passes."""
    denoiser, x, conditioning, reference = setup()
    found = classifier_free(denoiser, reference, weight)(x, 0.4, conditioning)
    assert denoiser.network.calls == ([3] if weight == 1 else [6])
    assert found.x0.shape == found.eps.shape == x.shape


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 3.0, 7.5])
def test_the_combination_does_not_depend_on_the_parameterization(kind: str, name: str, weight: float) -> None:
    """Mixing predictions is mixing the network's outputs: split is linear in (x, y), and the weights of a mixture sum to 1."""
    denoiser, x, conditioning, reference = setup(kind, name)
    t = 0.4
    ours, theirs = (denoiser.output(x, t, c).double() for c in (conditioning, reference))
    expected = denoiser.process.split(x.double(), theirs + weight * (ours - theirs), t)
    found = classifier_free(denoiser, reference, weight)(x, t, conditioning)
    size = 2e-6 * (1 + weight) * max(1.0, float(1 / denoiser.process.parameterization.determinant(*denoiser.process.schedule.at(t))))
    for a, b in ((found.x0, expected.x0), (found.eps, expected.eps)):
        assert (a - b).abs().max() < size * max(1.0, float(b.abs().max()))
    # and what it claims is consistent: x = alpha*x0 + sigma*eps
    assert torch.allclose(denoiser.process.add_noise(found.x0, found.eps, t), x, atol=1e-4)


def test_weight_one_is_the_condition_and_weight_zero_the_reference() -> None:
    denoiser, x, conditioning, reference = setup()
    on, off = denoiser(x, 0.4, conditioning), denoiser(x, 0.4, reference)
    one = classifier_free(denoiser, reference, 1.0)(x, 0.4, conditioning)
    zero = classifier_free(denoiser, reference, 0.0)(x, 0.4, conditioning)
    assert torch.equal(one.x0, on.x0) and torch.equal(one.eps, on.eps)
    assert torch.equal(zero.x0, off.x0) and torch.equal(zero.eps, off.eps)
    assert not torch.allclose(on.x0, off.x0)


@settings(max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(weight=st.floats(0, 20), seed=st.integers(0, 99))
def test_the_combination_is_linear_in_its_weight(weight: float, seed: int) -> None:
    """prediction(w) = (1 - w) * prediction(0) + w * prediction(1), eq. 6; for conditions that are equal w does not matter."""
    denoiser, _, conditioning, reference = setup()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    at = [classifier_free(denoiser, reference, w)(x, 0.7, conditioning) for w in (0.0, 1.0, weight)]
    for zero, one, found in zip(*((p.x0, p.eps) for p in at), strict=True):
        assert torch.allclose(found, (1 - weight) * zero + weight * one, atol=1e-5 * (1 + weight))
    same = classifier_free(denoiser, conditioning, weight)(x, 0.7, conditioning)
    assert torch.allclose(same.x0, at[1].x0, atol=1e-5 * (1 + weight))


def test_guidance_sharpens_a_gaussian_as_its_formula_says() -> None:
    """Classes N(m, 1) and N(-m, 1), both equally likely: at w the score is that of p(x) p(c | x)^w (Ho & Salimans 2022, section 3.2)."""
    table, m, t, weight = schedule("cosine"), 1.3, 0.5, 3.0
    alpha, sigma = (float(v) for v in table.at(t))

    def denoise(x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        assert conditioning.vector is not None
        mean = conditioning.vector @ torch.tensor([m, -m, math.nan], dtype=torch.float64).nan_to_num(0)
        mean = torch.where(conditioning.vector[:, 2] > 0, m * torch.tanh(alpha * m * x.flatten()), mean).reshape(x.shape)
        return Prediction(mean + alpha * (x - alpha * mean), sigma * (x - alpha * mean))  # alpha^2 + sigma^2 = 1

    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    both = Conditioning(vector=torch.eye(3, dtype=torch.float64)[[0] * 9]), Conditioning(vector=torch.eye(3, dtype=torch.float64)[[2] * 9])
    found = classifier_free(denoise, both[1], weight)(x, t, both[0])
    points = x.clone().requires_grad_()
    log_p = -points.square() / 2 + torch.log(torch.cosh(alpha * m * points)) - (alpha * m) ** 2 / 2
    log_class = torch.nn.functional.logsigmoid(2 * alpha * m * points)
    (score,) = torch.autograd.grad((log_p + weight * log_class).sum(), points)
    torch.testing.assert_close(found.eps, -sigma * score, rtol=1e-9, atol=1e-9)


def test_a_batch_is_guided_row_by_row() -> None:
    """Row k of a batch is what it is alone: neighbours do not leak through the doubled batch."""
    denoiser, x, conditioning, reference = setup()
    together = classifier_free(denoiser, reference, 4.0)(x, 0.3, conditioning)
    for k in range(3):
        row = slice(k, k + 1)
        alone = classifier_free(denoiser, reference[row], 4.0)(x[row], 0.3, conditioning[row])
        assert torch.allclose(alone.x0, together.x0[row], atol=1e-6)


def test_conditions_with_different_doors_are_refused() -> None:
    denoiser, x, conditioning, _ = setup()
    with pytest.raises(ValueError, match="'vector' is set in some parts"):
        classifier_free(denoiser, Conditioning(), 2.0)(x, 0.4, conditioning)


class InItsOwnDtype(nn.Module):
    """Says what it was called with, and returns zeros in its dtype."""

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
    found = denoiser(x, 0.5, Conditioning(vector=torch.ones(2, 3)))
    assert network.seen == (dtype, torch.float32, dtype, [499.0, 499.0])  # timesteps stay exact: 999 is no bfloat16
    assert found.x0.dtype == found.eps.dtype == torch.float32
    alpha, sigma = (float(v) for v in denoiser.process.schedule.at(0.5))
    assert torch.allclose(found.x0, alpha * x) and torch.allclose(found.eps, sigma * x)  # v = 0
    denoiser(x, torch.tensor([0.001, 1.0]), Conditioning(vector=torch.ones(2, 3)))
    assert network.seen[3] == pytest.approx([0.0, 999.0], abs=1e-4)


def test_dropping_and_joining_conditions() -> None:
    """`drop` takes rows from the null condition, `cat` joins batches, indexing gives them back; unequal doors are refused."""
    a = Conditioning(tokens=torch.randn(3, 4, 5), mask=torch.ones(3, 4, dtype=torch.bool), residuals=(torch.ones(3, 1, 2, 2),))
    null = Conditioning(tokens=torch.zeros(3, 4, 5), mask=torch.zeros(3, 4, dtype=torch.bool), residuals=(torch.zeros(3, 1, 2, 2),))
    dropped = a.drop(torch.tensor([False, True, False]), null)
    assert torch.equal(dropped.tokens[[0, 2]], a.tokens[[0, 2]]) and (dropped.tokens[1] == 0).all()
    assert dropped.mask.sum(1).tolist() == [4, 0, 4] and dropped.residuals[0].sum((1, 2, 3)).tolist() == [4, 0, 4]
    joined = Conditioning.cat([a, null])
    assert torch.equal(joined[:3].tokens, a.tokens) and torch.equal(joined[3:].residuals[0], null.residuals[0])
    half = a.to(dtype=torch.bfloat16)
    assert half.tokens.dtype == torch.bfloat16 and half.mask.dtype == torch.bool and a.tokens.dtype == torch.float32
    with pytest.raises(ValueError, match="missing in others"):
        Conditioning.cat([a, Conditioning(tokens=a.tokens)])


@pytest.mark.parametrize("file", ["ddim", "classifier_fre"])
def test_unknown_guidance_is_refused(file: str) -> None:
    from sfumato.registry import find, names

    assert find("predict.guidance", "classifier_free") is classifier_free and "classifier_free" in names("predict.guidance")
    with pytest.raises(UserError, match=f"unknown guidance {file!r}"):
        find("predict.guidance", file)
