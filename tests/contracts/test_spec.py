"""`Spec`: one grammar of "name:option=value,option=value" for samplers, spacings and the parts of
guidance.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sfumato.checkpoints.schedulers.samplers import canonical_sampler, format_sampler
from sfumato.checkpoints.schedulers.spacing import canonical_spacing, format_spacing
from sfumato.diffuse.timesteps import SPACINGS
from sfumato.errors import UserError
from sfumato.predict.guidance.settings import FOLDERS, Guidance
from sfumato.predict.guidance_models import ALIASES
from sfumato.registry import find, names
from sfumato.sampling.request import sampler_of, spacing_of
from sfumato.spec import Spec, options_of, short_number, typed_values

SAMPLERS = {name: find("diffuse.samplers", name) for name in names("diffuse.samplers")}
PARTS = {
    name: (setting, find(folder, name))
    for setting, folder in FOLDERS.items()
    for name in names(folder)
}
WORDS = {
    "kind": ("chain", "sum", "away"),
    "disagreement": ("lowers", "raises"),
    "shape": ("linear", "cosine", "power"),
}
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
fuzz = settings(max_examples=200, deadline=None, database=None)


# ---- the grammar ---------------------------------------------------------------------------------


@fuzz
@given(name=text, options=st.dictionaries(text, text, max_size=3))
def test_formatted_specs_are_parsed_again(name: str, options: dict[str, str]) -> None:
    """Every spec that can be made, whatever its name, keys and values, survives its line of
    text.
    """
    try:
        spec = Spec(name, options)
    except UserError:
        assume(False)
    assert Spec.parse(str(spec)) == spec and str(Spec.parse(str(spec))) == str(spec)


@fuzz
@given(line=st.text("abc_- :=,+.0", max_size=20))
def test_a_line_is_a_spec_or_a_sentence(line: str) -> None:
    """Whatever is typed: either a spec, whose own line means the same, or one error of one line."""
    try:
        spec = Spec.parse(line)
    except UserError as error:
        assert "\n" not in str(error) and ("expected" in str(error) or "give it once" in str(error))
    else:
        assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("line", "name", "options"),
    [
        ("ddim", "ddim", {}),
        (" dpmpp-2m ", "dpmpp_2m", {}),
        ("karras: rho = 5 , clean=true", "karras", {"rho": "5", "clean": "true"}),
        ("dpmpp_2m:lower-order-final=True", "dpmpp_2m", {"lower_order_final": "True"}),
        ("model:path=hub:org/name", "model", {"path": "hub:org/name"}),
        ("model:path=a=b", "model", {"path": "a=b"}),
        ("skip_layers:layers=a.3-5+b", "skip_layers", {"layers": "a.3-5+b"}),
        ("", "", {}),
    ],
)
def test_parsed_lines(line: str, name: str, options: dict[str, str]) -> None:
    assert Spec.parse(line) == Spec(name, options)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ddim:", "'ddim:': expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, found ''"),
        ("ddim:eta", "expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, found 'eta'"),
        ("ddim:=1", "found '=1'"),
        ("ddim:eta=", "found 'eta='"),
        ("ddim:eta=1,", "found ''"),
        ("ddim:eta=0,eta=1", "'ddim:eta=0,eta=1' gives eta twice: give it once"),
        ("a:b-c=0,b_c=1", "gives b_c twice"),
        ("unipc:variant=bh 1", "unipc:variant='bh 1': expected a value without spaces and commas"),
    ],
)
def test_other_lines_are_refused(line: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        Spec.parse(line)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a:b", {}, "name 'a:b': expected one without colons and outer spaces"),
        (" a", {}, "name ' a': expected"),
        ("a", {"": "1"}, "a with option '': expected a key"),
        ("a", {"b=c": "1"}, "a with option 'b=c': expected a key"),
        ("a", {"b,c": "1"}, "a with option 'b,c': expected a key"),
        ("a", {"b": ""}, "a:b='': expected a value without spaces and commas"),
        ("a", {"b": "1,2"}, "a:b='1,2': expected a value without spaces and commas"),
    ],
)
def test_values_without_a_line_are_refused_at_construction(
    name: str, options: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError) as error:
        Spec(name, options)
    assert words in str(error.value)


# ---- values --------------------------------------------------------------------------------------

DEFAULTS = {"flag": False, "count": 2, "amount": 0.5, "word": "plain", "layers": (), "end": None}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", True, True),
        ("count", "3", 3),
        ("count", "3.0", 3),
        ("count", "1e3", 1000),
        ("count", "9007199254740993", 2**53 + 1),
        ("count", 4.0, 4),
        ("amount", "3", 3.0),
        ("amount", ".5", 0.5),
        ("amount", "-inf", -math.inf),
        ("amount", 2, 2.0),
        ("word", "true", "true"),
        ("word", "007", "007"),
        ("layers", "a.b+c", ("a.b", "c")),
        ("layers", "1", ("1",)),
        ("layers", ["a", "b"], ("a", "b")),
        ("end", "1e-3", 0.001),
        ("end", None, None),
    ],
)
def test_a_value_has_the_type_of_its_default(key: str, value: Any, expected: Any) -> None:
    result = typed_values("x", {key: value}, DEFAULTS)[key]
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("flag", ["yes", "1", 1, None], "true or false"),
        (
            "count",
            ["1.5", "inf", "nan", "true", "a", True, None, [1], "1e999999999"],
            "a whole number",
        ),
        ("amount", ["nan", "true", "a", True, None, [1.0], math.nan], "a number"),
        ("word", [1, None, True, ["a"]], "a word"),
        ("layers", ["a+", "+", [], [1], 3, None], "one or more names, joined by +"),
        ("end", ["none", "nan", True], "a number"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, values: list[Any], expected: str) -> None:
    for value in values:
        with pytest.raises(UserError) as error:
            typed_values("sampler x", {key: value}, DEFAULTS)
        assert str(error.value) == f"sampler x:{key}={value!r}: expected {expected}"


def test_an_unknown_option_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        UserError,
        match=r"unknown option of sampler x 'amuont': did you mean 'amount'.*"
        r"expected one of amount, count, end",
    ):
        typed_values("sampler x", {"amuont": "1"}, DEFAULTS)


@fuzz
@given(value=st.floats(allow_nan=False) | st.integers(-(10**9), 10**9))
def test_numbers_come_back_to_the_last_bit(value: float) -> None:
    for spelled in (short_number(value), repr(value)):
        assert float(spelled) == value
    for number in (short_number, repr):
        spec = Spec.of("x", "x", {"amount": value}, DEFAULTS, number)
        assert (DEFAULTS | Spec.parse(str(spec)).values("x", DEFAULTS))["amount"] == value
    assert short_number(5.0) == "5" and short_number(1e-5) == "1e-05" and short_number(0.1) == "0.1"


# ---- every name that is registered ---------------------------------------------------------------


def drawn_values(
    defaults: Mapping[str, Any], annotations: Mapping[str, Any]
) -> st.SearchStrategy[dict[str, Any]]:
    """Some options of a target with values of their types, of which the parts of guidance may
    refuse some.
    """
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 50),
        float: st.floats(0, 1) | st.floats(0, 100) | st.integers(0, 9).map(float),
        str: st.text("abc/.-_:=09", min_size=1, max_size=6),
        tuple: st.lists(st.text("abc_.09", min_size=1, max_size=6), min_size=1, max_size=3).map(
            tuple
        ),
    }

    def kind(key: str) -> st.SearchStrategy[Any]:
        choices = (
            get_args(annotations[key])
            if get_origin(annotations[key]) is Literal
            else WORDS.get(key, ())
        )
        return (
            st.sampled_from(choices)
            if choices
            else kinds[float if defaults[key] is None else type(defaults[key])]
        )

    return st.fixed_dictionaries({}, optional={key: kind(key) for key in defaults})


def annotations_of(target: Any) -> dict[str, Any]:
    return {name: p.annotation for name, p in inspect.signature(target).parameters.items()}


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=30, deadline=None, database=None)
@given(data=st.data())
def test_every_sampler_with_its_options(name: str, data: st.DataObject) -> None:
    defaults = options_of(SAMPLERS[name])
    values = data.draw(drawn_values(defaults, annotations_of(SAMPLERS[name])))
    word = format_sampler(name, **values)
    sampler, options = sampler_of(word)
    assert sampler is SAMPLERS[name] and defaults | options == defaults | values
    assert all(type(options[key]) is type(values[key]) for key in options)
    assert canonical_sampler(word) == word == str(Spec.parse(word)), "one spelling, and it stays"
    assert not options or list(options) == sorted(options)


@pytest.mark.parametrize("name", SPACINGS)
@settings(max_examples=30, deadline=None, database=None)
@given(data=st.data())
def test_every_spacing_with_its_options(name: str, data: st.DataObject) -> None:
    defaults = options_of(SPACINGS[name], without=("start",))
    assert "clean" in defaults and "start" not in defaults and "steps" not in defaults
    values = data.draw(drawn_values(defaults, annotations_of(SPACINGS[name])))
    word = format_spacing(name, **values)
    result, options = spacing_of(word)
    assert result == name and defaults | options == defaults | values
    assert canonical_spacing(word) == word == str(Spec.parse(word))


@pytest.mark.parametrize("name", PARTS)
@settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_every_part_of_guidance_with_its_options(name: str, data: st.DataObject) -> None:
    setting, part = PARTS[name]
    defaults = options_of(part, without=("scale",))
    values = data.draw(drawn_values(defaults, annotations_of(part)))
    try:
        expected = part(**values)
    except UserError:
        assume(False)
    word = str(Spec.of(setting, name, values, defaults, short_number))
    assert part(**Spec.parse(word).values(setting, defaults)) == expected
    guidance = Guidance.parse(f"2 {word}" + " condition condition" * (name == "dual"))
    assert Guidance.parse(str(guidance)) == guidance == Guidance.parse(guidance.to_json())
    assert ALIASES.get(name, name) in str(guidance).split(" ", 1)[-1] or name in (
        "constant",
        "linear",
        "condition",
    )


def test_options_that_equal_the_defaults_are_not_written() -> None:
    for name, sampler in SAMPLERS.items():
        assert format_sampler(name, **options_of(sampler)) == name
    for name, spacing in SPACINGS.items():
        assert format_spacing(name, **options_of(spacing, without=("start",))) == name


def test_spellings_of_stored_files_stay() -> None:
    """Byte for byte what models and pictures of before hold."""
    assert (
        format_sampler("dpmpp_2m_sde", solver="heun", eta=0.0, lower_below=15)
        == "dpmpp_2m_sde:eta=0.0,lower_below=15,solver=heun"
    )
    assert format_sampler("lcm", scaling=5) == "lcm:scaling=5.0"
    assert format_sampler("dpmpp_3m", published=True) == "dpmpp_3m:published=true"
    assert format_spacing("leading", offset=1, clean=False) == "leading:clean=false,offset=1"
    assert (
        format_spacing("karras", end=0.02, between="leading") == "karras:between=leading,end=0.02"
    )
    assert Guidance.parse("4.50 project:momentum=-.5,threshold=10").to_json() == {
        "scale": 4.5,
        "combine": "project:threshold=10,momentum=-0.5",
    }
    assert (
        str(Guidance.parse("2 adaptive:low=-2,threshold=1e-5"))
        == "2 adaptive:threshold=1e-05,low=-2"
    )
