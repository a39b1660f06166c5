"""Conditions between two conditions: (1 - s) a + s b, door by door.

A class's one-hot vector becomes a mixture of two; states of a text encoder, of which
cross-attention makes sums, become states between. Where one prompt has more chunks than the other,
both are repeated to a common length: attention over keys that are all there twice is attention over
them once, so that repeating changes nothing at either end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.types import Conditioning


def between(a: Conditioning, b: Conditioning, shares: Sequence[float]) -> Conditioning:
    """Row k lies at shares[k] in [0, 1] of the way from a's (0) to b's (1). `UserError` for
    conditions that differ in kind or have masks.
    """
    if any(
        door is not None for c in (a, b) for door in (c.mask, c.concat, c.residuals, c.image_tokens)
    ):
        raise UserError(
            "conditions with masks (of padded words, as PixArt's) or pictures have nothing between them: expected one prompt for all images; "
            "between two seeds or pictures there is a way"
        )
    s = torch.tensor(list(shares), dtype=torch.float32)
    return Conditioning(
        tokens=_mixed(*_repeated(a.tokens, b.tokens), s), vector=_mixed(a.vector, b.vector, s)
    )


def _repeated(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Tokens (B, L, D) repeated to the least common multiple of both lengths."""
    if a is None or b is None or a.shape[1] == b.shape[1]:
        return a, b
    length = math.lcm(a.shape[1], b.shape[1])
    return a.repeat(1, length // a.shape[1], 1), b.repeat(1, length // b.shape[1], 1)


def _mixed(a: Tensor | None, b: Tensor | None, shares: Tensor) -> Tensor | None:
    """From the nearer end, so that both ends, and what is equal in both, stay as they are to the
    last bit.
    """
    if a is None or b is None:
        assert a is b, "one conditioner opens the same doors for all prompts"
        return None
    s, way = shares.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), b - a
    return torch.where(s < 0.5, a + s * way, b - (1 - s) * way)
