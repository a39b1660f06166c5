"""Images whose bits depend on the batch that they are computed in."""

from collections.abc import Callable

import torch
from torch import Tensor

BATCHES = (2, 3, 4, 5, 7, 11, 16, 17, 32, 33)


@torch.inference_mode()
def batch_dependent(
    run: Callable[[Tensor], Tensor], batches: tuple[int, ...] = BATCHES
) -> list[tuple[int, int]]:
    """List (batch size, position) of each image whose bits are not those of a batch of one.

    Batches begin at image 0 and at image 1, so that an image stands at even and odd positions.

    Args:
        run: function of image indices (n,) that returns one row an image.
        batches: sizes to try; `run` must know one image more than the largest.

    Returns:
        An empty list where no image depends on its batch.
    """
    alone = [run(torch.tensor([i]))[0] for i in range(max(batches) + 1)]
    dependent = []
    for size in batches:
        for first in (0, 1):
            together = run(torch.arange(first, first + size))
            dependent += [
                (size, i) for i in range(size) if not torch.equal(together[i], alone[first + i])
            ]
    return dependent
