"""Linear interpolation of two conditionings, field by field: (1 - s) a + s b.

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


def interpolate_conditioning(
    a: Conditioning, b: Conditioning, shares: Sequence[float]
) -> Conditioning:
    """Interpolate two conditionings.

    Args:
        a: The conditioning at share 0.
        b: The conditioning at share 1.
        shares: One number in [0, 1] a row.

    Raises:
        UserError: For conditionings with masks, images or residuals.
    """
    fields = (f for c in (a, b) for f in (c.mask, c.concat, c.residuals, c.image_tokens))
    if any(field is not None for field in fields):
        raise UserError(
            "conditionings with masks (of padding, as PixArt's) or images cannot be interpolated: "
            "expected one prompt for all images; two seeds or two images can be"
        )
    s = torch.tensor(list(shares), dtype=torch.float32)
    return Conditioning(
        tokens=_lerp(*_same_length(a.tokens, b.tokens), s), vector=_lerp(a.vector, b.vector, s)
    )


def _same_length(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Tokens (B, L, D) repeated to the least common multiple of both lengths."""
    if a is None or b is None or a.shape[1] == b.shape[1]:
        return a, b
    length = math.lcm(a.shape[1], b.shape[1])
    return a.repeat(1, length // a.shape[1], 1), b.repeat(1, length // b.shape[1], 1)


def _lerp(a: Tensor | None, b: Tensor | None, shares: Tensor) -> Tensor | None:
    """(1 - s) a + s b, from the nearer end.

    Both ends keep their bits, and so do values that are equal in both.
    """
    if a is None or b is None:
        assert a is b, "one conditioner sets the same fields for all prompts"
        return None
    s, difference = shares.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), b - a
    return torch.where(s < 0.5, a + s * difference, b - (1 - s) * difference)
