"""Nearest-neighbour doubling and a 3x3 convolution as four 2x2 convolutions of the map itself: 4/9
of the products, the same numbers.

A row of the doubled map and its neighbours hold two different rows of the map, and so with columns:
each of the four kinds of pixel (even or odd row, even or odd column) sees a 2x2 neighbourhood, with
sums of the 3x3 weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def kernels(weight: Float[Tensor, "D C 3 3"]) -> list[list[Float[Tensor, "D C 2 2"]]]:
    """kernels(W)[odd row][odd column]. Sums are made in float32 at least, and rounded once."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return [[_sums(_sums(wide, 2, a), 3, b).to(weight.dtype) for b in (0, 1)] for a in (0, 1)]


def _sums(weight: Tensor, dim: int, odd: int) -> Tensor:
    """Three taps on a doubled map as two on the map: (w0, w1 + w2) for even places, (w0 + w1, w2)
    for odd ones.
    """
    w0, w1, w2 = weight.unbind(dim)
    return torch.stack([w0 + w1, w2] if odd else [w0, w1 + w2], dim)


def double(
    padded: Float[Tensor, "B C h w"], channels: int, convolve: Callable[[Tensor, int, int], Tensor]
) -> Float[Tensor, "B D H W"]:
    """The convolved doubled map, (B, channels, 2 (h - 2), 2 (w - 2)), of a map with one row and
    column of zeros around it.

    convolve: (part, odd row, odd column) -> the part's convolution, without padding, with that
    kind's kernel.
    """
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    layout = torch.channels_last if _last(padded) else torch.contiguous_format
    shape = (len(padded), channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=padded.dtype, device=padded.device, memory_format=layout)
    for a in (0, 1):
        for b in (0, 1):
            out[:, :, a::2, b::2] = convolve(
                padded[:, :, a : a + height + 1, b : b + width + 1], a, b
            )
    return out


def _last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
