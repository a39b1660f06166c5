"""A latent cache in memory."""

import torch
from torch import Tensor


class Latents:
    """Latents that a denoiser can be trained on, without a file.

    Args:
        mean: posterior means (N, C, h, w).
        std: posterior standard deviation of every number.
        labels: classes (N,); None for images without one.
        key: the cache's hash.
    """

    def __init__(
        self, mean: Tensor, std: float = 0.0, labels: Tensor | None = None, key: str = "toy"
    ):
        self.mean, self.std, self.labels, self.key = mean, std, labels, key

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: Tensor, /) -> dict[str, Tensor]:
        mean = self.mean[indices]
        label = torch.full((len(mean),), -1) if self.labels is None else self.labels[indices]
        return {"mean": mean, "std": torch.full_like(mean, self.std), "label": label}
