"""Chunks of long prompts, split at commas and between words.

A CLIP text encoder has 77 positions: begin, 75 tokens, end. A longer prompt becomes several chunks,
which are encoded one by one and joined (as AUTOMATIC1111's web UI does; there is no paper). A chunk
ends after the last comma among its last `BACK` tokens, if there is one, else before the word that
does not fit; only a word that is longer than a chunk is cut itself.
"""

from collections.abc import Iterator, Sequence

from sfumato.predict.text_encoders.clip import Token

BACK = 20
"""Tokens before the end of a chunk among which a comma is searched."""


def cut(tokens: Sequence[Token], room: int) -> list[list[Token]]:
    """Split tokens into chunks of at most `room`, in their order.

    There is at least one chunk, which may be empty.
    """
    chunks: list[list[Token]] = []
    current: list[Token] = []
    for word in _words(tokens, room):
        while current and len(current) + len(word) > room:
            end = _end(current)
            chunks.append(current[:end])
            current = current[end:]
        current = current + word
    return [*chunks, current] if current or not chunks else chunks


def _words(tokens: Sequence[Token], room: int) -> Iterator[list[Token]]:
    """Split tokens into words, none longer than `room`."""
    word: list[Token] = []
    for token in tokens:
        word.append(token)
        if token.last or len(word) == room:
            yield word
            word = []
    if word:
        yield word


def _end(chunk: Sequence[Token]) -> int:
    """The best length of a full chunk: up to its last comma, if that is near the end."""
    commas = (
        i + 1 for i in range(len(chunk) - 1, max(len(chunk) - 1 - BACK, -1), -1) if chunk[i].comma
    )
    return next(commas, len(chunk))
