"""Which examples make up the batch of step n: a function of (seed, n) alone, so that a run can go
on anywhere.

Examples of one shape form a group (aspect buckets: NovelAI; SDXL, arXiv:2307.01952, appendix I),
and a batch comes from one group. Each group has a stream of its own, permutation after permutation,
cut into batches across their seams. In epoch e = 0, 1, ... group g of N_g examples gives

    floor((e + 1) N_g / B) - floor(e N_g / B)

batches of B, the batches of all groups in random order. What does not fill a batch waits for the
next epoch: after any number of epochs a group's stream is less than a batch behind, and its
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


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The examples of a step: consecutive pieces of a new permutation an epoch, across the epochs'
    seams.
    """
    first = step * batch_size
    pieces, taken = [], 0
    while taken < batch_size:
        epoch, offset = divmod(first + taken, size)
        order = torch.randperm(
            size, generator=torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        )
        piece = order[offset : offset + batch_size - taken]
        pieces.append(piece)
        taken += len(piece)
    return torch.cat(pieces)


class Stream:
    """`batch_indices` with the current epoch's permutation kept: the same numbers without a shuffle
    a step.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        epoch, offset = divmod(step * self.batch_size, self.size)
        if offset + self.batch_size > self.size:
            return batch_indices(self.size, self.batch_size, self.seed, step)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        return self.order[offset : offset + self.batch_size]


class Order:
    """step -> the numbers (batch_size,) of its examples, all of one group; one group is one
    `Stream` of the run's own seed.

    Every group with examples is a range of numbers; the plan of the epoch at hand is kept.
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
        """How many batches each group has given before an epoch."""
        return self.sizes * epoch // self.batch_size

    def _epoch(self, step: int) -> int:
        """The epoch with step in [batches before it, batches before the next): e N / B batches,
        less up to one a group, come before e.
        """
        epoch = step * self.batch_size // int(self.sizes.sum())
        while int(self._before(epoch + 1).sum()) <= step:
            epoch += 1
        return epoch

    def __call__(self, step: int) -> Tensor:
        if len(self.groups) == 1:
            return self.streams[0](step) + self.groups[0].start
        epoch = self._epoch(step)
        before = self._before(epoch)
        if epoch != self.epoch:
            plan = torch.repeat_interleave(
                torch.arange(len(self.groups)), self._before(epoch + 1) - before
            )
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "groups", epoch))
            self.epoch, self.plan = epoch, plan[torch.randperm(len(plan), generator=generator)]
        place = step - int(before.sum())
        group = int(self.plan[place])
        number = int(before[group]) + int((self.plan[:place] == group).sum())
        return self.streams[group](number) + self.groups[group].start
