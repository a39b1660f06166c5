"""Classes: agreement of samples with requested classes, and evenness without a request.

    accuracy  = share of samples to which the classifier gives the requested label; the
                classification accuracy score (arXiv:1905.10887) trains on samples instead
    deviation = max over classes of |count - n/K| / (n/K), in %

The classifier's own accuracy on real images is the ceiling of the first, and is reported beside it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluate.inputs import check_labels


@dataclass(frozen=True)
class Classes:
    """The classifier's guesses, beside the requested labels.

    Attributes:
        accuracy: In [0, 1]; None without labels.
        by_class: Accuracy of each class, None for one that was never requested; empty without
            labels.
        counts: Guesses of each class.
        deviation: See `deviation_from_even`.
    """

    accuracy: float | None
    by_class: tuple[float | None, ...]
    counts: tuple[int, ...]
    deviation: float


def deviation_from_even(counts: Int64[Tensor, " K"]) -> float:
    """Largest distance of a class's count from n/K, in % of n/K.

    0 is even, 100 (K - 1) is all in one class.
    """
    even = float(counts.sum()) / len(counts)
    return float((counts.double() - even).abs().max() / even * 100)


def classes(logits: Float[Tensor, "N K"], labels: Int64[Tensor, " N"] | None = None) -> Classes:
    """Compare the classifier's guesses with the requested labels, or only count them.

    Args:
        logits: (N, K) of the classifier.
        labels: (N,) in [0, K); None: only count.

    Raises:
        UserError: For other shapes and labels.
    """
    if logits.ndim != 2 or len(logits) == 0:
        shape = tuple(logits.shape)
        raise UserError(f"logits have shape {shape}: expected (N, K) with at least one image")
    kinds = logits.shape[1]
    guesses = logits.argmax(dim=1)
    counts = torch.bincount(guesses, minlength=kinds)
    accuracy, by_class = None, ()
    if labels is not None:
        labels = check_labels(labels, len(logits), kinds)
        right = (guesses == labels).double()
        accuracy = float(right.mean())
        by_class = tuple(
            float(right[labels == k].mean()) if bool((labels == k).any()) else None
            for k in range(kinds)
        )
    return Classes(accuracy, by_class, tuple(counts.tolist()), deviation_from_even(counts))
