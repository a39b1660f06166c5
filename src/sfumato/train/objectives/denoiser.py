"""Trains a denoiser on cached latents: E w(t) || y(x_t, t, c) - target ||^2 (Ho et al. 2020,
arXiv:2006.11239, eq. 14, for any target).

z is drawn from the autoencoder's posterior at every visit; a share of the conditions is replaced by
the null condition, for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, algorithm
1).

Networks with a variance behind the target are trained for L_simple + lambda L_vlb, the mean as a
constant in L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16): `diffuse/vlb.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from PIL import Image as PIL
from torch import Tensor, nn

from sfumato.diffuse.process import Process
from sfumato.diffuse.vlb import bound, check_has_vlb
from sfumato.diffuse.weighting import MODE_SCALES, TIMES, WEIGHTINGS, draw_times, loss_weight
from sfumato.errors import UserError
from sfumato.io.atomic import hash_bytes, hash_tensors
from sfumato.train.objective import Draw, Objective, config_of
from sfumato.types import Conditioning, LatentSpace
from sfumato.validate import number_in, one_of


class Latents(Protocol):
    """What a latent cache offers: raw posterior "mean" and "std" (B, C, h, w) and "label" (B,) by
    image number.

    A `key` (hash of what it was made from) and `labels` (N,), where it has them, say whether a
    resumed run has the same data. Latents of several shapes say by `groups` (ranges of numbers)
    which share one; a batch is then asked for numbers of one group.
    """

    def __len__(self) -> int: ...
    def batch(self, indices: Tensor, /) -> dict[str, Tensor]: ...


class Labelled(Protocol):
    """A conditioner of labels, or of the entry `batch_key` of a batch: "label", or "number", the
    example's.
    """

    @property
    def batch_key(self) -> str: ...
    def from_labels(self, labels: Tensor, /) -> Conditioning: ...
    def null(self, count: int, /) -> Conditioning: ...
    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DenoiserLoss:
    """What the denoiser is trained for."""

    weighting: Literal["plain", "min_snr"] = "plain"
    min_snr_gamma: float = 5.0
    times: Literal["uniform", "logit_normal", "mode"] = "uniform"
    times_mean: float = 0.0
    """Of logit_normal."""
    times_std: float = 1.0
    times_scale: float = 1.29
    """Of mode."""
    times_shift: float = 1.0
    """All times are moved towards the noise by it, as for large pictures; 1 leaves them."""
    drop: float = 0.1
    """The share of conditions replaced by the null condition."""
    variance: float = 0.001
    """lambda, of networks that predict a variance: what their bound counts, over the times that are
    drawn. With 0 the variance is not trained."""

    def __post_init__(self) -> None:
        one_of("weighting", self.weighting, WEIGHTINGS)
        one_of("distribution of times", self.times, TIMES)
        number_in("times_scale", self.times_scale, *MODE_SCALES)
        number_in("times_shift", self.times_shift, above=0, hint="1 is no shift")
        number_in("times_std", self.times_std, above=0)
        number_in("drop", self.drop, 0, 1)
        number_in("variance", self.variance, 0, hint="0 does not train the variance")


class DenoiserObjective(Objective):
    """One phase. `preview(network, step)` returns numbers and pictures, for sample grids while it
    trains.

    A network that predicts a variance needs a table of betas (`UserError` otherwise), or a loss
    with variance=0, as flows are trained (SiT, Ma et al. 2024, arXiv:2401.08740, whose code leaves
    the channels behind the target out).
    """

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
        preview: Callable[[nn.Module, int], tuple[dict[str, float], dict[str, PIL.Image]]]
        | None = None,
    ):
        self.networks = {"denoiser": network}
        self.process, self.latents, self.space, self.conditioner = (
            process,
            latents,
            space,
            conditioner,
        )
        self.settings, self.preview = loss, preview
        self.learned_variance = bool(getattr(network, "learned_variance", False))
        if self.learned_variance and loss.variance:
            check_has_vlb(process.schedule)

    @property
    def size(self) -> int:
        return len(self.latents)

    @property
    def groups(self) -> tuple[range, ...]:
        return getattr(self.latents, "groups", None) or super().groups

    @property
    def identity(self) -> dict[str, Any]:
        labels = getattr(self.latents, "labels", None)
        data = {"latents": getattr(self.latents, "key", ""), "count": len(self.latents)}
        data |= {"labels": None if labels is None else hash_tensors({"labels": labels})}
        process = (
            f"{self.process.parameterization.name}, {hash_bytes(repr(self.process.schedule))[:16]}"
        )
        parts = {
            "network": config_of(self.networks["denoiser"]),
            "conditioner": self.conditioner.identity(),
            "space": asdict(self.space),
        }
        loss = asdict(self.settings)
        if not self.learned_variance:  # of others it decides nothing
            del loss["variance"]
        return {**parts, "process": process, "loss": loss, "data": data}

    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        return self.latents.batch(indices) | {"number": indices}

    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        mean, device, s = batch["mean"], batch["mean"].device, self.settings
        first, second = (
            draw(lambda n, g: torch.randn(n, *mean.shape[1:], generator=g)).to(device)
            for _ in range(2)
        )
        z = self.space.standardise(mean + batch["std"] * first)
        t = draw(
            lambda n, g: draw_times(
                s.times, self.process, n, g, s.times_mean, s.times_std, s.times_scale, s.times_shift
            )
        )
        dropped = draw(lambda n, g: torch.rand(n, generator=g)) < s.drop
        known = batch[self.conditioner.batch_key].cpu()
        condition = (
            self.conditioner.from_labels(known)
            .drop(dropped, self.conditioner.null(len(mean)))
            .to(device)
        )
        x = self.process.add_noise(z, second, t)
        timestep = self.process.schedule.timestep(t).to(device, torch.float32)
        y = networks["denoiser"](self.process.network_input(x, t), timestep, condition).float()
        if y.shape[1] not in (channels := x.shape[1], 2 * channels):
            raise UserError(
                f"the network answers {y.shape[1]} channels for latents of {channels}: expected {channels}, or twice as many"
            )
        y, variance = y[:, :channels], y[:, channels:]
        error = (y - self.process.target(z, second, t)).square().mean((1, 2, 3))
        weight = loss_weight(s.weighting, self.process, t, s.min_snr_gamma).to(
            device, torch.float32
        )
        loss, numbers = (weight * error).mean(), {"denoiser/unweighted": error.detach().mean()}
        if variance.shape[1] and s.variance:
            vlb = bound(
                self.process, z, self.process.split(x, y.detach(), t).x0, variance, t
            ).mean()
            loss, numbers["denoiser/vlb"] = loss + s.variance * vlb, vlb.detach()
        return loss, numbers

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> tuple[dict[str, float], dict[str, PIL.Image]]:
        return self.preview(network, step) if self.preview is not None else ({}, {})
