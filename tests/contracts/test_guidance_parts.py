"""The contract of guidance's parts: a file in weights/, rules/ or predict/guidance_models/ is
tested by being there.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.batching import drive
from sfumato.errors import UserError
from sfumato.predict.denoiser import evaluate_calls
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.moment import Moment
from sfumato.predict.guidance.settings import Guidance
from sfumato.predict.guidance.weights import Weight
from sfumato.predict.guidance_models import ALIASES
from sfumato.registry import find, names
from sfumato.types import Conditioning, Prediction

FOLDERS = ("predict.guidance.weights", "predict.guidance.rules", "predict.guidance_models")
PARTS = {
    f"{folder.rpartition('.')[2]}.{name}": find(folder, name)
    for folder in FOLDERS
    for name in names(folder)
}
WEIGHTS = {name: part for name, part in PARTS.items() if name.startswith("weights")}
RULES = {name: part for name, part in PARTS.items() if name.startswith("rules")}
# Settings besides the defaults: those under which a part remembers or does more. Others are found
# by their defaults alone.
MORE: dict[str, list[dict[str, Any]]] = {
    "weights.adaptive": [{"disagreement": "raises", "power": 2.0}, {"low": -1.0, "high": 2.0}],
    "weights.ramp": [{"first": 2.0, "last": 0.0, "shape": "cosine"}, {"shape": "power"}],
    "rules.project": [{"eta": 1.0}, {"threshold": 1.0, "momentum": -0.5}],
    "rules.rescale": [{"phi": 1.0}, {"phi": 0.0}],
    "rules.zero_star": [{"zero_steps": 0}, {"zero_steps": 2}],
    "rules.dual": [
        {"kind": k, "second": s} for k in ("chain", "sum", "away") for s in (0.0, 1.0, 3.0)
    ],
}
SHAPE = (3, 2, 4, 5)
POINTS = {
    "noise alone": (0.0, 1.0),
    "noisy": (0.2, 0.98),
    "middle": (0.5, 0.5),
    "little noise": (1.0, 1e-3),
    "tiny": (1.0, 1e-6),
}


def settings(parts: dict[str, type], **inputs: float) -> list[Any]:
    """pytest parameters: each part with its default settings and with those of MORE."""
    pairs = [(name, {**inputs, **more}) for name in parts for more in ({}, *MORE.get(name, ()))]
    return [pytest.param(parts[name](**options), id=f"{name}-{options}") for name, options in pairs]


every_weight = pytest.mark.parametrize("weight", settings(WEIGHTS, scale=3.0))
every_rule = pytest.mark.parametrize("rule", settings(RULES))
everywhere = pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictions(
    point: tuple[float, float], count: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Prediction]]:
    """x, and `count` predictions for it.

    x0 is near x/alpha where there is signal, and eps adds up to x with it.
    """
    alpha, sigma = point
    x = normal(seed, dtype)
    result = []
    for k in range(count):
        velocity = 0.5 * x + normal(seed + 1 + k, dtype)
        whole = alpha + sigma
        result.append(Prediction((x - sigma * velocity) / whole, (x + alpha * velocity) / whole))
    return x, result


def rows(prediction: Prediction, k: int) -> Prediction:
    return Prediction(prediction.x0[k : k + 1], prediction.eps[k : k + 1])


def equal(a: Prediction, b: Prediction) -> bool:
    return torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps)


# ---- every part ----------------------------------------------------------------------------------


def test_the_folders_are_the_registry() -> None:
    assert {"weights.constant", "rules.linear", "guidance_models.condition"} <= PARTS.keys()
    single = [name.partition(".")[2] for name in PARTS]
    assert len(set(single)) == len(single), (
        "a word of `Guidance.parse` must mean one part: no name may be in two folders"
    )
    assert not any(name[0].isdigit() or name in ("nan", "inf", "infinity") for name in single), (
        "and none a number"
    )


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_a_frozen_dataclass_that_cites_its_source(name: str) -> None:
    part = PARTS[name]
    assert is_dataclass(part) and part.__dataclass_params__.frozen  # type: ignore[attr-defined]
    built = part()
    assert hash(built) == hash(part()) and built == part()
    for field in fields(part):
        # what words can be read into
        assert isinstance(field.default, float | int | str | tuple) and not isinstance(
            field.default, bool
        )
        with pytest.raises(FrozenInstanceError):
            setattr(built, field.name, field.default)
    module = inspect.getmodule(part)
    assert module is not None and module.__doc__ and "arXiv" in module.__doc__ and part.__doc__
    # no state
    assert not [
        k
        for k, v in vars(module).items()
        if isinstance(v, list | set | Tensor) and not k.startswith("__")
    ]


@pytest.mark.parametrize(
    "name", [n for n in PARTS if n != "weights.constant" and n != "rules.linear"]
)
def test_its_words_come_back(name: str) -> None:
    """Every part is had by its name alone, and its settings by words."""
    folder, _, file = name.partition(".")
    field, word = (
        {"weights": "weight", "rules": "rule", "guidance_models": "baseline"}[folder],
        ALIASES.get(file, file),
    )
    assert Guidance.parse(
        f"2 {file}" + " condition condition" * (file == "dual")
    ) == Guidance.parse(f"2 {word}" + " condition condition" * (word == "dual"))
    if folder == "guidance_models" or word == "dual":
        line = f"2 {word}" if word != "dual" else "2 dual condition model"
    else:
        line = f"2 {word}"
    result = Guidance.parse(line)
    assert Guidance.parse(str(result)) == result == Guidance.parse(result.to_json())
    assert word in getattr(result, field) if word != "condition" else result == Guidance(2)
    for options in MORE.get(name, ()):
        part = PARTS[name](**options)
        words = [f"{k}={v}" for k, v in options.items()]
        more = Guidance.parse(line.replace(word, f"{word}:{','.join(words)}"))
        at = {"weight": 0, "rule": 1}[field]
        expected = part if field == "rule" else PARTS[name](scale=2.0, **options)
        assert more.parts()[at] == expected
        assert Guidance.parse(str(more)) == more == Guidance.parse(more.to_json())


# ---- weights -------------------------------------------------------------------------------------


@every_weight
@everywhere
def test_a_weight_is_one_number_or_one_an_image(weight: Any, point: tuple[float, float]) -> None:
    _, (conditional, reference) = predictions(point, 2)
    for t in (0.001, 0.3, 0.5, 1.0):
        moment = Moment(t, *point)
        w = weight.begin()(moment, conditional, reference)
        assert isinstance(weight.active(moment), bool)
        assert (
            w.shape == (3, 1, 1, 1) and w.dtype == torch.float32
            if isinstance(w, Tensor)
            else isinstance(w, float | int)
        )
        assert torch.isfinite(torch.as_tensor(w)).all()
        assert weight.active(moment) or w == 1, (
            "where a weight is not active nobody asks the references: it must be 1"
        )


@pytest.mark.parametrize("weight", settings(WEIGHTS, scale=1.0))
@everywhere
def test_scale_one_is_off_at_all_times(weight: Any, point: tuple[float, float]) -> None:
    assert not any(weight.active(Moment(t, *point)) for t in (0.001, 0.2, 0.5, 0.7, 1.0))


@pytest.mark.invariance
@every_weight
@everywhere
def test_a_weight_does_not_depend_on_the_batch(weight: Any, point: tuple[float, float]) -> None:
    _, (conditional, reference) = predictions(point, 2)
    moment = Moment(0.5, *point)
    both = torch.as_tensor(weight.begin()(moment, conditional, reference)).expand(3, 1, 1, 1)
    for k in range(3):
        alone = torch.as_tensor(
            weight.begin()(moment, rows(conditional, k), rows(reference, k))
        ).expand(1, 1, 1, 1)
        assert torch.equal(alone, both[k : k + 1])


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_is_a_finite_number(name: str, scale: float) -> None:
    with pytest.raises(UserError, match=r"guidance scale=.*expected a finite number; 1 is off"):
        WEIGHTS[name](scale=scale)


# ---- rules ---------------------------------------------------------------------------------------


@every_rule
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_combine_keeps_shape_and_dtype_and_is_finite(
    rule: Any, point: tuple[float, float], dtype: torch.dtype
) -> None:
    x, inputs = predictions(point, 1 + rule.num_baselines, dtype=dtype)
    join = rule.begin()
    for index, w in enumerate(
        (0.0, 1.0, 2.5, torch.tensor([0.0, 1.0, 7.5], dtype=dtype)[:, None, None, None])
    ):
        result = join(x, Moment(0.5, *point, index), inputs, w)
        for part in (result.x0, result.eps):
            assert part.shape == x.shape and part.dtype == dtype and torch.isfinite(part).all()


@every_rule
@everywhere
def test_a_pair_adds_up_to_x_exactly_if_the_rule_is_consistent(
    rule: Any, point: tuple[float, float]
) -> None:
    """In float64, a rule is consistent exactly if its trait is set.

    Samplers are refused for a rule that is not.
    """
    x, inputs = predictions(point, 1 + rule.num_baselines, dtype=torch.float64)
    join, (alpha, sigma) = rule.begin(), point
    gaps = []
    for index in range(4):
        result = join(x, Moment(0.5, *point, index), inputs, 3.0)
        gaps.append(float((alpha * result.x0 + sigma * result.eps - x).abs().max()))
    assert max(gaps) < 1e-8 if rule.consistent else max(gaps) > 1e-8 or alpha == 0


@every_rule
@everywhere
def test_predictions_of_nothing_are_finite(rule: Any, point: tuple[float, float]) -> None:
    """No norm and no standard deviation is divided by where it is 0."""
    zero = torch.zeros(SHAPE)
    inputs = [Prediction(zero, zero)] * (1 + rule.num_baselines)
    for weight in (2.0, torch.full((3, 1, 1, 1), 2.0)):
        result = rule.begin()(zero, Moment(0.5, *point, 5), inputs, weight)
        assert torch.isfinite(result.x0).all() and torch.isfinite(result.eps).all()


@every_weight
@everywhere
def test_weights_of_nothing_are_finite(weight: Any, point: tuple[float, float]) -> None:
    zero, one = (Prediction(v, v) for v in (torch.zeros(SHAPE), torch.ones(SHAPE)))
    for pair in ((zero, zero), (one, zero), (zero, one)):
        assert torch.isfinite(torch.as_tensor(weight.begin()(Moment(0.5, *point), *pair))).all()


@pytest.mark.invariance
@every_rule
@everywhere
def test_an_image_is_the_same_in_every_batch(rule: Any, point: tuple[float, float]) -> None:
    """Bit for bit, over several steps, whatever the combine remembers."""
    w = torch.tensor([0.3, 2.0, 7.5])[:, None, None, None]
    whole, alone = rule.begin(), [rule.begin() for _ in range(3)]
    for index in range(3):
        x, inputs = predictions(point, 1 + rule.num_baselines, seed=10 * index)
        result = whole(x, Moment(0.5, *point, index), inputs, w)
        for k in range(3):
            row = alone[k](
                x[k : k + 1], Moment(0.5, *point, index), [rows(p, k) for p in inputs], w[k : k + 1]
            )
            assert equal(row, rows(result, k))


class Toy:
    """A denoiser without a network, whose answer depends on x, t and the condition."""

    def __init__(self, point: Callable[[float], tuple[float, float]], times: list[float]) -> None:
        self.point, self.times = point, times

    def __call__(self, x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        self.times.append(t)
        assert conditioning.vector is not None
        alpha, sigma = self.point(t)
        velocity = 0.5 * x + torch.sin(3 * x + conditioning.vector[:, :1, None, None]) + t
        return Prediction(
            (x - sigma * velocity) / (alpha + sigma), (x + alpha * velocity) / (alpha + sigma)
        )


def flow(t: float) -> tuple[float, float]:
    return 1 - t, t


TIMES = (1.0, 0.8, 0.5, 0.3, 0.1)


def run(weight: Any, rule: Any, seed: int, times: list[float]) -> Iterator[Prediction]:
    """Five steps of Euler, one at a time."""
    denoiser = Toy(flow, times)
    conditionings = [
        Conditioning(vector=torch.full((3, 1), float(k))) for k in range(1 + rule.num_baselines)
    ]
    ask = guide(
        denoiser, conditionings[0], [(denoiser, c) for c in conditionings[1:]], weight, rule, flow
    )
    x = normal(seed)
    for t, s in zip(TIMES, (*TIMES[1:], 0.0), strict=True):
        result = drive(ask(x, t), evaluate_calls)
        yield result
        x = (1 - s) * result.x0 + s * result.eps


@every_rule
def test_two_runs_at_once_are_two_runs(rule: Any) -> None:
    """Nothing that a run remembers reaches another: interleaved as apart."""
    weight = WEIGHTS["weights.constant"](scale=3.0)
    apart = [list(run(weight, rule, seed, [])) for seed in (0, 1)]
    together = list(zip(run(weight, rule, 0, []), run(weight, rule, 1, []), strict=True))
    assert all(
        equal(a, b)
        for k in (0, 1)
        for a, b in zip(apart[k], (pair[k] for pair in together), strict=True)
    )
    assert all(equal(a, b) for a, b in zip(apart[0], run(weight, rule, 0, []), strict=True)), (
        "nor a later one"
    )


@every_weight
def test_two_weights_at_once_are_two_runs(weight: Any) -> None:
    linear = RULES["rules.linear"]()
    apart = [list(run(weight, linear, seed, [])) for seed in (0, 1)]
    together = list(zip(run(weight, linear, 0, []), run(weight, linear, 1, []), strict=True))
    assert all(
        equal(a, b)
        for k in (0, 1)
        for a, b in zip(apart[k], (pair[k] for pair in together), strict=True)
    )


@every_rule
@every_weight
def test_references_are_evaluated_where_they_count_and_nowhere_else(rule: Any, weight: Any) -> None:
    times: list[float] = []
    list(run(weight, rule, 0, times))
    expected = [
        t
        for t in TIMES
        for _ in range(1 + rule.num_baselines * (rule.always or weight.active(Moment(t, *flow(t)))))
    ]
    assert times == expected


class Sometimes(Weight):
    """w = 1 for the second image, as of a weight that depends on predictions."""

    def active(self, moment: Moment) -> bool:
        return True

    def begin(self) -> Callable[..., Tensor]:
        return lambda moment, conditional, reference: torch.tensor([2.0, 1.0, 0.5])[
            :, None, None, None
        ]


@every_rule
def test_where_the_weight_is_one_the_conditional_prediction_stays_to_the_last_bit(
    rule: Any,
) -> None:
    if rule.always:
        pytest.skip("w = 1 is not off for this one")
    denoiser, x = Toy(flow, []), normal(0)
    conditionings = [
        Conditioning(vector=torch.full((3, 1), float(k))) for k in range(1 + rule.num_baselines)
    ]
    expected = denoiser(x, 0.5, conditionings[0])
    baselines = [(denoiser, c) for c in conditionings[1:]]
    off = guide(denoiser, conditionings[0], baselines, WEIGHTS["weights.constant"](1.0), rule, flow)
    assert equal(drive(off(x, 0.5), evaluate_calls), expected)
    result = drive(
        guide(denoiser, conditionings[0], baselines, Sometimes(), rule, flow)(x, 0.5),
        evaluate_calls,
    )
    assert equal(rows(result, 1), rows(expected, 1)) and not torch.equal(
        result.x0[0], expected.x0[0]
    )


@every_rule
def test_as_many_baselines_as_it_takes(rule: Any) -> None:
    denoiser, inputs = Toy(flow, []), Conditioning(vector=torch.zeros(3, 1))
    with pytest.raises(UserError, match=f"3 baselines for .*: it takes {rule.num_baselines}"):
        guide(
            denoiser, inputs, [(denoiser, inputs)] * 3, WEIGHTS["weights.constant"](2.0), rule, flow
        )
    assert equal(
        drive(guide(denoiser, inputs, [], Sometimes(), rule, flow)(normal(0), 0.5), evaluate_calls),
        denoiser(normal(0), 0.5, inputs),
    )


# ---- guidance models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("predict.guidance_models"))
def test_a_baseline_is_a_pair_or_a_sentence(name: str) -> None:
    part = find("predict.guidance_models", name)()
    conditioning, negative = (Conditioning(vector=torch.full((1, 1), float(k))) for k in range(2))

    denoiser, weaker = Toy(flow, []), Toy(flow, [])
    try:
        whom, inputs = part.pair(denoiser, conditioning, negative, weaker)
    except UserError as error:  # a copy of a network cannot be made of this one
        assert "Toy has no network to change" in str(error) and not part.takes_negative
    else:
        assert callable(whom) and inputs is (negative if part.takes_negative else conditioning)
