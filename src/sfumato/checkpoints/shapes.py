"""The shapes of a file's tensors, from which configs are detected."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from sfumato.errors import UserError


@dataclass(frozen=True)
class Shapes:
    """The shapes of a file's tensors below one prefix.

    Widths are best read from one-dimensional tensors (norms, biases), which cannot be transposed.
    """

    table: Mapping[str, tuple[int, ...]]
    prefix: str = ""
    where: object = "the file"

    def below(self, prefix: str) -> "Shapes":
        """The shapes below another prefix."""
        return Shapes(self.table, prefix, self.where)

    def error(self, fault: str) -> UserError:
        """The error for a file that cannot be read."""
        return UserError(f"{self.where}: {fault}")

    def damaged(self, fault: str) -> UserError:
        """The error for keys or shapes that contradict each other."""
        return self.error(f"{fault}: it may be damaged, or is of no known kind")

    def has(self, start: str) -> bool:
        """True where any key below the prefix begins with `start`."""
        return any(k.startswith(self.prefix + start) for k in self.table)

    def size(self, key: str, axis: int = 0, rank: int = 1) -> int:
        """One side of a tensor of `rank` dimensions.

        Raises:
            UserError: The tensor is missing, or has another number of dimensions.
        """
        if self.rank(key) != rank:
            shape = self.table[self.prefix + key]
            raise self.damaged(f"{self.prefix + key} has shape {shape}, not {rank} dimensions")
        return self.table[self.prefix + key][axis]

    def rank(self, key: str) -> int:
        """The number of dimensions of one tensor; `UserError` where it is missing."""
        if self.prefix + key not in self.table:
            raise UserError(
                f"{self.where} lacks {self.prefix + key}, which decides its architecture: "
                "it may be damaged; copy it again"
            )
        return len(self.table[self.prefix + key])

    def count(self, start: str) -> int:
        """One more than the largest number that follows `start` in any key; 0 where none does."""
        pattern = re.compile(re.escape(self.prefix + start) + r"(\d{1,4})\.")
        return 1 + max((int(m[1]) for k in self.table if (m := pattern.match(k))), default=-1)

    def square(self, key: str) -> int:
        """The side of the square grid whose cells are the rows of a (1, cells, D) table.

        Raises:
            UserError: The number of cells is not a square.
        """
        cells = self.size(key, 1, 3)
        side = isqrt(cells)
        if side * side != cells:
            raise self.damaged(f"{self.prefix}{key} has {cells} places, which are no square")
        return side

    def heads(self, width: int, head: int) -> int:
        """The number of heads of width `head` in a layer of this width.

        Raises:
            UserError: The width is no multiple of `head`.
        """
        if head < 1 or width % head:
            raise self.damaged(f"width {width} does not divide into heads {head} wide")
        return width // head


def one_or_all(values: list[Any]) -> Any:
    """One value where all levels agree, else the list."""
    return values[0] if all(v == values[0] for v in values) else values
