"""Random tensors from a seed, and comparisons of tensors."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal noise; the same seed, shape and dtype give the same numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Draw numbers in [0, 1); the same seed and shape give the same numbers."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def noise_stream(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Draw standard normal tensors without end; the same seed gives the same tensors."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(*shape, generator=generator, dtype=dtype)


def equal_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether two state dicts have the same keys and, bit for bit, the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected| of two tensors of one shape."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Assert that two tensors of one shape differ by at most a part of the largest value.

    Args:
        actual: tensor under test.
        expected: reference.
        relative: bound on max |actual - expected| / max |expected|.
    """
    assert actual.shape == expected.shape
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= relative * scale, (error, scale)
