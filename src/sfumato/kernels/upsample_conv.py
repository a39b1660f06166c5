"""Nearest-neighbour upsampling by 2 and a 3x3 convolution, as four 2x2 convolutions.

This takes 4/9 of the products. Three neighbouring rows of the upsampled map hold two different rows
of the map, and likewise for columns. So each of the four kinds of pixel (even or odd row, even or
odd column) depends on a 2x2 neighbourhood, with sums of the 3x3 weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def phase_kernels(weight: Float[Tensor, "D C 3 3"]) -> list[list[Float[Tensor, "D C 2 2"]]]:
    """Return the four 2x2 kernels as [odd row][odd column].

    Sums are computed in float32 at least, and rounded once.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return [[_sums(_sums(wide, 2, a), 3, b).to(weight.dtype) for b in (0, 1)] for a in (0, 1)]


def _sums(weight: Tensor, dim: int, odd: int) -> Tensor:
    """Merge three taps on the upsampled map into two on the map.

    They are (w0, w1 + w2) at even positions and (w0 + w1, w2) at odd ones.
    """
    w0, w1, w2 = weight.unbind(dim)
    return torch.stack([w0 + w1, w2] if odd else [w0, w1 + w2], dim)


def upsample_convolve(
    padded: Float[Tensor, "B C h w"], channels: int, convolve: Callable[[Tensor, int, int], Tensor]
) -> Float[Tensor, "B D H W"]:
    """Upsample a padded map by 2 and convolve it.

    Args:
        padded: map with one row and one column of zeros around it.
        channels: D, number of output channels.
        convolve: (part, odd row, odd column) -> the part convolved without padding by
            kernels(W)[odd row][odd column].

    Returns:
        (B, D, 2 (h - 2), 2 (w - 2)).
    """
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    layout = torch.channels_last if _is_channels_last(padded) else torch.contiguous_format
    shape = (len(padded), channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=padded.dtype, device=padded.device, memory_format=layout)
    for a in (0, 1):
        for b in (0, 1):
            part = padded[:, :, a : a + height + 1, b : b + width + 1]
            out[:, :, a::2, b::2] = convolve(part, a, b)
    return out


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
