"""Reuse of deep features between steps (DeepCache, Ma et al. 2024, arXiv:2312.00858, section 3.3).

A U-Net's deep features change little from one step to the next. It is cut at its m-th skip D_m: on
a key call it runs whole, and what comes up from below, F, is kept; on the calls between only the
layers above the cut run, and join what was kept:

    key call     F = below(D_m),   y = above(F, D_m)             in between     y = above(F kept,
                 D_m)

Key calls are every N-th (their 1:N), or a schedule, or, image by image, those where D_m has moved
from where F was made by more than a threshold, |D_m - D_m kept|_1 / |D_m kept|_1 (the distance of
TeaCache, Liu et al. 2025, arXiv:2411.19108, measured after the first layers as "first-block" caches
do). Exact for N = 1, else an approximation: benchmarks/feature_cache.py prints what it saves and
costs. There (the bundled model, 64 images, 20 steps, seed 0) with 57 % of the operations saved the
images' PSNR against the exact ones is 26.1 dB for N = 3, 24.8 dB for a threshold, and 31.6 dB for a
schedule dense where the run begins (calls 0, 1, 2, 4, 7, 11, 16): early features move most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall
from sfumato.errors import UserError
from sfumato.types import Conditioning, Prediction
from sfumato.validate import number_in, positive_int, whole_number


def feature_cache(
    ask: DenoiseFn,
    every: int | Sequence[int] | None = 1,
    threshold: float | None = None,
    skips: int = 1,
) -> DenoiseFn:
    """The questions of one run, answered by a U-Net that remembers what lies below the first
    `skips` of its skips.

    every: N, the deep part runs at every N-th network call; or the calls (from 0) at which it runs;
    None leaves it to the threshold. threshold: it runs besides for images whose features at the cut
    have moved by more than this. The first call is always whole. Each question of a call
    (conditional, unconditional, each window) and each image in it has its own memory. It serves one
    run, whose calls come one after the other: build one a run, around guidance and large canvases.
    `UserError` for a second run at the same time, for settings that make no sense and for networks
    that cannot be cut there.
    """
    rule = _Rule(every, threshold, skips)
    branches: dict[tuple[Any, ...], _Branch] = {}
    calls, busy = 0, False

    def remembering(query: DenoiserCall, place: tuple[int, int, int], call: int) -> DenoiserCall:
        # With the number of questions in the key: where guidance is off for a while, places shift.
        branch = branches.setdefault(
            (*place, id(query.denoiser), query.x.shape), _Branch(query.denoiser)
        )
        return replace(query, denoiser=_Remembering(query.denoiser, rule, branch, call))

    def cached(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        nonlocal calls, busy
        if busy:
            raise UserError(
                "a feature cache serves one run: build one for each, and put it around a large canvas, not inside"
            )
        busy = True
        questions, rounds = ask(x, t), 0
        try:
            asked = next(questions)
            while True:
                asked = questions.send(
                    (
                        yield [
                            remembering(q, (rounds, len(asked), k), calls)
                            for k, q in enumerate(asked)
                        ]
                    )
                )
                rounds += 1
        except StopIteration as stop:
            return stop.value
        finally:
            questions.close()
            calls, busy = calls + 1, False

    return cached


def check_cache(
    every: int | Sequence[int] | None = 1, threshold: float | None = None, skips: int = 1
) -> None:
    """Raise `UserError` for settings of `feature_cache` that make no sense."""
    _Rule(every, threshold, skips)


def require_cuttable(denoiser: Any) -> None:
    """Raise `UserError` unless the denoiser's network can be cut at its skips."""
    network = getattr(denoiser, "network", None)
    if not all(hasattr(network, part) for part in ("shallow_down", "deep", "shallow_up")):
        name = type(denoiser if network is None else network).__name__
        raise UserError(
            f"a feature cache needs a network that can be cut, as the U-Net can: {name} cannot; ask without one"
        )


def off(x: Tensor, point: Any) -> dict[str, Any]:
    """Every call is whole."""
    return {"every": 1}


@dataclass(frozen=True)
class _Kept:
    """What one image left behind at its last whole call: its features at the cut, and what came up
    from below.
    """

    call: int
    entry: Tensor
    deep: Tensor


@dataclass(frozen=True)
class _Branch:
    """The memory of one question of a run's calls. It holds the denoiser, whose id is in its key:
    no other can take that id.
    """

    denoiser: Any
    kept: dict[int, _Kept] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rule:
    """When the deep part runs."""

    every: int | Sequence[int] | None
    threshold: float | None
    skips: int

    def __post_init__(self) -> None:
        every, threshold = self.every, self.threshold
        if every is None and threshold is None:
            raise UserError(
                "every=None without a threshold: expected one or the other, to say when the network runs whole"
            )
        if isinstance(every, Sequence) and not isinstance(every, str) and every:
            for call in every:
                whole_number("every", call, 0, hint="the calls at which the network runs whole")
        elif every is not None:
            positive_int(
                "every",
                every,
                hint="1 is exact; or a list of the calls at which the network runs whole",
            )
        if threshold is not None:
            number_in("threshold", threshold, 0)
        positive_int("skips", self.skips)

    def due(self, kept: _Kept | None, call: int, entry: Tensor) -> bool:
        """Whether the deep part runs for an image with these features at the cut (C, h, w)."""
        if kept is None:
            return True
        if isinstance(self.every, int) and call - kept.call >= self.every:
            return True
        if isinstance(self.every, Sequence) and any(kept.call < key <= call for key in self.every):
            return True
        if self.threshold is None:
            return False
        # Image by image, so that what is decided for one does not depend on the batch it is in.
        moved = (entry.float() - kept.entry.float()).abs().mean()
        return float(moved) > self.threshold * float(kept.entry.float().abs().mean())


@dataclass(frozen=True, eq=False)
class _Remembering:
    """A denoiser at one call, with the memory of one question: what
    `sfumato.predict.denoiser.answer` is given in its place.
    """

    denoiser: Any
    rule: _Rule
    branch: _Branch
    call: int

    @property
    def group(self) -> tuple[Any, ...]:
        """Questions with the same network cut at the same place share passes, also those of other
        runs and other rules.
        """
        return id(self.denoiser), "feature_cache", self.rule.skips

    def answer(
        self,
        queries: Sequence[DenoiserCall],
        one_pass: Callable[[list[DenoiserCall]], list[Prediction]],
    ) -> list[Prediction]:
        require_cuttable(self.denoiser)
        network = self.denoiser.network
        rows = [(query.denoiser, row) for query in queries for row in range(len(query.x))]
        cut = replace(self.denoiser, network=_Cut(network, rows, self.rule.skips))
        return one_pass([replace(query, denoiser=cut) for query in queries])


class _Cut(nn.Module):
    """The network during one pass: `rows` says whose memory each row of the batches that come
    is.
    """

    def __init__(self, network: Any, rows: Sequence[tuple[_Remembering, int]], skips: int):
        super().__init__()
        self.network, self.skips = network, skips
        self.rows = iter(rows)  # a large pass comes in several batches, in order

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        mine = [next(self.rows) for _ in range(len(x))]
        skips, time = self.network.shallow_down(x, timestep, cond, self.skips)
        entry = skips[-1]
        keys = [
            k
            for k, (who, row) in enumerate(mine)
            if who.rule.due(who.branch.kept.get(row), who.call, entry[k])
        ]
        if len(keys) == len(mine):
            deep = self.network.deep(entry, time, cond, self.skips)
        elif keys:
            some = torch.tensor(keys, device=x.device)
            deep = self.network.deep(entry[some], time[some], cond[some], self.skips)
        else:
            deep = ()
        for k, features in zip(keys, deep, strict=True):
            who, row = mine[k]
            who.branch.kept[row] = _Kept(who.call, entry[k], features)
        if len(keys) < len(mine):
            deep = torch.stack([who.branch.kept[row].deep for who, row in mine])
        return self.network.shallow_up(deep, skips, time, cond)
