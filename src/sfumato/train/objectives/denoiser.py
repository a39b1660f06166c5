"""Trains a denoiser on cached latents: E w(t) || y(x_t, t, c) - target ||^2 (Ho et al. 2020, arXiv:2006.11239, eq. 14, for any target).

z is drawn from the autoencoder's posterior at every visit; a share of the conditions is replaced by the null condition, for
classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image as PIL
from torch import Tensor, nn

from sfumato.diffuse.process import Process
from sfumato.diffuse.weighting import draw_times, loss_weight
from sfumato.errors import UserError
from sfumato.train.objective import Objective
from sfumato.types import Conditioning, LatentSpace


class Latents(Protocol):
    """What a latent cache offers: raw posterior "mean" and "std" (B, C, h, w) and "label" (B,) by image number."""

    def __len__(self) -> int: ...
    def batch(self, indices: Tensor, /) -> dict[str, Tensor]: ...


class Labelled(Protocol):
    """A conditioner that knows labels."""

    def from_labels(self, labels: Tensor, /) -> Conditioning: ...
    def null(self, count: int, /) -> Conditioning: ...


@dataclass(frozen=True)
class DenoiserLoss:
    """What the denoiser is trained for."""

    weighting: Literal["plain", "min_snr"] = "plain"
    min_snr_gamma: float = 5.0
    times: Literal["uniform", "logit_normal"] = "uniform"
    times_mean: float = 0.0
    times_std: float = 1.0
    drop: float = 0.1
    """The share of conditions replaced by the null condition."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise UserError(f"drop={self.drop}: expected a share in [0, 1]")


class DenoiserObjective(Objective):
    """One phase. `preview(network, step)` returns numbers and pictures, for sample grids while it trains."""

    main = "denoiser"
    stage = "train denoiser"

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        latents: Latents,
        space: LatentSpace,
        conditioner: Labelled,
        loss: DenoiserLoss,
        preview: Callable[[nn.Module, int], tuple[dict[str, float], dict[str, PIL.Image]]] | None = None,
    ):
        self.networks = {"denoiser": network}
        self.process, self.latents, self.space, self.conditioner = process, latents, space, conditioner
        self.settings, self.preview = loss, preview

    @property
    def size(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return self.latents.batch(indices)

    def loss(
        self, phase: str, networks: Mapping[str, nn.Module], batch: dict[str, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        mean, device, s = batch["mean"], batch["mean"].device, self.settings
        count = len(mean)
        first, second = (torch.randn(mean.shape, generator=generator).to(device) for _ in range(2))
        z = self.space.standardise(mean + batch["std"] * first)
        t = draw_times(s.times, self.process, count, generator, s.times_mean, s.times_std)
        dropped = torch.rand(count, generator=generator) < s.drop
        condition = self.conditioner.from_labels(batch["label"].cpu()).drop(dropped, self.conditioner.null(count)).to(device)
        x = self.process.add_noise(z, second, t)
        timestep = self.process.schedule.timestep(t).to(device, torch.float32)
        y = networks["denoiser"](x, timestep, condition).float()
        error = (y - self.process.target(z, second, t)).square().mean((1, 2, 3))
        weight = loss_weight(s.weighting, self.process, t, s.min_snr_gamma).to(device, torch.float32)
        return (weight * error).mean(), {"denoiser/unweighted": float(error.detach().mean())}

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> tuple[dict[str, float], dict[str, PIL.Image]]:
        return self.preview(network, step) if self.preview is not None else ({}, {})
