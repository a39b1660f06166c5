"""Sampling of batches: the examples of step n are a function of (seed, n) alone.

A run can therefore resume at any step. Examples of one shape form a group (aspect buckets: NovelAI;
SDXL, arXiv:2307.01952, appendix I), and a batch comes from one group. Each group has a stream of
its own, permutation after permutation, cut into batches across their seams. In epoch e = 0, 1, ...
group g of N_g examples has

    floor((e + 1) N_g / B) - floor(e N_g / B)

batches of B, the batches of all groups in random order. Examples that do not fill a batch are left
for the next epoch: after any number of epochs a group's stream is less than a batch behind, and its
examples' visits never differ by more than one. A group smaller than a batch has one now and then,
which goes through the group more than once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.io.atomic import hash_bytes


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of the parts."""
    return int(hash_bytes(*(str(p) for p in parts))[:16], 16) >> 1


def _permutation(size: int, *parts: object) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(*parts)))


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The examples of a step.

    They are consecutive pieces of a new permutation an epoch, across the epochs' seams.
    """
    first = step * batch_size
    pieces, taken = [], 0
    while taken < batch_size:
        epoch, offset = divmod(first + taken, size)
        order = _permutation(size, seed, "epoch", epoch)
        pieces.append(order[offset : offset + batch_size - taken])
        taken += len(pieces[-1])
    return torch.cat(pieces)


class Stream:
    """`batch_indices` that keeps the current epoch's permutation, without a shuffle a step."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The indices (batch_size,) of the examples of a step."""
        epoch, offset = divmod(step * self.batch_size, self.size)
        if offset + self.batch_size > self.size:
            return batch_indices(self.size, self.batch_size, self.seed, step)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, _permutation(self.size, self.seed, "epoch", epoch)
        return self.order[offset : offset + self.batch_size]


class BatchSampler:
    """Step -> the indices (batch_size,) of its examples, all of one group.

    One group is one `Stream` of the run's own seed. The plan of the current epoch is kept.

    Args:
        groups: The indices of each group.
        batch_size: Examples in a batch.
        seed: Of the run.
    """

    def __init__(self, groups: Sequence[range], batch_size: int, seed: int):
        self.groups = [g for g in groups if len(g)]
        self.batch_size, self.seed = batch_size, seed
        alone = len(self.groups) == 1
        self.streams = [
            Stream(len(g), batch_size, seed if alone else derive_seed(seed, "group", i))
            for i, g in enumerate(self.groups)
        ]
        self.sizes = torch.tensor([len(g) for g in self.groups])
        self.epoch, self.plan = -1, torch.empty(0)

    def _before(self, epoch: int) -> Tensor:
        """Number of batches of each group before an epoch."""
        return self.sizes * epoch // self.batch_size

    def _epoch(self, step: int) -> int:
        """The epoch with step in [batches before it, batches before the next).

        e N / B batches, less up to one a group, come before e.
        """
        epoch = step * self.batch_size // int(self.sizes.sum())
        while int(self._before(epoch + 1).sum()) <= step:
            epoch += 1
        return epoch

    def __call__(self, step: int) -> Tensor:
        """The indices (batch_size,) of the examples of a step."""
        if len(self.groups) == 1:
            return self.streams[0](step) + self.groups[0].start
        epoch = self._epoch(step)
        before = self._before(epoch)
        if epoch != self.epoch:
            counts = self._before(epoch + 1) - before
            plan = torch.repeat_interleave(torch.arange(len(self.groups)), counts)
            order = _permutation(len(plan), self.seed, "groups", epoch)
            self.epoch, self.plan = epoch, plan[order]
        place = step - int(before.sum())
        group = int(self.plan[place])
        number = int(before[group]) + int((self.plan[:place] == group).sum())
        return self.streams[group](number) + self.groups[group].start
