"""Training of a denoiser on cached latents: E w(t) || y(x_t, t, c) - target ||^2.

It is the loss of Ho et al. 2020 (arXiv:2006.11239, eq. 14), for any target. z is drawn from the
autoencoder's posterior at every visit; a share of the conditions is replaced by the null condition,
for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).

Networks with a variance behind the target are trained for L_simple + lambda L_vlb, the mean as a
constant in L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16): `diffuse/vlb.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.diffuse.process import Process
from sfumato.diffuse.vlb import bound, check_has_vlb
from sfumato.diffuse.weighting import (
    ERRORS,
    MODE_SCALES,
    TIMES,
    WEIGHTINGS,
    draw_times,
    loss_weight,
    pointwise_error,
)
from sfumato.errors import UserError
from sfumato.io.atomic import hash_bytes, hash_tensors
from sfumato.predict.networks.base import Network
from sfumato.train.conditions.base import Condition
from sfumato.train.objective import Draw, Objective, Preview
from sfumato.train.settings import check_fields
from sfumato.types import LatentSpace
from sfumato.validate import number_in, one_of


class Latents(Protocol):
    """A cache of latents.

    It may have a `key` (hash of its inputs) and `labels` (N,): by these a resumed run is checked to
    have the same data. Latents of several shapes have `groups`, ranges of indices of one shape; a
    batch is of one group.
    """

    def __len__(self) -> int: ...
    def batch(self, indices: Tensor, /) -> dict[str, Tensor]:
        """Raw posterior "mean" and "std" (B, C, h, w), and "label" (B,), by index."""
        ...


@runtime_checkable
class _MayPredictVariance(Protocol):
    """A network that may predict a variance, as every `Network`."""

    @property
    def learned_variance(self) -> bool:
        """True where a variance follows the target."""
        ...


@dataclass(frozen=True)
class DenoiserLoss:
    """Weights of the loss, the distribution of times, and the dropout of conditions."""

    weighting: Literal["plain", "min_snr", "debiased"] = "plain"
    min_snr_gamma: float = 5.0
    error: Literal["l2", "huber"] = "l2"
    """Error of a value: its square, or pseudo-Huber, by which outliers weigh less."""
    huber_delta: float = 0.1
    """Difference above which huber grows linearly."""
    offset_noise: float = 0.0
    """Strength of noise that is constant over each channel, so that brightness is learned.

    Guttenberg 2023, "Diffusion with offset noise"; 0.05 to 0.1 is usual."""
    input_perturbation: float = 0.0
    """Strength of more noise in the input alone, against errors that sampling adds up.

    Ning et al. 2023, arXiv:2301.11706; 0.1 is usual."""
    times: Literal["uniform", "logit_normal", "mode"] = "uniform"
    times_mean: float = 0.0
    """Mean of logit_normal."""
    times_std: float = 1.0
    """Standard deviation of logit_normal."""
    times_scale: float = 1.29
    """Scale of mode."""
    times_shift: float = 1.0
    """Shift of all times towards the noise, as for large images; 1 is none."""
    drop: float = 0.1
    """The share of conditions replaced by the null condition."""
    variance: float = 0.001
    """Weight lambda of the bound, for networks that predict a variance; 0 does not train it."""

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("weighting", self.weighting, WEIGHTINGS)
        number_in("min_snr_gamma", self.min_snr_gamma, above=0)
        one_of("error", self.error, ERRORS)
        number_in("huber_delta", self.huber_delta, above=0)
        number_in("offset_noise", self.offset_noise, 0, hint="0 is none")
        number_in("input_perturbation", self.input_perturbation, 0, hint="0 is none")
        number_in("times_mean", self.times_mean)
        one_of("distribution of times", self.times, TIMES)
        number_in("times_scale", self.times_scale, *MODE_SCALES)
        number_in("times_shift", self.times_shift, above=0, hint="1 is no shift")
        number_in("times_std", self.times_std, above=0)
        number_in("drop", self.drop, 0, 1)
        number_in("variance", self.variance, 0, hint="0 does not train the variance")


HELD_OUT = 256
"""Most held-out images whose loss is measured."""


@dataclass(frozen=True)
class HeldOut:
    """Latents that are not trained on, and their condition."""

    latents: Latents
    condition: Condition


class DenoiserObjective(Objective):
    """Training of a denoiser, in one phase.

    A network that predicts a variance needs a table of betas, or a loss with variance=0, as flows
    are trained (SiT, Ma et al. 2024, arXiv:2401.08740, whose code leaves out the channels behind
    the target).

    Args:
        network: (x, timestep, conditioning) -> y.
        process: Schedule and parameterization.
        latents: The training data.
        space: The latent space of the autoencoder.
        condition: Classes, captions, or none.
        loss: Settings.
        preview: (averaged network, step) -> numbers and images, such as a grid of samples.
        held_out: Examples whose loss each preview measures, with the same noises and times every
            time and without dropped conditions; None: none.

    Raises:
        UserError: For a learned variance that the process cannot have.
    """

    main = "denoiser"
    stage = "train denoiser"

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        latents: Latents,
        space: LatentSpace,
        condition: Condition,
        loss: DenoiserLoss,
        preview: Callable[[nn.Module, int], Preview] | None = None,
        held_out: HeldOut | None = None,
    ):
        self.networks = {"denoiser": network}
        self.process, self.latents, self.space = process, latents, space
        self.condition, self.settings, self.preview = condition, loss, preview
        self.held_out = held_out
        self.learned_variance = (
            isinstance(network, _MayPredictVariance) and network.learned_variance
        )
        if self.learned_variance and loss.variance:
            check_has_vlb(process.schedule)

    @property
    def size(self) -> int:
        """Number of latents."""
        return len(self.latents)

    @property
    def groups(self) -> tuple[range, ...]:
        """The groups of the latents; one where all have one shape."""
        return getattr(self.latents, "groups", None) or super().groups

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of the network, conditioner, process, loss and latents."""
        labels, network = getattr(self.latents, "labels", None), self.networks["denoiser"]
        schedule = hash_bytes(repr(self.process.schedule))[:16]
        loss = asdict(self.settings)
        if not self.learned_variance:  # of others it decides nothing
            del loss["variance"]
        # runs of versions without these go on
        if self.settings.error == "l2":
            del loss["error"], loss["huber_delta"]
        for name in ("offset_noise", "input_perturbation"):
            if not loss[name]:
                del loss[name]
        return {
            "network": network.to_config()
            if isinstance(network, Network)
            else {name: list(tensor.shape) for name, tensor in network.state_dict().items()},
            "conditioner": self.condition.identity(),
            "space": asdict(self.space),
            "process": f"{self.process.parameterization.name}, {schedule}",
            "loss": loss,
            "data": {
                "latents": getattr(self.latents, "key", ""),
                "count": len(self.latents),
                "labels": None if labels is None else hash_tensors({"labels": labels}),
            },
        }

    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The latents' batch, and the entries of the condition."""
        return self.latents.batch(indices) | self.condition.batch(indices, draw)

    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The weighted error of the target, and the bound of a learned variance."""
        return self._loss(networks["denoiser"], self.condition, batch, draw, self.settings.drop)

    def _loss(
        self,
        network: nn.Module,
        condition: Condition,
        batch: Mapping[str, Tensor],
        draw: Draw,
        drop: float,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of a batch, with a share of its conditions dropped."""
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
        dropped = draw(lambda n, g: torch.rand(n, generator=g)) < drop
        cond = condition.conditioning(batch).drop(dropped, condition.null(len(mean))).to(device)
        if s.offset_noise:
            shift = draw(lambda n, g: torch.randn(n, mean.shape[1], 1, 1, generator=g))
            second = second + s.offset_noise * shift.to(device)
        noise = second
        if s.input_perturbation:
            third = draw(lambda n, g: torch.randn(n, *mean.shape[1:], generator=g)).to(device)
            noise = noise + s.input_perturbation * third
        x = self.process.add_noise(z, noise, t)
        timestep = self.process.schedule.timestep(t).to(device, torch.float32)
        y = network(self.process.network_input(x, t), timestep, cond).float()
        if y.shape[1] not in (channels := x.shape[1], 2 * channels):
            raise UserError(
                f"the network returns {y.shape[1]} channels for latents of {channels}: "
                f"expected {channels}, or twice as many"
            )
        y, variance = y[:, :channels], y[:, channels:]
        target = self.process.target(z, second, t)
        error = pointwise_error(s.error, y, target, s.huber_delta).mean((1, 2, 3))
        weight = loss_weight(s.weighting, self.process, t, s.min_snr_gamma)
        loss = (weight.to(device, torch.float32) * error).mean()
        numbers: dict[str, float | Tensor] = {"denoiser/unweighted": error.detach().mean()}
        if variance.shape[1] and s.variance:
            x0 = self.process.split(x, y.detach(), t).x0
            vlb = bound(self.process, z, x0, variance, t).mean()
            loss, numbers["denoiser/vlb"] = loss + s.variance * vlb, vlb.detach()
        return loss, numbers

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> Preview:
        """The preview, and the loss of the held-out examples; nothing without them."""
        numbers, images = ({}, {}) if self.preview is None else self.preview(network, step)
        if self.held_out is not None:
            numbers = {**numbers, "held_out/loss": self._held_out_loss(network, self.held_out)}
        return numbers, images

    def _held_out_loss(self, network: nn.Module, held_out: HeldOut) -> float:
        """The mean loss of held-out examples, with the same random numbers at each call."""
        count, batch_size, total = min(HELD_OUT, len(held_out.latents)), 32, 0.0
        rows = torch.linspace(0, len(held_out.latents) - 1, count).long()
        device = next(network.parameters()).device
        for start in range(0, count, batch_size):
            place = slice(start, min(start + batch_size, count))
            draw = Draw(torch.Generator().manual_seed(0), count, place)
            batch = held_out.latents.batch(rows[place])
            batch |= held_out.condition.batch(rows[place], draw)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            loss, _ = self._loss(network, held_out.condition, batch, draw, 0.0)
            total += float(loss) * (place.stop - place.start)
        return total / count
