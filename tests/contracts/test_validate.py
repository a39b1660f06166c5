"""Checks of settings: the value comes back, or a sentence with the value, what was expected and a
hint.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sfumato.errors import UserError
from sfumato.validate import flag, number_in, one_of, positive_int, whole_number

SENTENCES: list[tuple[Callable[[], Any], str]] = [
    (lambda: whole_number("n", 2.0), "n=2.0: expected a whole number"),
    (lambda: whole_number("n", True), "n=True: expected a whole number"),
    (lambda: whole_number("n", "3"), "n='3': expected a whole number"),
    (lambda: whole_number("n", -1, 0), "n=-1: expected a whole number of at least 0"),
    (lambda: whole_number("n", 5, 1, 4), "n=5: expected a whole number from 1 to 4"),
    (lambda: whole_number("n", 5, at_most=4), "n=5: expected a whole number of at most 4"),
    (
        lambda: whole_number("left", -1, 0, unit="pixels"),
        "left=-1: expected a whole number of pixels, at least 0",
    ),
    (
        lambda: whole_number("n", 9, 0, 8, unit="images"),
        "n=9: expected a whole number of images from 0 to 8",
    ),
    (lambda: positive_int("steps", 0), "steps=0: expected a whole number of at least 1"),
    (
        lambda: positive_int("k", 0, hint="5 is usual"),
        "k=0: expected a whole number of at least 1; 5 is usual",
    ),
    (lambda: number_in("eta", "a", 0, 1), "eta='a': expected a number in [0, 1]"),
    (lambda: number_in("eta", False, 0, 1), "eta=False: expected a number in [0, 1]"),
    (
        lambda: number_in("eta", 1.5, 0, 1, hint="0 is off"),
        "eta=1.5: expected a number in [0, 1]; 0 is off",
    ),
    (lambda: number_in("r", 1, above=0, below=1), "r=1: expected a number in (0, 1)"),
    (lambda: number_in("t", 0, above=0, at_most=1), "t=0: expected a number in (0, 1]"),
    (lambda: number_in("ema", 1, 0, below=1), "ema=1: expected a number in [0, 1)"),
    (lambda: number_in("rho", 0.0, above=0), "rho=0.0: expected a number above 0"),
    (lambda: number_in("w", -0.5, 0), "w=-0.5: expected a number of at least 0"),
    (lambda: number_in("w", math.inf, 0), "w=inf: expected a number of at least 0"),
    (lambda: number_in("w", math.nan, 0, 1), "w=nan: expected a number in [0, 1]"),
    (lambda: number_in("w", -math.inf), "w=-inf: expected a finite number"),
    (lambda: number_in("w", None), "w=None: expected a finite number"),
    (lambda: flag("lower", 1), "lower=1: expected true or false"),
    (
        lambda: flag("lower", None, hint="true is BERT's"),
        "lower=None: expected true or false; true is BERT's",
    ),
    (
        lambda: one_of("solver", "hen", ("heun", "midpoint")),
        "unknown solver 'hen': did you mean 'heun'? expected one of heun, midpoint",
    ),
    (lambda: one_of("solver", None, {"heun": 1}), "unknown solver None: expected one of heun"),
]


@pytest.mark.parametrize(("check", "sentence"), SENTENCES, ids=[s for _, s in SENTENCES])
def test_refused_values_and_their_messages(check: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check()
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (lambda v: whole_number("n", v, 0, 4), 0),
        (lambda v: whole_number("n", v, 0, 4), 4),
        (lambda v: whole_number("n", v), -(2**70)),
        (lambda v: positive_int("n", v), 1),
        (lambda v: number_in("eta", v, 0, 1), 0),
        (lambda v: number_in("eta", v, 0, 1), 1.0),
        (lambda v: number_in("t", v, above=0, at_most=1), 1),
        (lambda v: number_in("w", v), -1e300),
        (lambda v: number_in("w", v, 0, 1), np.float64(0.5)),
        (lambda v: flag("on", v), False),
        (lambda v: one_of("solver", v, ("heun",)), "heun"),
    ],
)
def test_accepted_values_are_returned(check: Callable[[Any], Any], value: Any) -> None:
    assert check(value) is value
