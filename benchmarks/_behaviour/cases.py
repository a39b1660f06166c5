"""All cases, in the order in which they run."""

from collections.abc import Iterator

from _behaviour import bundled, command_line, families, pictures, stored, training
from _behaviour.context import Context
from _behaviour.outcome import Case


def cases(context: Context) -> Iterator[Case]:
    """Every case. Building the list computes nothing."""
    for group in (bundled, families, stored, command_line, pictures, training):
        yield from group.cases(context)
