"""Frechet distance between two sets of features, each summarised as a Gaussian.

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, Eq. 6 (which writes tr (S1 S2)^(1/2),
the same number). The last trace is the sum of the singular values of S1^(1/2) S2^(1/2): symmetric
square roots always exist, so neither a non-symmetric root nor a small multiple of the identity is
needed where there are fewer images than features. float64 throughout.

The distance of n samples from a reference falls as n grows (Chong and Forsyth 2020,
arXiv:1911.07023): compare equal n only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluate.inputs import check_features
from sfumato.io.atomic import open_tensors, write_tensors


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of features.

    Attributes:
        count: Number of features.
        mean: (D,)
        cov: Unbiased, (D, D).
        features: Hash of the feature network; empty: unknown.
        data: Hash of the images; empty: unknown.
    """

    count: int
    mean: Float64[Tensor, " D"]
    cov: Float64[Tensor, "D D"]
    features: str = ""
    data: str = ""

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Statistics of both sets together (Chan et al. 1979: pairwise update, no cancellation)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        scatter = self.cov * (self.count - 1) + other.cov * (other.count - 1) + between
        mean = self.mean + delta * (other.count / count)
        return GaussianStatistics(count, mean, scatter / (count - 1), self.features, self.data)


def gaussian(
    features: Float[Tensor, "N D"], network: str = "", data: str = ""
) -> GaussianStatistics:
    """Mean and covariance of at least two features (N, D).

    Args:
        features: (N, D).
        network: Hash of the feature network, kept beside them.
        data: Hash of the images, kept beside them.
    """
    x = check_features(features, least=2)
    mean = x.mean(dim=0)
    centred = x - mean
    return GaussianStatistics(len(x), mean, centred.T @ centred / (len(x) - 1), network, data)


def gaussian_of_batches(
    batches: Iterable[Float[Tensor, "_ D"]], network: str = "", data: str = ""
) -> GaussianStatistics:
    """`gaussian` of an iterator of batches, holding one at a time.

    A last batch of one row joins the batch before it.

    Raises:
        UserError: For no batch.
    """
    total: GaussianStatistics | None = None
    last: Tensor | None = None
    for batch in batches:
        if last is None or len(batch) < 2 or len(last) < 2:
            last = batch if last is None else torch.cat([last, batch])
            continue
        part = gaussian(last, network, data)
        total, last = part if total is None else total.merge(part), batch
    if last is None:
        raise UserError("no features were given: expected at least one batch")
    part = gaussian(last, network, data)
    return part if total is None else total.merge(part)


def _square_root(matrix: Float64[Tensor, "D D"]) -> Float64[Tensor, "D D"]:
    """The symmetric root of a positive semi-definite matrix.

    Eigenvalues at rounding level are zero, not noise with a root of 1e-8.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    rounding = values.abs().max() * len(values) * torch.finfo(torch.float64).eps
    values = torch.where(values > rounding, values, 0.0)
    return (vectors * values.sqrt()) @ vectors.T


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The distance d^2 >= 0, in squared units of the features.

    Raises:
        UserError: For statistics of different feature networks.
    """
    if a.mean.shape != b.mean.shape or (a.features and b.features and a.features != b.features):
        both = "; ".join(
            f"{len(s.mean)} features, hash {s.features[:12] or 'none'}" for s in (a, b)
        )
        raise UserError(
            f"statistics of different feature networks cannot be compared ({both}): "
            "use one network for both"
        )
    cross = torch.linalg.svdvals(_square_root(a.cov) @ _square_root(b.cov)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(0.0, float(distance))


def save_statistics(path: str | Path, statistics: GaussianStatistics) -> None:
    """Write a safetensors file with both hashes: a large reference is computed once."""
    tensors = {"mean": statistics.mean, "cov": statistics.cov}
    tensors["count"] = torch.tensor(statistics.count)
    hashes = {"features": statistics.features, "data": statistics.data}
    write_tensors(path, tensors, metadata={f"sfumato.{k}": v for k, v in hashes.items()})


def load_statistics(
    path: str | Path, features: str | None = None, data: str | None = None
) -> GaussianStatistics:
    """Read the file of `save_statistics`.

    Args:
        path: The file.
        features: The expected hash of the feature network; None: any.
        data: The expected hash of the images; None: any.

    Raises:
        UserError: For another file, and statistics of another network or other images.
    """
    tensors, metadata = open_tensors(path)
    if set(tensors) != {"mean", "cov", "count"}:
        raise UserError(
            f"{path} holds {', '.join(sorted(tensors)[:5])}: "
            "expected the mean, cov and count of reference statistics"
        )
    hashes = {name: metadata.get(f"sfumato.{name}", "") for name in ("features", "data")}
    for name, expected in (("features", features), ("data", data)):
        if expected is not None and hashes[name] != expected:
            both = f"hash {hashes[name][:12] or 'none'}, expected {expected[:12]}"
            raise UserError(
                f"{path} was made with other {name} ({both}): compute the reference again"
            )
    return GaussianStatistics(int(tensors["count"]), tensors["mean"], tensors["cov"], **hashes)
