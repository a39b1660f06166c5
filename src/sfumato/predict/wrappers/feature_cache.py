"""Feature cache: reuse of a U-Net's deep features between steps (DeepCache).

(Ma et al. 2024, arXiv:2312.00858, section 3.3.) Deep features change little from one step to the
next. The network is cut at its m-th skip D_m. On a key call it runs whole, and the features from
below the cut, F, are cached. On the calls between only the layers above the cut run, with the
cached features:

    key call     F = below(D_m),   y = above(F, D_m)
    in between   y = above(F cached, D_m)

Key calls are every N-th (1:N in the paper), or a schedule, or, image by image, those where D_m has
moved by more than a threshold from where F was made, |D_m - D_m cached|_1 / |D_m cached|_1 (the
distance of TeaCache, Liu et al. 2025, arXiv:2411.19108, measured after the first layers as
"first-block" caches do).

It is exact for N = 1, else an approximation: benchmarks/feature_cache.py prints the saving and the
error. There (the bundled model, 64 images, 20 steps, seed 0) with 57 % of the operations saved the
images' PSNR against the exact ones is 26.1 dB for N = 3, 24.8 dB for a threshold, and 31.6 dB for a
schedule dense where the run begins (calls 0, 1, 2, 4, 7, 11, 16): early features move most.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.batching import (
    BatchingDenoiser,
    DenoiseCalls,
    DenoiseFn,
    DenoiserCall,
    DenoiserLike,
    NetworkDenoiser,
    map_calls,
)
from sfumato.errors import UserError
from sfumato.types import Conditioning, Prediction
from sfumato.validate import number_in, positive_int, whole_number


@runtime_checkable
class CuttableNetwork(Protocol):
    """A network in a shallow and a deep part, with some skips between them, as the U-Net.

    Attributes:
        shallow_down: (x, timestep, cond, skips) -> the skips above the cut, that at the cut last,
            and the time embedding.
        deep: (skip at the cut, time embedding, cond, skips) -> the features from below the cut.
        shallow_up: (features, the skips, time embedding, cond) -> y.
    """

    shallow_down: Callable[..., tuple[Sequence[Tensor], Tensor]]
    deep: Callable[..., Tensor]
    shallow_up: Callable[..., Tensor]


def feature_cache(
    denoise: DenoiseFn,
    every: int | Sequence[int] | None = 1,
    threshold: float | None = None,
    skips: int = 1,
) -> DenoiseFn:
    """Run a U-Net's deep part at key calls only.

    Each denoiser call of a step (conditional, unconditional, each window) and each image in it has
    its own cache. It serves one run, whose steps come one after the other: build one a run, around
    guidance and multidiffusion.

    Args:
        denoise: The denoiser of a run.
        every: N, the deep part runs at every N-th step; or the steps (from 0) at which it runs;
            None leaves it to the threshold.
        threshold: It runs besides for images whose features at the cut have moved by more than
            this. The first step is always whole.
        skips: Number of skips above the cut.

    Raises:
        UserError: For a second run at the same time, settings that cannot be, and networks that
            cannot be cut there.
    """
    rule = _KeyCalls(every, threshold, skips)
    caches: dict[tuple[Hashable, ...], _CallCache] = {}
    steps, busy = 0, False

    def with_cache(call: DenoiserCall, *position: int) -> DenoiserCall:
        key = *position, id(call.denoiser), call.x.shape
        cache = caches.setdefault(key, _CallCache(call.denoiser))
        return replace(call, denoiser=_CachingDenoiser(call.denoiser, rule, cache, steps))

    def cached(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        nonlocal steps, busy
        if busy:
            raise UserError(
                "a feature cache serves one run: build one for each, "
                "and put it around multidiffusion, not inside"
            )
        busy, rounds = True, itertools.count()

        def with_caches(calls: list[DenoiserCall]) -> list[DenoiserCall]:
            # The number of calls is in the key: where guidance is off for a while, positions shift.
            number = next(rounds)
            return [with_cache(call, number, len(calls), k) for k, call in enumerate(calls)]

        try:
            return (yield from map_calls(denoise(x, t), with_caches))
        finally:
            steps, busy = steps + 1, False

    return cached


def check_cache(
    every: int | Sequence[int] | None = 1, threshold: float | None = None, skips: int = 1
) -> None:
    """Raise `UserError` for settings of `feature_cache` that make no sense."""
    _KeyCalls(every, threshold, skips)


def require_cuttable(denoiser: DenoiserLike | BatchingDenoiser) -> None:
    """Raise `UserError` unless the denoiser's network can be cut at its skips."""
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser
    if not isinstance(network, CuttableNetwork):
        raise UserError(
            "a feature cache needs a network that can be cut, as the U-Net can: "
            f"{type(network).__name__} cannot; use none"
        )


def identity_settings(x: Tensor, point: Any) -> dict[str, Any]:
    """Return settings with which the network always runs whole: see the folder's docstring."""
    return {"every": 1}


@dataclass(frozen=True)
class _CachedFeatures:
    """One image's features at the cut and from below it, of its last whole step."""

    step: int
    entry: Tensor
    deep: Tensor


@dataclass(frozen=True)
class _CallCache:
    """Cache of one denoiser call of a run's steps.

    It holds the denoiser, whose id is in its key: no other object can get that id.
    """

    denoiser: DenoiserLike | BatchingDenoiser
    features: dict[int, _CachedFeatures] = field(default_factory=dict)


@dataclass(frozen=True)
class _KeyCalls:
    """Steps at which the deep part runs."""

    every: int | Sequence[int] | None
    threshold: float | None
    skips: int

    def __post_init__(self) -> None:
        every, threshold = self.every, self.threshold
        if every is None and threshold is None:
            raise UserError(
                "every=None without a threshold: "
                "expected one or the other, to decide when the network runs whole"
            )
        if isinstance(every, Sequence) and not isinstance(every, str) and every:
            for call in every:
                whole_number("every", call, 0, hint="the calls at which the network runs whole")
        elif every is not None:
            hint = "1 is exact; or a list of the calls at which the network runs whole"
            positive_int("every", every, hint=hint)
        if threshold is not None:
            number_in("threshold", threshold, 0)
        positive_int("skips", self.skips)

    def due(self, cached: _CachedFeatures | None, step: int, entry: Tensor) -> bool:
        """Return True if the deep part runs for an image.

        Args:
            cached: The features of its last whole step.
            step: Number of steps before.
            entry: Its features at the cut, (C, h, w).
        """
        if cached is None:
            return True
        if isinstance(self.every, int):
            key = step - cached.step >= self.every
        else:
            key = any(cached.step < key <= step for key in self.every or ())
        if key or self.threshold is None:
            return key
        # Image by image, so that the decision does not depend on the batch.
        distance = (entry.float() - cached.entry.float()).abs().mean()
        return float(distance) > self.threshold * float(cached.entry.float().abs().mean())


@dataclass(frozen=True, eq=False)
class _CachingDenoiser(BatchingDenoiser):
    """A denoiser at one step, with the cache of one call, for `denoiser.evaluate_calls`."""

    denoiser: DenoiserLike | BatchingDenoiser
    rule: _KeyCalls
    cache: _CallCache
    step: int

    @property
    def batch_key(self) -> Hashable:
        """Key of calls that share a pass: the same network cut at the same place, in any run."""
        return id(self.denoiser), "feature_cache", self.rule.skips

    def evaluate_calls(
        self,
        calls: Sequence[DenoiserCall],
        forward: Callable[[list[DenoiserCall]], list[Prediction]],
    ) -> list[Prediction]:
        """Evaluate calls with one `batch_key` by a `forward` of the network cut in two."""
        require_cuttable(self.denoiser)
        whole = cast(Any, self.denoiser)
        rows = [(cast(Any, call.denoiser), row) for call in calls for row in range(len(call.x))]
        cut = replace(whole, network=_CutNetwork(whole.network, rows, self.rule.skips))
        return forward([replace(call, denoiser=cut) for call in calls])


class _CutNetwork(nn.Module):
    """The network during one pass.

    Args:
        network: A network in a shallow and a deep part.
        rows: (denoiser, row of its cache), one a row of the batch.
        skips: Number of skips above the cut.
    """

    def __init__(
        self, network: CuttableNetwork, rows: Sequence[tuple[_CachingDenoiser, int]], skips: int
    ):
        super().__init__()
        self.network, self.skips = network, skips
        self.rows = iter(rows)  # a large pass comes in several batches, in order

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Run the shallow part for all rows, the deep part for those that are due."""
        rows = [next(self.rows) for _ in range(len(x))]
        skips, time = self.network.shallow_down(x, timestep, cond, self.skips)
        entry = skips[-1]
        due = [
            k
            for k, (d, row) in enumerate(rows)
            if d.rule.due(d.cache.features.get(row), d.step, entry[k])
        ]
        if len(due) == len(rows):
            deep = self.network.deep(entry, time, cond, self.skips)
        elif due:
            some = torch.tensor(due, device=x.device)
            deep = self.network.deep(entry[some], time[some], cond[some], self.skips)
        else:
            deep = ()
        for k, features in zip(due, deep, strict=True):
            denoiser, row = rows[k]
            denoiser.cache.features[row] = _CachedFeatures(denoiser.step, entry[k], features)
        if len(due) < len(rows):
            deep = torch.stack([denoiser.cache.features[row].deep for denoiser, row in rows])
        return self.network.shallow_up(deep, skips, time, cond)
