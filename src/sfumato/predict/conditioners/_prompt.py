r"""Weighted prompts: "a (red:1.3) hat, [trees]" -> pieces of text with a weight each.

AUTOMATIC1111's web UI (wiki, "Attention/emphasis"; modules/prompt_parser.py):

    (text:1.3)   times 1.3            (text)    times 1.1            [text]    divided by 1.1
    \( \) \[ \]  brackets as text     \\        a backslash as text
    BREAK        the end of a chunk; the next one begins with the text behind it

Before anything else a backslash is text by itself. Brackets nest, and their factors multiply. A
bracket that never closes acts to the end of the prompt, one that closes nothing is text, and so is
a colon that no number and ")" follow. BREAK is a word of its own in capitals, inside of brackets
too; whitespace around it is dropped. Two other notations of that program, [from:to:when] and
[one|other], change the prompt from step to step: they are refused, not taken as emphasis. Its word
AND is a word here, and other notations are text, which `foreign_notation` finds.

ComfyUI (comfy/sd1_clip.py, token_weights):

    (text:1.3)   1.3, in place of the weights around it      (text)    times 1.1
    \( \)        parentheses as text; [ ], \ and BREAK are text

A parenthesis that never closes is text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sfumato.errors import UserError, quoted

FACTOR = 1.1
"""The factor of ( ) without a number, and the divisor of [ ]."""

LARGEST = 10.0
"""Weights beyond this are refused: "(at 12:30)" is a time of day, not a weight of 30."""

Segment = list[tuple[str, float]]
"""Pieces (text, weight) between two BREAKs, at least one, which may be empty."""

_PART = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
      | :\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
      | (?P<bracket>[()\[\]])
      | (?P<text>[^\\()\[\]:]+|.)""",
    re.VERBOSE | re.DOTALL,
)
_EDITING = re.compile(r"\||:\s*[\d.]+\s*$")
_FOREIGN = re.compile(
    r"""<(?:lora|lyco|hypernet):[^<>]*>       # adapters (AUTOMATIC1111)
      | \bAND\b                              # two prompts at once (AUTOMATIC1111)
      | \bembedding:[\w.-]+                  # a learned word (ComfyUI)
      | __[\w/*-]+__ | \{[^{}]*\|[^{}]*\}    # a word of a list (wildcards)
      | :\s*[+-]?\d+,\d+\s*\)               # a weight with a comma
      | \)\d*\.\d+                         # weights and functions of compel
      | (?:[^\W\d_]{2,}|\))(?:\+\++|--+)(?=[\s,.;)]|$) | \)[+-](?=[\s,.;)]|$)
      | \.(?:blend|and|swap)\(
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_ESCAPES = {r"\)": "\0\1", r"\(": "\0\2"}
"""ComfyUI's escapes, and what stands for them while parentheses are parsed."""


@dataclass
class _Piece:
    text: str
    weight: float = 1.0
    escaped: bool = False
    ends_segment: bool = False


def parse(prompt: str) -> list[Segment]:
    """Parse AUTOMATIC1111's notation: prompt -> segments, at least one.

    Neighbours of equal weight are one piece. A prompt without brackets, double backslashes and
    BREAK is one piece of weight 1, unchanged.

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
        elif part["escaped"]:
            pieces.append(_Piece(part["escaped"], escaped=True))
        else:
            pieces += _split_at_breaks(part[0])
    for bracket, factor in (("(", FACTOR), ("[", 1 / FACTOR)):
        for start in opened[bracket]:
            multiply(start, factor)
    return _segments(pieces)


def parse_comfyui(prompt: str) -> Segment:
    """Parse ComfyUI's notation: prompt -> pieces, as `parse` returns them for one segment.

    Raises:
        UserError: For weights beyond `LARGEST`.
    """
    text = prompt
    for escape, mark in _ESCAPES.items():
        text = text.replace(escape, mark)
    pieces: list[_Piece] = []
    pending = [(text, 1.0, True)]  # the next text last: parentheses may nest deeper than calls
    while pending:
        text, weight, nested = pending.pop()
        if nested:
            inner = [_comfyui_group(group, weight, prompt) for group in _outermost(text)]
            pending += reversed(inner)
            continue
        for escape, mark in _ESCAPES.items():
            text = text.replace(mark, escape[1])
        pieces.append(_Piece(text, weight))
    return _joined(pieces)


def weighted_text(prompt: str) -> str | None:
    """The first text that brackets would weigh, BREAK, or a prompt that `parse` refuses.

    None: the prompt means the same without any notation.
    """
    try:
        segments = parse(prompt)
    except UserError:
        return prompt
    if len(segments) > 1:
        return "BREAK"
    return next((text for text, weight in segments[0] if weight != 1), None)


def foreign_notation(prompt: str) -> str | None:
    """The first notation of other programs in a prompt that is text under each rule here.

    Capitals in a prompt without small letters are no notation.
    """
    parts = (part[0] for part in _FOREIGN.finditer(prompt))
    return next((part for part in parts if part != "AND" or prompt.upper() != prompt), None)


def _split_at_breaks(text: str) -> Iterator[_Piece]:
    first, *others = _BREAK.split(text)
    yield _Piece(first)
    for other in others:
        yield _Piece("", ends_segment=True)
        yield _Piece(other)


def _outermost(text: str) -> Iterator[str]:
    """Split a text around its outermost parentheses, which stay at their content."""
    start = depth = 0
    for index, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and index > start:
                yield text[start:index]
            start = index if depth == 0 else start
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : index + 1]
                start = index + 1
    if start < len(text):
        yield text[start:]


def _comfyui_group(group: str, weight: float, prompt: str) -> tuple[str, float, bool]:
    """A group of `_outermost` -> (text, weight, True where it may have parentheses inside)."""
    if len(group) < 2 or group[0] != "(" or group[-1] != ")":
        return group, weight, False
    inner = group[1:-1]
    text, _, number = inner.rpartition(":")
    try:
        float(number)
    except ValueError:
        text = ""
    return (text, _weight(number, prompt), True) if text else (inner, weight * FACTOR, True)


def _weight(number: str, prompt: str) -> float:
    weight = float(number)
    if not abs(weight) <= LARGEST:
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


def _segments(pieces: list[_Piece]) -> list[Segment]:
    segments: list[list[_Piece]] = [[]]
    for piece in pieces:
        if piece.ends_segment:
            segments.append([])
        else:
            segments[-1].append(piece)
    return [_joined(segment) for segment in segments]


def _joined(pieces: list[_Piece]) -> Segment:
    joined: Segment = []
    for piece in pieces:
        if not piece.text:
            continue
        if joined and joined[-1][1] == piece.weight:
            joined[-1] = joined[-1][0] + piece.text, piece.weight
        else:
            joined.append((piece.text, piece.weight))
    return joined or [("", 1.0)]
