"""`Guidance`: numbers, lines of text and JSON mean the same, come back as they were, and what
cannot be is refused in one sentence.
"""

import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.batching import drive
from sfumato.errors import UserError
from sfumato.predict.denoiser import evaluate_calls
from sfumato.predict.guidance import settings as module
from sfumato.predict.guidance.settings import Guidance, build, equal_images
from sfumato.types import Conditioning, Prediction

LINES: dict[str, tuple[Guidance, Any]] = {
    "2": (Guidance(2), 2.0),
    "1": (Guidance(), 1.0),
    " 2.50 constant linear condition ": (Guidance(2.5), 2.5),
    "2.5 interval:low=0.1,high=0.8": (
        Guidance(2.5, "interval:low=0.1,high=0.8"),
        {"scale": 2.5, "weight": "interval:low=0.1,high=0.8"},
    ),
    "interval:high=.80,low=.1 2.5": (
        Guidance(2.5, "interval:low=0.1,high=0.8"),
        {"scale": 2.5, "weight": "interval:low=0.1,high=0.8"},
    ),
    "7.5 rescale:phi=0.7": (Guidance(7.5, rule="rescale"), {"scale": 7.5, "combine": "rescale"}),
    "0.6 plus_plus": (Guidance(0.6, rule="plus_plus"), {"scale": 0.6, "combine": "plus_plus"}),
    "4 project:momentum=-0.5,threshold=1e-05 ramp": (
        Guidance(4, "ramp", "project:threshold=1e-05,momentum=-0.5"),
        {"scale": 4.0, "weight": "ramp", "combine": "project:threshold=1e-05,momentum=-0.5"},
    ),
    "3 perturbed_attention:layers=a.b+c": (
        Guidance(3, baseline="perturbed_attention:layers=a.b+c"),
        {"scale": 3.0, "reference": "perturbed_attention:layers=a.b+c"},
    ),
    "2 model:path=runs/small.safetensors": (
        Guidance(2, baseline="model:path=runs/small.safetensors"),
        {"scale": 2.0, "reference": "model:path=runs/small.safetensors"},
    ),
    "4 dual:kind=away,second=3 condition skip_layers:layers=x": (
        Guidance(4, rule="dual:kind=away,second=3", baseline="condition skip_layers:layers=x"),
        {
            "scale": 4.0,
            "combine": "dual:kind=away,second=3",
            "reference": "condition skip_layers:layers=x",
        },
    ),
    "4 adaptive:low=-2,disagreement=raises": (
        Guidance(4, "adaptive:disagreement=raises,low=-2"),
        {"scale": 4.0, "weight": "adaptive:disagreement=raises,low=-2"},
    ),
    "2 zero_star:zero_steps=2": (
        Guidance(2, rule="zero_star:zero_steps=2"),
        {"scale": 2.0, "combine": "zero_star:zero_steps=2"},
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_lines_objects_and_json_are_one(line: str) -> None:
    expected, stored = LINES[line]
    result = Guidance.parse(line)
    assert (
        result == expected and hash(result) == hash(expected) and Guidance.parse(result) is result
    )
    assert result.to_json() == stored and type(result.to_json()) is type(stored)
    assert Guidance.parse(json.loads(json.dumps(stored, allow_nan=False))) == result
    assert Guidance.parse(str(result)) == result and str(Guidance.parse(str(result))) == str(result)
    assert pickle.loads(pickle.dumps(result)) == result


def test_the_lines_of_the_docstring_are_read() -> None:
    lines = [
        line.strip()
        for line in (module.__doc__ or "").splitlines()
        if line.startswith("    ") and line[4] != " "
    ]
    texts = [line.split("   ")[0] for line in lines]
    assert len(texts) == 8 and "2" in texts
    for text in texts:
        result = Guidance.parse(text)
        assert Guidance.parse(result.to_json()) == result


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        "2",
        {"scale": 2},
        {"scale": 2.0, "weight": "constant"},
        {"scale": 2, "combine": {"name": "linear"}},
    ],
)
def test_a_number_stays_a_number(value: Any) -> None:
    """The record in images and models of a scale alone is a number, as in earlier versions."""
    result = Guidance.parse(value).to_json()
    assert result == 2.0 and type(result) is float


def test_json_may_have_the_names_of_the_fields() -> None:
    """Files hold "combine" and "reference"; the fields' own names, "rule" and "baseline", are read
    too.
    """
    stored = {
        "scale": 4,
        "combine": "dual:kind=away",
        "reference": ["condition", "model:path=small"],
    }
    named = {
        "scale": 4,
        "rule": "dual:kind=away",
        "baseline": ["condition", {"name": "weaker_model", "path": "small"}],
    }
    assert (
        Guidance.parse(stored)
        == Guidance.parse(named)
        == Guidance.parse("4 dual:kind=away condition weaker_model:path=small")
    )
    assert Guidance.parse(named).to_json() == {
        "scale": 4.0,
        "combine": "dual:kind=away",
        "reference": "condition model:path=small",
    }


def test_json_may_name_options_one_by_one() -> None:
    weight = {"name": "interval", "low": 0, "high": 0.5}
    references = ["condition", {"name": "perturbed_attention", "layers": ["a", "b.c"]}]
    result = Guidance.parse(
        {
            "scale": 3,
            "weight": weight,
            "combine": {"name": "dual", "kind": "away"},
            "reference": references,
        }
    )
    assert result == Guidance.parse(
        "3 interval:low=0,high=0.5 dual:kind=away condition perturbed_attention:layers=a+b.c"
    )


@settings(max_examples=100, deadline=None, database=None)
@given(
    scale=st.floats(0, 1e6),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    phi=st.floats(0, 1),
    layers=st.lists(st.text("abc_.019", min_size=1, max_size=8), min_size=1, max_size=3),
)
def test_every_number_comes_back_to_the_last_bit(
    scale: float, low: float, high: float, phi: float, layers: list[str]
) -> None:
    low, high = sorted((low, high))
    result = Guidance(
        scale,
        f"interval:low={low!r},high={high!r}",
        f"rescale:phi={phi!r}",
        "skip_layers:layers=" + "+".join(layers),
    )
    for again in (
        Guidance.parse(str(result)),
        Guidance.parse(json.loads(json.dumps(result.to_json()))),
    ):
        assert again == result
        weight, combine, (reference,) = again.parts()
        assert (again.scale, weight.scale) == (scale, max(scale, 1)), "scales below 1 are off"
        assert (weight.low, weight.high, combine.phi, list(reference.layers)) == (
            low,
            high,
            phi,
            layers,
        )


BAD: list[tuple[Any, str]] = [
    (float("nan"), "guidance=nan: expected a number of at least 0; 0 to 1 is off"),
    (float("inf"), "guidance=inf: expected a number of at least 0; 0 to 1 is off"),
    (-0.5, "guidance=-0.5: expected a number of at least 0; 0 to 1 is off"),
    ("-1", "guidance=-1.0: expected a number of at least 0"),
    ("nan", "guidance=nan: expected a number"),
    (True, "guidance=True: expected a number"),
    (None, "guidance=None: expected a number"),
    ([2.0], r"guidance=\[2.0\]: expected a number"),
    (b"2", "guidance=b'2': expected a number"),
    ("", "guidance='': expected one number, the scale"),
    ("interval", "guidance='interval': expected one number, the scale .* found 0"),
    ("2 3", "guidance='2 3': expected one number, the scale .* found 2"),
    ("strong", "guidance='strong': unknown guidance 'strong'"),
    (
        "2 intervall",
        "guidance='2 intervall': unknown guidance 'intervall': did you mean 'interval'",
    ),
    ("2 interval ramp", "two of one kind, interval and ramp: expected one weight"),
    ("2 rescale project", "two of one kind, rescale and project: expected one rule"),
    (
        "2 interval:lo=0.2",
        "unknown option of guidance weight interval 'lo': did you mean 'low'.*"
        "expected one of high, low",
    ),
    ("2 interval:scale=3", "unknown option of guidance weight interval 'scale'"),
    ("2 linear:phi=1", "unknown option of guidance rule linear 'phi': there are none"),
    ("2 interval:low=a", "interval:low='a': expected a number"),
    ("2 interval:low=0.1,low=0.2", "gives low twice"),
    ("2 interval:", "expected NAME or NAME:OPTION=VALUE"),
    ("2 interval:low", "expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, found 'low'"),
    ("2 interval:low=", "found 'low='"),
    ("2 interval:low=0.9,high=0.1", "low=0.9, high=0.1: expected times with 0 <= low <= high <= 1"),
    ("2 interval:low=nan", "interval:low='nan': expected a number"),
    ("2 interval:high=1.5", "high=1.5"),
    (
        "2 ramp:shape=square",
        "unknown shape of a guidance ramp 'square': expected one of cosine, linear, power",
    ),
    ("2 ramp:power=0", "ramp power=0.0: expected a number above 0"),
    ("2 ramp:first=inf", "guidance ramp first=inf: expected a finite number"),
    ("2 adaptive:disagreement=maybe", "unknown effect of disagreement .* 'maybe'"),
    ("2 adaptive:threshold=0", "threshold=0.0: expected a number above 0"),
    ("2 adaptive:power=-1", "power=-1.0: expected a number above 0"),
    ("2 adaptive:low=3,high=1", "low=3.0, high=1.0: expected log-SNRs with low <= high"),
    ("2 adaptive:low=nan", "adaptive:low='nan': expected a number"),
    ("2 rescale:phi=1.1", "phi=1.1: expected a number in .0, 1."),
    ("2 project:momentum=1", "momentum=1.0: expected a number in .-1, 1."),
    ("2 project:threshold=-1", "threshold=-1.0: expected a number of at least 0"),
    ("2 project:eta=inf", "eta=inf: expected a finite number"),
    ("2 project:eta=nan", "project:eta='nan': expected a number"),
    ("2 zero_star:zero_steps=1.5", "zero_star:zero_steps='1.5': expected a whole number"),
    ("2 zero_star:zero_steps=inf", "zero_star:zero_steps='inf': expected a whole number"),
    ("2 zero_star:zero_steps=-1", "zero_steps=-1: expected a whole number of at least 0"),
    ("2 dual:kind=double condition model", "unknown kind of dual guidance 'double'"),
    ("2 dual:second=inf condition model", "second=inf: expected a finite number"),
    ("2 dual:second=nan condition model", "dual:second='nan': expected a number"),
    (
        "2 dual:low=0.6,high=0.5 condition model",
        "dual low=0.6, high=0.5: expected times with 0 <= low <= high <= 1",
    ),
    ("2 dual", "guidance dual with the baseline condition: it takes 2; name as many of"),
    (
        "2 condition perturbed_attention",
        "guidance linear with the baseline condition perturbed_attention: it takes 1",
    ),
    ("0 plus_plus", "guidance 0 plus_plus: expected a scale above 0, the share of the prompt"),
    (
        "3 ramp:first=-1",
        "guidance ramp first=-1 of the scale 3 makes the weight -1: expected one above 0",
    ),
    ("2 ramp:last=-1,first=-1", "ramp first=-1 of the scale 2 makes the weight 0: expected"),
    (
        "2 dual:kind=away,second=-1 condition model",
        "guidance dual second=-1.0: expected a number of at least 0; 0 to 1 is off",
    ),
    ("0.5 plus_plus interval", "guidance plus_plus with the weight interval: expected constant"),
    ({}, "expected a scale"),
    ({"weight": "interval"}, "expected a scale"),
    ({"scale": "2"}, "guidance='2': expected a number"),
    (
        {"scale": 2, "weigth": "interval"},
        "unknown guidance setting 'weigth': did you mean 'weight'",
    ),
    ({"scale": 2, "weight": "interval ramp"}, "expected one weight"),
    ({"scale": 2, "weight": ["interval", "ramp"]}, "expected one weight"),
    ({"scale": 2, "weight": 3}, "guidance weight=3: expected a word"),
    ({"scale": 2, "weight": None}, "guidance weight=None: expected a word"),
    ({"scale": 2, "weight": {"low": 0.2}}, "expected a word .* or an object with a name"),
    ({"scale": 2, "weight": "rescale"}, "unknown guidance weight 'rescale'"),
    ({"scale": 2, "weight": {"name": "rescale"}}, "unknown guidance weight 'rescale'"),
    (
        {"scale": 2, "weight": {"name": "interval", "low": [1]}},
        r"interval:low=\[1\]: expected a number",
    ),
    (
        {"scale": 2, "weight": {"name": "interval", "low": True}},
        "interval:low=True: expected a number",
    ),
    (
        {"scale": 2, "reference": {"name": "skip_layers", "layers": []}},
        r"skip_layers:layers=\[\]: expected one or more names",
    ),
    (
        {"scale": 2, "reference": {"name": "skip_layers", "layers": 3}},
        "skip_layers:layers=3: expected one or more names",
    ),
    (
        {"scale": 2, "reference": {"name": "model", "path": "my model"}},
        "path='my model': expected a value without spaces and commas",
    ),
    ({"scale": 2, "reference": []}, "it takes 1"),
    (
        {"scale": 2, "reference": "condition", "baseline": "condition"},
        "guidance has baseline and reference: expected one of them",
    ),
    (
        {"scale": 2, "baseline": "modell"},
        "unknown guidance baseline 'modell': did you mean 'model'",
    ),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_settings_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Guidance.parse(value)
    assert "\n" not in str(error.value)


# ---- build ---------------------------------------------------------------------------------------


def toy(evaluations: list[tuple[float, float]]):
    """A denoiser that notes (t, condition) of each question."""

    def denoise(x: Tensor, t: float, conditioning: Conditioning) -> Prediction:
        assert conditioning.vector is not None
        evaluations.append((t, float(conditioning.vector[0, 0])))
        velocity = torch.sin(x) + conditioning.vector[:, :1, None, None]
        return Prediction(x - t * velocity, x + (1 - t) * velocity)

    return denoise


def vector(value: float) -> Conditioning:
    return Conditioning(vector=torch.full((2, 1), value))


def evaluated_by(
    line: str, reference: Any, conditioning: Conditioning | None = None
) -> list[float]:
    """Conditions at which a guided denoiser evaluates the network at t = 0.5."""
    evaluations: list[tuple[float, float]] = []
    ask = build(
        Guidance.parse(line),
        toy(evaluations),
        conditioning or vector(1.0),
        reference,
        lambda t: (1 - t, t),
    )
    drive(ask(torch.zeros(2, 1, 2, 2), 0.5), evaluate_calls)
    return [condition for _, condition in evaluations]


def test_the_evaluated_denoisers() -> None:
    one, two = vector(2.0), vector(3.0)
    assert (
        evaluated_by("2", one) == [1, 2]
        and evaluated_by("1", one) == [1]
        and evaluated_by("0", one) == [1]
    )
    assert evaluated_by("2 interval:low=0.6", one) == [1] and evaluated_by(
        "2 interval:low=0.4", one
    ) == [
        1,
        2,
    ]
    assert evaluated_by("1 plus_plus", one) == [1, 2], "there 1 is not off"
    assert evaluated_by("1 dual:second=2 condition condition", [one, two]) == [1, 2, 3], (
        "the second scale acts"
    )
    assert evaluated_by("1 dual:second=1 condition condition", [one, two]) == [1]
    assert evaluated_by("2 dual condition condition", one) == [1, 2, 2]
    assert evaluated_by("2 dual:low=0.9 condition condition", [one, two]) == [1, 2], (
        "the second is off at this time"
    )
    assert evaluated_by("1 dual:low=0.9 condition condition", [one, two]) == [1], (
        "and so is the first"
    )
    assert evaluated_by("1 model:path=elsewhere", one) == [1], "what is off needs no other model"
    with pytest.raises(UserError, match="needs that model's denoiser"):
        evaluated_by("2 model:path=elsewhere", one)
    with pytest.raises(
        UserError,
        match="3 conditionings to move away from, for guidance 2 dual condition condition: "
        "expected 2",
    ):
        evaluated_by("2 dual condition condition", [one, two, one])


@pytest.mark.parametrize(
    "line",
    [
        "3",
        "3 ramp:first=1",
        "0.5 plus_plus",
        "3 zero_star",
        "3 dual condition condition",
        "3 project",
    ],
)
def test_nothing_is_guided_by_its_own_condition(line: str) -> None:
    """An unconditional draw, or the prompt as its own negative prompt: one pass, and the prediction
    as it is.
    """
    assert evaluated_by(line, vector(1.0)) == [1]


BELOW_ONE = [
    *(f"{scale} {rule}" for scale in (0, 0.5) for rule in ("linear", "rescale", "zero_star")),
    "0 project:momentum=-0.5",
    "0 interval:low=0,high=1",
    "0.9 ramp:first=-5",
    "0 adaptive",
    "0 perturbed_attention",
    "0.5 dual:second=1 condition condition",
    "0 dual:kind=away,second=0 condition condition",
    "0.2 dual:kind=sum,second=0 condition condition",
]


@pytest.mark.parametrize("line", BELOW_ONE)
def test_a_scale_from_0_to_1_is_off_under_every_part(line: str) -> None:
    """One call, of the condition alone, as in diffusers for every scale up to 1."""
    assert Guidance.parse(line).off and evaluated_by(line, vector(2.0)) == [1]
    assert Guidance.parse(str(Guidance.parse(line))) == Guidance.parse(line)


def guided_at_a_half(line: str, reference: Conditioning) -> Tensor:
    x = torch.zeros(2, 1, 2, 2)
    denoise = build(Guidance.parse(line), toy([]), vector(1.0), reference, lambda t: (1 - t, t))
    return drive(denoise(x, 0.5), evaluate_calls).x0


def test_scales_below_one_where_another_scale_acts() -> None:
    """The first scale is off, so that the second acts as at a first scale of 1."""
    for second in ("kind=chain,second=2", "kind=away,second=3"):
        parts = f"dual:{second} condition condition"
        low, one = (guided_at_a_half(f"{s} {parts}", vector(3.0)) for s in (0, 1))
        assert torch.equal(low, one)
    share = [guided_at_a_half(f"{s} plus_plus", vector(3.0)) for s in (0.25, 1)]
    assert not torch.equal(*share), "a share of the condition below 1 is a scale of its own"
    parts = "ramp:first=-0.5,last=-0.5"  # named in so many words, a weight of 1/2 is one
    half = guided_at_a_half(f"2 {parts}", vector(3.0))
    ends = [guided_at_a_half("1", vector(v)) for v in (1.0, 3.0)]
    reference = guided_at_a_half("3", vector(3.0))
    assert torch.allclose(ends[0] + (ends[0] - half) * 4, reference), "w is 1/2 there"


def test_off_and_consistent() -> None:
    assert (
        Guidance.parse(1).off
        and Guidance.parse("1 ramp").off
        and Guidance.parse("0").off
        and not Guidance.parse("1 plus_plus").off
    )
    assert (
        not Guidance.parse("1 dual:second=2 condition model").off
        and Guidance.parse("1 dual:second=1 condition model").off
    )
    assert Guidance.parse("2 project").consistent and not Guidance.parse("0.6 plus_plus").consistent


def test_conditionings_are_compared_door_by_door() -> None:
    full = Conditioning(
        tokens=torch.ones(2, 3, 4),
        mask=torch.ones(2, 3, dtype=torch.bool),
        residuals=(torch.ones(2, 1, 2, 2),),
    )
    again = full.to(dtype=torch.float32)
    assert equal_images(full, again).tolist() == [True, True] and equal_images(
        Conditioning(), Conditioning()
    ).tolist() == [True]
    others = [
        (Conditioning(), [False, False]),
        (
            Conditioning(tokens=full.tokens, mask=~full.mask, residuals=full.residuals),
            [False, False],
        ),
        (
            Conditioning(tokens=full.tokens, mask=full.mask, residuals=(torch.zeros(2, 1, 2, 2),)),
            [False, False],
        ),
        (Conditioning(tokens=full.tokens, mask=full.mask, residuals=()), [False, False]),
        (
            Conditioning(tokens=full.tokens[:1], mask=full.mask[:1], residuals=full.residuals),
            [False, False],
        ),
        (
            Conditioning(
                tokens=torch.ones(2, 9, 4),
                mask=torch.ones(2, 9, dtype=torch.bool),
                residuals=full.residuals,
            ),
            [False, False],
        ),
        (
            Conditioning(
                tokens=full.tokens * torch.tensor([1.0, 2.0])[:, None, None],
                mask=full.mask,
                residuals=full.residuals,
            ),
            [True, False],
        ),
    ]
    for other, expected in others:
        assert equal_images(full, other).tolist() == expected
    assert equal_images(Conditioning(), full).tolist() == [False]
