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
from sfumato.io.atomic import read_tensors, write_tensors


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean (D,) and unbiased covariance (D, D) of `count` features, with the hashes of the network
    and of the images.
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
        return GaussianStatistics(
            count,
            self.mean + delta * (other.count / count),
            scatter / (count - 1),
            self.features,
            self.data,
        )


def gaussian(
    features: Float[Tensor, "N D"], network: str = "", data: str = ""
) -> GaussianStatistics:
    """Mean and covariance of at least two features. `network` and `data` are the hashes kept beside
    them.
    """
    x = check_features(features, least=2)
    mean = x.mean(dim=0)
    centred = x - mean
    return GaussianStatistics(len(x), mean, centred.T @ centred / (len(x) - 1), network, data)


def stream(
    batches: Iterable[Float[Tensor, "_ D"]], network: str = "", data: str = ""
) -> GaussianStatistics:
    """The same from an iterator of batches, holding one at a time; a last batch of one row joins
    the batch before it.
    """
    total: GaussianStatistics | None = None
    held: Tensor | None = None
    for batch in batches:
        if held is None or len(batch) < 2 or len(held) < 2:
            held = batch if held is None else torch.cat([held, batch])
            continue
        part = gaussian(held, network, data)
        total, held = part if total is None else total.merge(part), batch
    if held is None:
        raise UserError("no features were given: expected at least one batch")
    last = gaussian(held, network, data)
    return last if total is None else total.merge(last)


def _square_root(matrix: Float64[Tensor, "D D"]) -> Float64[Tensor, "D D"]:
    """The symmetric root of a positive semi-definite matrix. Eigenvalues at rounding level are
    zero, not noise with a root of 1e-8.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = torch.where(
        values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps, values, 0.0
    )
    return (vectors * values.sqrt()) @ vectors.T


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The distance d^2 >= 0, in squared units of the features.

    Errors: `UserError` where the two come from different feature networks.
    """
    if a.mean.shape != b.mean.shape or (a.features and b.features and a.features != b.features):
        first, second = (
            f"{len(s.mean)} features, hash {s.features[:12] or 'none'}" for s in (a, b)
        )
        raise UserError(
            f"statistics of different feature networks cannot be compared ({first}; {second}): use one network for both"
        )
    cross = torch.linalg.svdvals(_square_root(a.cov) @ _square_root(b.cov)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(0.0, float(distance))


def save_statistics(path: str | Path, statistics: GaussianStatistics) -> None:
    """Writes a safetensors file with both hashes, so that a reference of 60,000 images is computed
    once.
    """
    tensors = {
        "mean": statistics.mean,
        "cov": statistics.cov,
        "count": torch.tensor(statistics.count),
    }
    hashes = {"features": statistics.features, "data": statistics.data}
    write_tensors(path, tensors, metadata={f"sfumato.{k}": v for k, v in hashes.items()})


def load_statistics(
    path: str | Path, features: str | None = None, data: str | None = None
) -> GaussianStatistics:
    """Reads what `save_statistics` wrote.

    Errors: `UserError` where the file is not one, or is of another network or other images than the
    hashes asked for.
    """
    from safetensors import safe_open

    tensors = read_tensors(path)
    if set(tensors) != {"mean", "cov", "count"}:
        raise UserError(
            f"{path} holds {', '.join(sorted(tensors)[:5])}: expected the mean, cov and count of reference statistics"
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    found = {
        "features": metadata.get("sfumato.features", ""),
        "data": metadata.get("sfumato.data", ""),
    }
    for name, wanted in (("features", features), ("data", data)):
        if wanted is not None and found[name] != wanted:
            both = f"hash {found[name][:12] or 'none'}, expected {wanted[:12]}"
            raise UserError(
                f"{path} was made with other {name} ({both}): compute the reference again"
            )
    return GaussianStatistics(
        int(tensors["count"]), tensors["mean"], tensors["cov"], found["features"], found["data"]
    )
