"""Strings of questions: several put as one, and one put to whoever answers. What asks (`Asking`)
and what answers never meet but here.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sfumato.types import Asking, Prediction, Query

T = TypeVar("T")


def together(runs: Sequence[Asking[T]]) -> Asking[list[T]]:
    """Several strings of questions as one: what they ask at the same moment is asked at once. Ends
    with what each ended with.
    """
    if len(runs) == 1:
        return [(yield from runs[0])]
    results: list[Any] = [None] * len(runs)
    waiting: dict[int, list[Query]] = {}

    def go_on(k: int, answers: list[Prediction] | None) -> None:
        try:
            waiting[k] = next(runs[k]) if answers is None else runs[k].send(answers)
        except StopIteration as stop:
            waiting.pop(k, None)
            results[k] = stop.value

    try:
        for k in range(len(runs)):
            go_on(k, None)
        while waiting:
            asked = list(waiting.items())
            answers = yield [query for _, queries in asked for query in queries]
            for k, queries in asked:
                go_on(k, answers[: len(queries)])
                answers = answers[len(queries) :]
        return results
    finally:
        for run in runs:
            run.close()


def answered(questions: Asking[T], answer: Callable[[list[Query]], list[Prediction]]) -> T:
    """Puts each list of questions to `answer`, and returns what they end with."""
    try:
        asked = next(questions)
        while True:
            asked = questions.send(answer(asked))
    except StopIteration as stop:
        return stop.value
    finally:
        questions.close()
