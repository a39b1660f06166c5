r"""Weighted prompts: "a (red:1.3) hat, [trees]" -> pieces of text with a weight each.

    (text:1.3)   times 1.3            (text)    times 1.1            [text]    divided by 1.1
    \( \) \[ \]  brackets as text     \\        a backslash as text

Before anything else a backslash is text by itself.

Brackets nest, and their factors multiply. As in AUTOMATIC1111's web UI (wiki,
"Attention/emphasis"), from which people know this syntax: a bracket that never closes acts to the
end of the prompt, one that closes nothing is text, and so is a colon that no number and ")" follow.
Two other notations of that program, [from:to:when] and [one|other], change the prompt from step to
step: they are refused, not taken as emphasis. Its words BREAK and AND are words here.
"""

import re
from dataclasses import dataclass

from sfumato.errors import UserError, quoted

FACTOR = 1.1
"""The factor of ( ) without a number, and the divisor of [ ]."""

LARGEST = 10.0
"""Weights beyond this are refused: "(at 12:30)" is a time of day, not a weight of 30."""

_PART = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
      | :\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
      | (?P<bracket>[()\[\]])
      | (?P<text>[^\\()\[\]:]+|.)""",
    re.VERBOSE | re.DOTALL,
)
_EDITING = re.compile(r"\||:\s*[\d.]+\s*$")


@dataclass
class _Piece:
    text: str
    weight: float = 1.0
    escaped: bool = False


def parse(prompt: str) -> list[tuple[str, float]]:
    """Prompt -> [(text, weight)], at least one piece, which may be empty.

    Neighbours of equal weight are one piece. A prompt without brackets and double backslashes is
    one piece of weight 1, unchanged.

    Raises:
        UserError: For weights beyond `LARGEST`, and notations that change the prompt between steps.
    """
    pieces: list[_Piece] = []
    # the first piece inside each bracket that is still open
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece.weight *= factor

    for part in _PART.finditer(prompt):
        bracket, number = part["bracket"], part["number"]
        if bracket in opened:
            opened[bracket].append(len(pieces))
        elif number is not None and opened["("]:
            multiply(opened["("].pop(), _weight(number, prompt))
        elif bracket == ")" and opened["("]:
            multiply(opened["("].pop(), FACTOR)
        elif bracket == "]" and opened["["]:
            start = opened["["].pop()
            _check_editing(pieces[start:], prompt)
            multiply(start, 1 / FACTOR)
        else:
            pieces.append(_Piece(part["escaped"] or part[0], escaped=part["escaped"] is not None))
    for bracket, factor in (("(", FACTOR), ("[", 1 / FACTOR)):
        for start in opened[bracket]:
            multiply(start, factor)
    return _joined(pieces)


def _weight(number: str, prompt: str) -> float:
    weight = float(number)
    if abs(weight) > LARGEST:
        raise UserError(
            f"weight {number} in prompt {quoted(prompt)}: expected -{LARGEST:g} to {LARGEST:g}; "
            r"write \( and \) for parentheses that are text"
        )
    return weight


def _check_editing(pieces: list[_Piece], prompt: str) -> None:
    if _EDITING.search("".join("" if piece.escaped else piece.text for piece in pieces)):
        raise UserError(
            f"prompt {quoted(prompt)} has [from:to:when] or [one|other]: "
            r"expected one prompt for all steps; write \[ and \] for brackets that are text"
        )


def _joined(pieces: list[_Piece]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for piece in pieces:
        if joined and joined[-1][1] == piece.weight:
            joined[-1] = joined[-1][0] + piece.text, piece.weight
        else:
            joined.append((piece.text, piece.weight))
    return joined or [("", 1.0)]
