"""Precision, recall, density and coverage: fidelity and variety, each by itself.

    B(x)      = the ball around x whose radius is the distance to the k-th nearest *other* point of
                x's own set
    precision = share of samples in some ball of a real image
    recall    = share of real images in some ball of a sample
    density   = mean over samples of (real balls that hold it) / k
    coverage  = share of real images whose ball holds a sample

Precision and recall: Kynkaanniemi et al. 2019, arXiv:1904.06991, Eqs. 1 and 2. Density and
coverage: Naeem et al. 2020, arXiv:2002.09797, Eqs. 3 and 4: real balls only, so one odd sample
cannot inflate recall, and one odd real image not precision. For equal distributions the expectation
of density is 1 and that of coverage is given by `expected_coverage`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sfumato.evaluate.inputs import check_features
from sfumato.validate import positive_int

ENTRIES = 2**23
"""Entries of the distance matrix held at once (64 MiB in float64)."""


@dataclass(frozen=True)
class Manifold:
    """The four numbers, with the k and the two counts on which they depend.

    Attributes:
        precision: In [0, 1].
        recall: In [0, 1].
        density: In [0, inf).
        coverage: In [0, 1].
        k: Neighbours.
        real_count: Number of real images.
        sample_count: Number of samples.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    real_count: int
    sample_count: int


def squared_distances(
    a: Float64[Tensor, "n D"], b: Float64[Tensor, "m D"]
) -> Iterator[tuple[int, Float64[Tensor, "c m"]]]:
    """(first row, squared Euclidean distances of some rows of a to all of b), chunk by chunk."""
    norms = b.square().sum(dim=1)
    size = max(1, ENTRIES // len(b))
    for start in range(0, len(a), size):
        rows = a[start : start + size]
        squares = torch.addmm(norms[None, :], rows, b.T, alpha=-2)
        yield start, squares.add_(rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def nearest(
    a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], k: int, same: bool = False
) -> tuple[Int64[Tensor, "n k"], Float64[Tensor, "n k"]]:
    """The k rows of b that are nearest to each row of a, nearest first.

    Distances are recomputed from differences: exact for duplicates.

    Args:
        a: (n, D).
        b: (m, D).
        k: Number of neighbours.
        same: True where a is b: each row itself is left out.

    Returns:
        Indices (n, k) into b, and Euclidean distances (n, k).
    """
    x, y = check_features(a, least=1), check_features(b, least=k + same)
    indices, distances = [], []
    for start, squared in squared_distances(x, y):
        rows = torch.arange(len(squared))
        if same:
            squared[rows, start + rows] = torch.inf
        # equal distances: lower index first
        neighbours = squared.topk(k, dim=1, largest=False).indices.sort(dim=1).values
        exact = (x[start : start + len(squared), None] - y[neighbours]).norm(dim=2)
        order = exact.argsort(dim=1, stable=True)
        indices.append(neighbours.gather(1, order))
        distances.append(exact.gather(1, order))
    return torch.cat(indices), torch.cat(distances)


def radii(points: Float[Tensor, "n D"], k: int) -> Float64[Tensor, " n"]:
    """Distance of each point to its k-th nearest other point."""
    return nearest(points, points, k, same=True)[1][:, -1]


def _inside(
    points: Float64[Tensor, "n D"], centres: Float64[Tensor, "m D"], radius: Float64[Tensor, " m"]
) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " m"]]:
    """The number of balls that hold each point, and True for the balls that hold any."""
    counts, used = [], torch.zeros(len(centres), dtype=torch.bool)
    for _, squared in squared_distances(points, centres):
        hit = squared <= radius.square()
        counts.append(hit.sum(dim=1))
        used |= hit.any(dim=0)
    return torch.cat(counts), used


def manifold(real: Float[Tensor, "n D"], samples: Float[Tensor, "m D"], k: int = 5) -> Manifold:
    """The four numbers for features of real images (n, D) and of samples (m, D).

    Raises:
        UserError: For k < 1 or fewer than k + 1 images on either side.
    """
    positive_int("k", k, unit="nearest neighbours", hint="5 is usual")
    x = check_features(real, k + 1, "features of real images")
    y = check_features(samples, k + 1, "features of samples")
    real_balls_of_samples, covered = _inside(y, x, radii(x, k))
    sample_balls_of_real, _ = _inside(x, y, radii(y, k))
    return Manifold(
        precision=float((real_balls_of_samples > 0).double().mean()),
        recall=float((sample_balls_of_real > 0).double().mean()),
        density=float(real_balls_of_samples.double().mean() / k),
        coverage=float(covered.double().mean()),
        k=k,
        real_count=len(x),
        sample_count=len(y),
    )


def expected_coverage(real_count: int, sample_count: int, k: int) -> float:
    """E[coverage] where both sets come from one distribution.

    It is 1 - prod_{i=1..k} (n - i) / (n + m - i), arXiv:2002.09797, Lemma 2: the k nearest of
    n + m - 1 other points must all be real for a ball to stay empty.
    """
    empty = 1.0
    for i in range(1, k + 1):
        empty *= (real_count - i) / (real_count + sample_count - i)
    return 1 - empty
