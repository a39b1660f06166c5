"""Memorisation: distances of samples to the training images, beside those of other images.

    nearest training neighbour:  d(s) = min_i |f(s) - f(x_i)|
    ratio        = median d(samples) / median d(held-out)
                 about 1 for a model that has learnt the distribution, towards 0 for copies
    closer_share = share of samples with d(s) below the 1 % quantile of d(held-out)
                 about 1 % for such a model, towards 100 % for copies

Held-out real images have the distances to the training set that a model without copies would have.
This is the "data-copying" comparison of Meehan et al. 2020, arXiv:2004.05675, section 2, on
nearest-neighbour distances.
"""

from dataclasses import dataclass

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sfumato.evaluate.inputs import check_features
from sfumato.evaluate.precision_recall import nearest

QUANTILE = 0.01


@dataclass(frozen=True, eq=False)
class Memorisation:
    """Nearest training images of samples.

    Attributes:
        ratio: Quotient of median distances, above 0.
        closer_share: In [0, 1].
        indices: (n, k) of the training neighbours of each sample, nearest first.
        distances: (n, k) of these.
    """

    ratio: float
    closer_share: float
    indices: Int64[Tensor, "n k"]
    distances: Float64[Tensor, "n k"]


def memorisation(
    samples: Float[Tensor, "n D"],
    train: Float[Tensor, "m D"],
    held_out: Float[Tensor, "h D"],
    k: int = 1,
) -> Memorisation:
    """Compare features of samples with those of the training set and of held-out images.

    Args:
        samples: (n, D).
        train: (m, D).
        held_out: (h, D), of real images outside the training set.
        k: Training neighbours of each sample to return.

    Raises:
        UserError: For fewer than k training images.
    """
    check_features(held_out, 1, "features of held-out images")
    indices, distances = nearest(samples, train, k)
    _, usual = nearest(held_out, train, 1)
    median, usual_median = (float(d.quantile(0.5)) for d in (distances[:, 0], usual))
    ratio = float("inf") if median > 0 else 1.0
    if usual_median > 0:
        ratio = median / usual_median
    closer = distances[:, 0] < usual.quantile(QUANTILE)
    return Memorisation(ratio, float(closer.double().mean()), indices, distances)
