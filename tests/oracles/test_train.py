"""Training against numbers that were computed by hand.

Losses, averages, orders, learning rates, and the files of a run.
"""

import copy
import hashlib
import itertools
import json
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from torch import Tensor, nn

from helpers.images import smooth_image_set
from helpers.latents import Latents
from helpers.models import CONVOLUTIONAL_UNET, SMALL_BLOCKS
from sfumato.compress.base import Posterior
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.data import ImageSet
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, run_sampler
from sfumato.diffuse.samplers.ddim import ddim
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.timesteps import timesteps
from sfumato.diffuse.weighting import draw_times, loss_weight, pointwise_error
from sfumato.errors import NumericalError, UserError
from sfumato.evaluate.features import load_features
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.train import checkpoint
from sfumato.train.batch_sampler import Stream, batch_indices, derive_seed
from sfumato.train.conditions.classes import Classes
from sfumato.train.conditions.unconditional import Unconditional
from sfumato.train.discriminator import PatchDiscriminator, adaptive_weight, hinge
from sfumato.train.ema import EMA
from sfumato.train.logger import Means
from sfumato.train.loop import LoopSettings, train
from sfumato.train.objective import Draw, Objective
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective, HeldOut
from sfumato.train.perceptual import feature_maps, perceptual_distance
from sfumato.train.precision import choose_precision
from sfumato.types import Conditioning, LatentSpace

KL = KLConfig(in_channels=1, out_channels=1, latent_channels=2, **SMALL_BLOCKS)
NET = UNetConfig(in_channels=2, out_channels=2, **CONVOLUTIONAL_UNET)
LOOP = LoopSettings(
    steps=4,
    batch_size=4,
    lr=1e-3,
    warmup=0,
    decay="constant",
    save_every=100,
    show_every=100,
    log_every=1,
)
FLOW = Process(schedule("flow"), parameterization("flow"))


def autoencoder(
    loss: AutoencoderLoss, images: ImageSet | None = None, **options: Any
) -> AutoencoderObjective:
    images = images or smooth_image_set()
    torch.manual_seed(0)
    network = AutoencoderKL(replace(KL, in_channels=images.shape[0], out_channels=images.shape[0]))
    return AutoencoderObjective(network, images, images, loss, **options)


def draws(total: int, seed: int = 0) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), total)


def one_loss(
    objective: Objective, phase: str = "autoencoder", step: int = 0, count: int = 4
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch from fixed random numbers."""
    draw = draws(count)
    loss, numbers = objective.loss(
        phase, objective.networks, objective.batch(torch.arange(count), draw), step, draw
    )
    return loss, {name: float(value) for name, value in numbers.items()}


class Line(Objective):
    """y = w x in float32; a test may add any effect to the loss."""

    main, stage = "line", "train line"

    def __init__(self, change: Callable[[Tensor, int], Tensor] = lambda loss, step: loss):
        torch.manual_seed(0)
        self.networks: dict[str, nn.Module] = {"line": nn.Linear(3, 1)}
        self.x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        self.change = change

    @property
    def size(self) -> int:
        return len(self.x)

    @property
    def identity(self) -> dict[str, Any]:
        return {"data": "line"}

    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        return {"x": self.x[indices]}

    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, dict[str, float]]:
        y = networks["line"](batch["x"]) - batch["x"].sum(1, keepdim=True)
        return self.change(y.square().mean(), step), {}


# ---- losses of the autoencoder -------------------------------------------------------------------


class Shapes(nn.Module):
    """A small user-supplied perceptual network: two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        a = self.first(images).tanh()
        return [a, self.second(a).tanh()]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Importable as toy_shapes:network, and under no_grad as toy_shapes:blind."""
    torch.manual_seed(1)
    network = Shapes().requires_grad_(False)

    @torch.no_grad()
    def unseeing(images: Tensor) -> list[Tensor]:
        return network(images)

    module = types.ModuleType("toy_shapes")
    module.network = lambda: network  # type: ignore[attr-defined]
    module.blind = lambda: unseeing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_shapes", module)
    return network


def decoder_gradients(loss: AutoencoderLoss, images: ImageSet | None = None) -> dict[str, Tensor]:
    objective = autoencoder(loss, images)
    one_loss(objective)[0].backward()
    network = objective.networks["autoencoder"]
    return {
        name: network.get_parameter(f"decoder.{name}.weight").grad
        for name in ("conv_in", "conv_out")
    }  # type: ignore[misc]


@pytest.mark.parametrize("name", ["toy_shapes:network", "efficientnet-lite0"])
def test_the_perceptual_gradient_reaches_the_whole_decoder(shapes: Shapes, name: str) -> None:
    if name.startswith("efficientnet"):
        pytest.importorskip(
            "efficientnet_lite_pytorch", reason="the perceptual network's package is not installed"
        )
    without = decoder_gradients(AutoencoderLoss(kl=0))
    having = decoder_gradients(AutoencoderLoss(kl=0, perceptual=1.0, perceptual_network=name))
    for layer in without:
        change = (having[layer] - without[layer]).norm() / without[layer].norm()
        assert change > 1e-2, f"{layer} does not feel the perceptual loss"
    assert all(p.grad is None for p in shapes.parameters())


def test_the_check_of_the_perceptual_gradient_can_fail(shapes: Shapes) -> None:
    """A common mistake: features computed under no_grad.

    The loss has the same value and trains nothing.
    """
    without = decoder_gradients(AutoencoderLoss(kl=0))
    blind = decoder_gradients(
        AutoencoderLoss(kl=0, perceptual=1.0, perceptual_network="toy_shapes:blind")
    )
    for layer in without:
        torch.testing.assert_close(blind[layer], without[layer], rtol=0, atol=0)
    values = {
        kind: one_loss(
            autoencoder(AutoencoderLoss(perceptual=1.0, perceptual_network=f"toy_shapes:{kind}"))
        )[1]["autoencoder/perceptual"]
        for kind in ("network", "blind")
    }
    assert values["network"] == values["blind"] > 0


def test_the_perceptual_gradient_is_scaled_by_its_weight(shapes: Shapes) -> None:
    def part(weight: float) -> Tensor:
        return decoder_gradients(
            AutoencoderLoss(kl=0, perceptual=weight, perceptual_network="toy_shapes:network")
        )["conv_in"]

    zero = decoder_gradients(AutoencoderLoss(kl=0))["conv_in"]
    torch.testing.assert_close(part(2.0) - zero, 2 * (part(1.0) - zero), rtol=1e-3, atol=1e-6)


def test_perceptual_distance_is_lpips_by_hand(shapes: Shapes) -> None:
    a, b = torch.randn(2, 2, 1, 8, 8)
    expected = torch.zeros(2)
    for x, y in zip(shapes(a.expand(-1, 3, -1, -1)), shapes(b.expand(-1, 3, -1, -1)), strict=True):
        for k in range(2):
            total = 0.0
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    u, v = x[k, :, i, j], y[k, :, i, j]
                    total += float((u / u.norm() - v / v.norm()).square().sum())
            expected[k] += total / (x.shape[2] * x.shape[3])
    torch.testing.assert_close(perceptual_distance(shapes, a, b), expected, rtol=1e-4, atol=1e-6)
    assert perceptual_distance(shapes, a, a).abs().max() == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("efficientnet-lite", "efficientnet-lite0"),
        ("nowhere:f", "nowhere"),
        ("math:nothing", "nothing"),
    ],
)
def test_an_unknown_perceptual_network_is_explained(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        feature_maps(name)


def test_kl_is_that_of_two_normals() -> None:
    mean, std = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) + 0.1
    normals = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(*normals).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean, std).kl(), expected)


def test_the_kl_weight_counts_nats_per_pixel_value() -> None:
    loss, numbers = one_loss(autoencoder(AutoencoderLoss(kl=0.5)))
    bare, _ = one_loss(autoencoder(AutoencoderLoss(kl=0)))
    assert loss.item() - bare.item() == pytest.approx(
        0.5 * numbers["autoencoder/kl"] / (16 * 16), rel=1e-4
    )
    assert bare.item() == pytest.approx(numbers["autoencoder/pixel"])


@pytest.mark.parametrize(("pixel", "power"), [("l1", 1), ("l2", 2)])
def test_the_pixel_loss_is_l1_or_l2(pixel: Any, power: int) -> None:
    objective = autoencoder(AutoencoderLoss(pixel=pixel, kl=0))
    image = objective.batch(torch.arange(4), draws(4))["image"]
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    rebuilt = objective.networks["autoencoder"](image, noise)[0]
    assert one_loss(objective)[0].item() == pytest.approx(
        (rebuilt - image).abs().pow(power).mean().item(), rel=1e-5
    )


def test_hinge_in_closed_form() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge(real, fake).item() == pytest.approx(
        0.5 * (0 + 0.5 + 2) / 3 + 0.5 * (0 + 1 + 2) / 3
    )


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    last = nn.Parameter(torch.tensor([0.3, -0.2]))
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    weight = adaptive_weight((last * a).sum(), (last * b).sum(), last)
    assert weight.item() == pytest.approx(5 / (2 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight((last * 1e6).sum(), (last * 1e-9).sum(), last).item() == 1e4


def test_the_generators_loss_has_the_adaptive_weight_at_the_decoders_last_layer() -> None:
    settings = AutoencoderLoss(kl=0, adversarial=0.7, discriminator_width=8)
    objective = autoencoder(settings)
    loss, numbers = one_loss(objective)
    network, discriminator = objective.networks["autoencoder"], objective.networks["discriminator"]
    image = objective.batch(torch.arange(4), draws(4))["image"]
    last = network.get_parameter("decoder.conv_out.weight")

    def parts() -> tuple[Tensor, Tensor]:
        rebuilt = network(
            image, torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        )[0]
        return (rebuilt - image).abs().mean(), -discriminator(rebuilt).mean()

    a, b = (torch.autograd.grad(parts()[k], last)[0].norm().item() for k in (0, 1))
    assert numbers["autoencoder/adaptive_weight"] == pytest.approx(a / (b + 1e-4), rel=1e-3)
    pixel, fooled = (part.item() for part in parts())
    assert loss.item() == pytest.approx(pixel + 0.7 * a / (b + 1e-4) * fooled, rel=1e-3)
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_the_discriminators_turn_teaches_the_discriminator_alone() -> None:
    objective = autoencoder(AutoencoderLoss(adversarial=1.0, discriminator_width=8))
    one_loss(objective)
    loss, _ = one_loss(objective, "discriminator")
    loss.backward()
    assert all(p.grad is None for p in objective.networks["autoencoder"].parameters())
    assert all(p.grad is not None for p in objective.networks["discriminator"].parameters())


def test_patch_logits_come_one_a_patch() -> None:
    """Three halvings make a receptive field of 70 pixels.

    A logit does not depend on pixels farther away.
    """
    torch.manual_seed(0)
    network = PatchDiscriminator(1, width=8, layers=3)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # it depends on the whole map: leave the convolutions
            module.forward = lambda x: x  # type: ignore[method-assign]
    image = torch.zeros(1, 1, 128, 128, requires_grad=True)
    logits = network(image)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert image.grad is not None
    rows = image.grad[0, 0].abs().sum(1).nonzero()[:, 0]
    assert rows.max() - rows.min() + 1 == 70


def test_the_discriminator_waits_for_its_start(tmp_path: Path) -> None:
    """Before `adversarial_start` it keeps its weights, and the autoencoder's are those of a run
    without one, bit for bit.
    """
    seen: list[dict[str, Tensor]] = []
    plain: list[dict[str, Tensor]] = []
    objective = autoencoder(
        AutoencoderLoss(adversarial=0.5, adversarial_start=2, discriminator_width=8)
    )
    start = {k: v.clone() for k, v in objective.networks["discriminator"].state_dict().items()}

    def keep(where: list[dict[str, Tensor]], which: Objective) -> Callable[[int], None]:
        return lambda step: where.append(
            {
                f"{n}.{k}": v.clone()
                for n, m in which.networks.items()
                for k, v in m.state_dict().items()
            }
        )

    train(objective, replace(LOOP, steps=3), tmp_path / "a", on_step=keep(seen, objective))
    alone = autoencoder(AutoencoderLoss())
    train(alone, replace(LOOP, steps=3), tmp_path / "b", on_step=keep(plain, alone))
    for step, expected in ((0, True), (1, True), (2, False)):
        assert (
            all(torch.equal(seen[step][f"discriminator.{k}"], v) for k, v in start.items())
            is expected
        )
        assert all(torch.equal(seen[step][k], v) for k, v in plain[step].items()) is expected


# ---- losses of the denoiser ----------------------------------------------------------------------


class Spy(nn.Module):
    """Return zeros and record the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[Tensor, Tensor, Conditioning]] = []

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append((x, timestep, cond))
        return x * self.weight


class Straight(nn.Module):
    """The exact velocity for latents that are all 0."""

    def __init__(self, space: LatentSpace):
        super().__init__()
        self.z = space.standardise(torch.zeros(1, 2, 1, 1))

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        t = timestep.reshape(-1, 1, 1, 1) / 1000
        return (x - self.z) / t


def denoiser(
    loss: DenoiserLoss, process: Process, latents: Latents, network: nn.Module | None = None
) -> DenoiserObjective:
    torch.manual_seed(0)
    names = ("boot", "bag")
    condition = Unconditional() if latents.labels is None else Classes(ClassNames(names))
    space = LatentSpace(2, 2, (0.5, -1.0), (2.0, 0.5))
    return DenoiserObjective(network or UNet(NET), process, latents, space, condition, loss)


@pytest.mark.parametrize("weighting", ["plain", "min_snr"])
@pytest.mark.parametrize("name", ["eps", "v"])
def test_the_denoisers_loss_by_hand(weighting: Any, name: str) -> None:
    """A network whose output is 0.

    The loss is the weighted mean square of the target, from the same random numbers.
    """
    process = Process(schedule("linear"), parameterization(name))
    latents = Latents(torch.randn(4, 2, 8, 8), std=0.3)
    spy = Spy()
    objective = denoiser(DenoiserLoss(weighting=weighting), process, latents, spy)
    loss, _ = one_loss(objective, "denoiser")
    g = torch.Generator().manual_seed(0)
    first, eps = torch.randn(4, 2, 8, 8, generator=g), torch.randn(4, 2, 8, 8, generator=g)
    t = (torch.randperm(4, generator=g) + torch.rand(4, generator=g, dtype=torch.float64)) / 4
    t = ((t * 1000).floor() + 1) / 1000
    mean, std = (
        torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1),
        torch.tensor([2.0, 0.5]).reshape(1, 2, 1, 1),
    )
    z = (latents.mean + 0.3 * first - mean) / std
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    alpha2 = (1 - betas).cumprod(0)[(t * 1000).round().long() - 1]
    alpha, sigma = (v.sqrt().reshape(4, 1, 1, 1) for v in (alpha2, 1 - alpha2))
    target = eps.double() if name == "eps" else alpha * eps - sigma * z
    snr = alpha2 / (1 - alpha2)
    clipped = snr.clamp(max=5.0) / (snr if name == "eps" else snr + 1)
    weight = clipped if weighting == "min_snr" else torch.ones(4)
    assert loss.item() == pytest.approx(
        (weight * target.square().mean((1, 2, 3))).mean().item(), rel=1e-4
    )
    x, timestep, _ = spy.calls[0]
    torch.testing.assert_close(x.double(), alpha * z + sigma * eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(timestep, (t * 1000 - 1).float())


def test_networks_of_edm_are_shown_their_scaled_input() -> None:
    """x/S as in sampling, which is about as wide at every noise level, where x reaches 80 times
    that.
    """
    process, spy = Process(schedule("edm"), parameterization("edm")), Spy()
    one_loss(
        denoiser(DenoiserLoss(), process, Latents(torch.randn(64, 2, 8, 8)), spy),
        "denoiser",
        count=64,
    )
    seen, timestep, _ = spy.calls[0]
    assert timestep.max() > 1, "noise 80 times as wide as the data"
    assert float(seen.std((1, 2, 3)).min()) > 0.3 and float(seen.std((1, 2, 3)).max()) < 4


def test_the_debiased_weight_is_the_inverse_root_of_the_snr_for_noise() -> None:
    process = Process(schedule("cosine"), parameterization("eps"))
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    snr = process.schedule.log_snr(t).exp()
    torch.testing.assert_close(loss_weight("debiased", process, t), snr.rsqrt())
    # one weight of the x0 error, whatever the network predicts
    for name, factor in (("x0", torch.ones(4)), ("v", 1 + snr)):
        weight = loss_weight("debiased", Process(process.schedule, parameterization(name)), t)
        torch.testing.assert_close(weight * factor, snr.sqrt())


def test_huber_is_the_square_near_zero_and_linear_far_away() -> None:
    d = torch.tensor([1e-3, 0.0, -1e-3, 50.0, -80.0], dtype=torch.float64, requires_grad=True)
    error = pointwise_error("huber", d, torch.zeros(5, dtype=torch.float64), 0.1)
    error.sum().backward()
    assert d.grad is not None
    small, value, slope = d.detach()[:3], error.detach(), d.grad
    torch.testing.assert_close(value[:3], small.square(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        slope[3:], torch.tensor([0.2, -0.2], dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert torch.equal(pointwise_error("l2", d, d + 3), torch.full_like(d, 9))


def test_offset_noise_is_constant_over_a_channel_and_part_of_the_target() -> None:
    """Means of channels of noise have variance 1/hw, and strength^2 more with an offset."""
    spy, latents = Spy(), Latents(torch.zeros(4000, 2, 8, 8))
    for strength in (0.0, 0.5):
        made = denoiser(DenoiserLoss(offset_noise=strength), FLOW, latents, spy)
        one_loss(made, "denoiser", count=4000)
        x, timestep, _ = spy.calls[-1]
        z = made.space.standardise(torch.zeros(1, 2, 1, 1))
        t = timestep.reshape(-1, 1, 1, 1) / 1000
        noise = ((x - (1 - t) * z) / t).mean((2, 3))
        assert float(noise.var()) == pytest.approx(1 / 64 + strength**2, rel=0.06)
    # a network that returns the target has no loss: the offset is in it
    exact = denoiser(DenoiserLoss(offset_noise=0.5), FLOW, latents, Straight(made.space))
    assert float(one_loss(exact, "denoiser", count=64)[0]) < 1e-9


def test_input_perturbation_is_in_the_input_alone() -> None:
    """x is t * gamma * xi from that without it; a network that knows x has an error of gamma^2."""
    latents, space = (
        Latents(torch.zeros(2000, 2, 8, 8)),
        LatentSpace(2, 2, (0.5, -1.0), (2.0, 0.5)),
    )
    spies = [Spy(), Spy()]
    for spy, gamma in zip(spies, (0.0, 0.3), strict=True):
        made = denoiser(DenoiserLoss(input_perturbation=gamma), FLOW, latents, spy)
        one_loss(made, "denoiser", count=2000)
    (plain, t, _), (x, other, _) = (spy.calls[0] for spy in spies)
    assert torch.equal(t, other)
    extra = 1000 * (x - plain) / t.reshape(-1, 1, 1, 1)
    assert float(extra.std()) == pytest.approx(0.3, rel=0.01)
    exact = denoiser(DenoiserLoss(input_perturbation=0.3), FLOW, latents, Straight(space))
    assert float(one_loss(exact, "denoiser", count=2000)[0]) == pytest.approx(0.09, rel=0.02)


def test_the_held_out_loss_has_the_same_noises_at_each_preview() -> None:
    """It is that of one batch of all examples, drops no condition, and is 0 for the exact one."""
    labels = torch.arange(50) % 2
    latents = Latents(torch.randn(50, 2, 8, 8), labels=labels)
    spy = Spy()
    made = denoiser(DenoiserLoss(drop=1.0), FLOW, Latents(torch.randn(4, 2, 8, 8), 0, labels), spy)
    made.held_out = HeldOut(latents, made.condition)
    first, second = (made.show(spy, step)[0]["held_out/loss"] for step in (1, 2))
    assert first == second
    vectors = torch.cat([call[2].vector for call in spy.calls[:2]])  # pyright: ignore
    assert torch.equal(vectors.argmax(1), labels)
    whole = denoiser(DenoiserLoss(drop=0.0), FLOW, latents, spy)
    assert first == pytest.approx(float(one_loss(whole, "denoiser", count=50)[0]), rel=1e-5)
    exact = Straight(made.space)
    made.held_out = HeldOut(Latents(torch.zeros(50, 2, 8, 8), labels=labels), made.condition)
    exact.weight = nn.Parameter(torch.ones(1))
    assert made.show(exact, 1)[0]["held_out/loss"] < 1e-9


def test_runs_of_versions_without_the_new_settings_go_on() -> None:
    latents = Latents(torch.randn(4, 2, 8, 8))
    names = set(denoiser(DenoiserLoss(), FLOW, latents).identity["loss"])
    assert not names & {"error", "huber_delta", "offset_noise", "input_perturbation"}
    assert "accumulate" not in LoopSettings().identity
    for loss in (DenoiserLoss(error="huber"), DenoiserLoss(offset_noise=0.1)):
        assert denoiser(loss, FLOW, latents).identity["loss"] != {}
        assert set(denoiser(loss, FLOW, latents).identity["loss"]) > names
    assert LoopSettings(accumulate=2).identity["accumulate"] == 2


def test_min_snr_weights_x0_by_the_clipped_snr() -> None:
    process = Process(schedule("cosine"), parameterization("x0"))
    t = torch.tensor([0.01, 0.3, 0.6, 0.9], dtype=torch.float64)
    snr = process.schedule.log_snr(t).exp()
    assert snr[0] > 5 > snr[-1]
    torch.testing.assert_close(loss_weight("min_snr", process, t, 5.0), snr.clamp(max=5.0))


def test_times_are_uniform_or_logit_normal() -> None:
    count, g = 20_000, torch.Generator().manual_seed(0)
    uniform = draw_times("uniform", FLOW, count, g).sort().values
    # one in each interval
    assert (
        (uniform * count).floor().clamp(max=count - 1) == torch.arange(count)
    ).double().mean() > 0.999
    logits = torch.logit(draw_times("logit_normal", FLOW, count, g, -0.4, 1.3)).sort().values
    normal = torch.distributions.Normal(torch.tensor(-0.4, dtype=torch.float64), 1.3).cdf(logits)
    # Kolmogorov-Smirnov, 1 %
    assert (normal - (torch.arange(count) + 0.5) / count).abs().max() < 1.63 / count**0.5


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_a_share_of_the_conditions_is_null(drop: float) -> None:
    latents = Latents(torch.randn(400, 2, 4, 4), labels=torch.arange(400) % 2)
    spy = Spy()
    one_loss(denoiser(DenoiserLoss(drop=drop), FLOW, latents, spy), "denoiser", count=400)
    vector = spy.calls[0][2].vector
    assert vector is not None
    null = vector[:, 2] == 1
    assert abs(null.double().mean().item() - drop) < (0.1 if 0 < drop < 1 else 1e-9)
    assert torch.equal(vector[~null].argmax(1), (torch.arange(400) % 2)[~null])


def test_a_condition_reads_its_entry_of_the_batch() -> None:
    """By the images' indices the condition is rows 1 and 3, by their labels class 0 twice."""

    class Numbered(Classes):
        def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
            return {"label": indices}

    latents, spy = Latents(torch.randn(4, 2, 8, 8), labels=torch.tensor([1, 0, 1, 0])), Spy()
    objective, drawn = denoiser(DenoiserLoss(drop=0.0), FLOW, latents, spy), draws(2)
    for kind, expected in ((Classes, [0, 0]), (Numbered, [1, 3])):
        objective.condition = kind(ClassNames(tuple("abcd")))
        objective.loss(
            "denoiser", objective.networks, objective.batch(torch.tensor([1, 3]), drawn), 0, drawn
        )
        vector = spy.calls[-1][2].vector
        assert vector is not None and vector.argmax(1).tolist() == expected


def test_a_process_draws_its_rows_of_the_whole_batch() -> None:
    whole = draws(6)(lambda n, g: torch.randn(n, 2, generator=g))
    parts = [
        Draw(torch.Generator().manual_seed(0), 6, slice(k, k + 3))(
            lambda n, g: torch.randn(n, 2, generator=g)
        )
        for k in (0, 3)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (DenoiserLoss(), "weighting", "snr"),
        (DenoiserLoss(), "times", "lognormal"),
        (DenoiserLoss(), "drop", 1.5),
        (AutoencoderLoss(), "pixel", "l3"),
        (AutoencoderLoss(), "kl", -1.0),
        (LoopSettings(), "decay", "step"),
        (LoopSettings(), "precision", "int8"),
        (LoopSettings(), "steps", 0),
        (LoopSettings(), "lr", 0.0),
        (LoopSettings(), "ema", 1.0),
        (LoopSettings(), "clip", 0.0),
    ],
)
def test_impossible_settings_are_refused_when_they_are_made(
    settings: Any, name: str, value: Any
) -> None:
    wrong = copy.copy(settings)
    # the constructor's types are checked in tests, and the message is tested here
    object.__setattr__(wrong, name, value)
    with pytest.raises(UserError, match=str(value)):
        wrong.__post_init__()


# ---- average, learning rate, order ---------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_ema_is_its_recursion(decay: float) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema, g = EMA(network, decay), torch.Generator().manual_seed(0)
    expected = {name: p.detach().double() for name, p in network.named_parameters()}
    for n in range(30):
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
            network[1].running_mean.fill_(n)  # type: ignore[union-attr,operator]
        ema.update(network, n)
        d = min(decay, (1 + n) / (10 + n))
        expected = {
            name: d * expected[name] + (1 - d) * p.detach().double()
            for name, p in network.named_parameters()
        }
    for name, value in expected.items():
        result = ema.network.get_parameter(name)
        torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=1e-6)
        assert (
            torch.equal(result, network.get_parameter(name)) is (decay == 0)
            and not result.requires_grad
        )
    assert (ema.state()["1.running_mean"] == 29).all()


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_in_closed_form(decay: Any) -> None:
    s = LoopSettings(steps=110, warmup=10, lr=2.0, decay=decay, final_lr=0.1)
    result = [s.lr_at(k) for k in range(110)]
    assert result[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])  # linear warm-up
    u = np.arange(100) / 100
    fall = {
        "constant": np.ones(100),
        "linear": 1 - 0.9 * u,
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * u)),
    }[decay]
    assert result[10:] == pytest.approx(list(2.0 * fall))
    assert LoopSettings(warmup=0, decay="constant", lr=3.0).lr_at(0) == 3.0


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (10, 5), (3, 8), (1, 2)])
def test_every_epoch_is_a_permutation_across_its_seams(size: int, batch_size: int) -> None:
    order = Stream(size, batch_size, seed=5)
    batches = [batch_indices(size, batch_size, 5, step) for step in range(25)]
    assert all(torch.equal(order(step), batch) for step, batch in enumerate(batches))
    assert torch.equal(order(3), batches[3])  # going back
    stream = torch.cat(batches)
    epochs = stream[: len(stream) // size * size].reshape(-1, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand_as(epochs))
    assert size == 1 or len(epochs.unique(dim=0)) > 1
    assert size == 1 or not torch.equal(
        stream, torch.cat([batch_indices(size, batch_size, 6, step) for step in range(25)])
    )


def test_seeds_are_a_function_of_their_parts() -> None:
    """SHA-256, not Python's `hash`: the same in every process and version."""

    def by_hand(*parts: object) -> int:
        data = b"".join(len(str(p).encode()).to_bytes(8, "little") + str(p).encode() for p in parts)
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1

    assert derive_seed(0, "draws", 12) == by_hand(0, "draws", 12) == 8887647699963963255
    assert derive_seed(1, "23") != derive_seed(12, "3")


# ---- the loop ------------------------------------------------------------------------------------


def test_the_first_step_is_adamws(tmp_path: Path) -> None:
    """w <- w - lr*(wd*w + g/(|g| + eps)): Adam's first step is the gradient's sign."""
    objective = Line()
    line = objective.networks["line"]
    before, s = (
        line.weight.detach().clone(),
        replace(LOOP, steps=1, lr=0.01, weight_decay=0.1, clip=1e9),
    )
    train(objective, s, tmp_path)
    assert line.weight.grad is not None
    g = line.weight.grad
    torch.testing.assert_close(
        line.weight.detach(), before - 0.01 * (0.1 * before + g / (g.abs() + 1e-8))
    )


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_gradients_are_clipped(tmp_path: Path, clip: float) -> None:
    objective = Line(lambda loss, step: 100 * loss)
    train(objective, replace(LOOP, steps=1, clip=clip), tmp_path)
    norm = (
        torch.cat(
            [
                p.grad.flatten()
                for p in objective.networks["line"].parameters()
                if p.grad is not None
            ]
        )
        .norm()
        .item()
    )
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["line/grad_norm"]
    assert logged > 1
    assert norm == pytest.approx(min(clip, logged), rel=1e-3)


def test_bf16_and_fp32_run_one_after_the_other(tmp_path: Path) -> None:
    """In one process; bf16 computes in bf16 (its loss differs) and stays finite."""
    losses = {}
    for precision in ("bf16", "fp32"):
        objective = denoiser(
            DenoiserLoss(),
            FLOW,
            Latents(torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))),
        )
        network = train(objective, replace(LOOP, precision=precision), tmp_path / precision)
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in network.parameters())
        losses[precision] = [
            json.loads(line)["denoiser/loss"]
            for line in (tmp_path / precision / "log.jsonl").read_text().splitlines()
        ]
    assert len(losses["bf16"]) == 4 and losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def trained(folder: Path, precision: Any, **arguments: Any) -> nn.Module:
    """A denoiser after the four steps of `LOOP`."""
    torch.manual_seed(0)
    objective = denoiser(
        DenoiserLoss(),
        FLOW,
        Latents(torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))),
    )
    settings = replace(LOOP, precision=precision, save_every=2)
    return train(objective, settings, folder, **arguments)


@pytest.mark.parametrize("faster", ["bf16", "fp32"])
def test_precision_of_the_faster_step_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    kinds: list[str] = []

    def choose(kind: str, kernels: Mapping[str, Any]) -> str:
        kinds.append(kind)
        assert [*kernels] == ["fp32", "bf16"]
        for prepare in kernels.values():
            prepare()()
        return faster

    monkeypatch.setattr("sfumato.train.precision.fastest", choose)
    monkeypatch.setattr("sfumato.train.precision.onednn", lambda: Supported)
    chosen = trained(tmp_path / "auto", "auto")
    assert len(kinds) == 1 and kinds[0].startswith("training step of a ")
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["loop"]["precision"] == faster
    explicit = trained(tmp_path / "explicit", faster)
    # timing the steps has left no trace in the weights or the random state
    assert all(
        torch.equal(a, b) for a, b in zip(chosen.parameters(), explicit.parameters(), strict=True)
    )


class Supported:
    """oneDNN of a processor that computes in bfloat16."""

    _is_mkldnn_bf16_supported = staticmethod(lambda: True)


def test_resumed_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may be faster in the other precision."""

    def interrupt(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "auto", "bf16", on_step=interrupt)

    def never(kind: str, kernels: Mapping[str, Any]) -> str:
        raise AssertionError(f"{kind} was measured")

    monkeypatch.setattr("sfumato.train.precision.fastest", never)
    resumed, whole = trained(tmp_path / "auto", "auto"), trained(tmp_path / "whole", "bf16")
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


def test_a_damaged_checkpoint_does_not_stop_the_choice_of_precision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is passed over, as in loading, for the one before."""
    whole = trained(tmp_path, "bf16")
    (tmp_path / "checkpoints" / "step-00000004" / "state.json").write_text("{")
    resumed = trained(tmp_path, "auto")
    assert "step-00000004 is passed over" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["loop"]["precision"] == "bf16"
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


def test_a_batch_that_does_not_fit_is_refused_where_the_precision_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(kind: str, kernels: Mapping[str, Any]) -> str:
        raise MemoryError

    monkeypatch.setattr("sfumato.train.precision.fastest", full)
    monkeypatch.setattr("sfumato.train.precision.onednn", lambda: Supported)
    with pytest.raises(UserError, match=rf"batch_size={LOOP.batch_size} does not fit .* at step 1"):
        trained(tmp_path, "auto")


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_that_emulates_bfloat16_trains_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, chosen: str
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    gpu = types.SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cuda"))
    assert choose_precision(Line(), 4, 0, gpu, tmp_path) == chosen


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fp16.*GPU.*bf16"):
        train(Line(), replace(LOOP, precision="fp16"), tmp_path)
    assert not any(tmp_path.iterdir())


def infinite_gradient(loss: Tensor, step: int) -> Tensor:
    return loss + (0 * loss).sqrt() if step == 4 else loss


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda loss, step: loss * (math.nan if step == 4 else 1), "the loss is nan"),
        (lambda loss, step: loss * (math.inf if step == 4 else 1), "the loss is inf"),
        (infinite_gradient, "the gradient's norm is nan"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_that_are_not_finite_stop_the_run(
    tmp_path: Path, change: Any, words: str, precision: Any
) -> None:
    """The sentence names stage, phase, step and dtype; the last checkpoint is good, and the run
    goes on from it.
    """
    settings = replace(LOOP, steps=6, save_every=2, precision=precision)
    with pytest.raises(
        NumericalError, match=rf"{words} in train line \(line\) at step 5 \({precision}\): .*"
    ):
        train(Line(change), settings, tmp_path / "bad")
    assert checkpoint.steps(tmp_path / "bad" / "checkpoints") == [2, 4]
    again = train(Line(), settings, tmp_path / "bad")
    whole = train(Line(), settings, tmp_path / "good")
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True)
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Broken(Line):
        def show(
            self, network: nn.Module, step: int
        ) -> tuple[dict[str, float], dict[str, PIL.Image]]:
            if step == 2:  # after the step's gradient was found good, before the save
                self.networks["line"].bias.data.fill_(math.inf)
            return {}, {}

    with pytest.raises(
        NumericalError,
        match=r"the weight bias is not finite in train line \(line\) at step 2 \(fp32\)",
    ):
        train(Broken(), replace(LOOP, show_every=1, save_every=1), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_nan_in_the_latents_names_the_denoiser(tmp_path: Path) -> None:
    latents = Latents(torch.full((4, 2, 8, 8), math.nan))
    with pytest.raises(NumericalError, match=r"train denoiser \(denoiser\) at step 1 \(fp32\)"):
        train(denoiser(DenoiserLoss(), FLOW, latents), LOOP, tmp_path)


def test_mirroring_belongs_to_the_step(tmp_path: Path) -> None:
    """Half of the images, the same ones whenever a step is made again, whatever else has drawn
    random numbers.
    """
    images = smooth_image_set(64, flip=True)
    objective = autoencoder(AutoencoderLoss(), images)
    plain = images.unflipped().batch(range(64))["image"]
    first = objective.batch(torch.arange(64), draws(64))["image"]
    torch.rand(7)
    assert torch.equal(objective.batch(torch.arange(64), draws(64))["image"], first)
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(first, plain, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(first[~mirrored], plain[~mirrored], strict=True))
    assert 16 < mirrored.sum() < 48
    other = objective.batch(torch.arange(64), draws(64, seed=1))["image"]
    assert not torch.equal(other, first)


# ---- what it leaves for people -------------------------------------------------------------------


class Pooled(nn.Module):
    """Features that are easy to compute: a 2x2 picture."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).mean(1).flatten(1)


def test_a_run_leaves_numbers_curves_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = types.ModuleType("toy_pooled")
    module.network = Pooled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_pooled", module)
    objective = autoencoder(AutoencoderLoss(), features=load_features("toy_pooled:network"))
    train(objective, replace(LOOP, show_every=2), tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "autoencoder/loss" in line] == [1, 2, 3, 4]
    shown = {line["step"]: line for line in lines if "held_out/psnr" in line}
    assert set(shown) == {2, 4}
    assert all(
        set(line) >= {"held_out/psnr", "held_out/ssim", "held_out/frechet"}
        for line in shown.values()
    )
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))

    events = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    for name in ("autoencoder/loss", "lr"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line
        ]
    assert [e.step for e in events.Scalars("held_out/psnr")] == [2, 4]
    assert [e.step for e in events.Images("reconstructions")] == [2, 4]
    for path in (tmp_path / "samples" / "reconstructions-00000004.png", tmp_path / "curves.png"):
        pixels = np.asarray(PIL.open(path).convert("RGB"))
        assert pixels.std() > 5, f"{path.name} is blank"
    grid = PIL.open(tmp_path / "samples" / "reconstructions-00000004.png")
    assert grid.width >= 8 * 16 and grid.height >= 2 * 16


def numbers_of(out: Path) -> dict[int, dict[str, float]]:
    """The log's numbers by step."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        line.pop("step"): {name: value for name, value in line.items() if name != "seconds"}
        for line in lines
    }


def test_a_line_of_the_log_is_the_mean_over_the_steps_since_the_last(tmp_path: Path) -> None:
    """Of those that had a number: the discriminator begins at step 4, in the middle of a line.

    The learning rate is the step's own.
    """
    settings = replace(LOOP, steps=8, decay="linear")
    for name, every in (("each", 1), ("third", 3)):
        train(
            autoencoder(
                AutoencoderLoss(adversarial=0.5, adversarial_start=4, discriminator_width=8)
            ),
            replace(settings, log_every=every),
            tmp_path / name,
        )
    each, third = numbers_of(tmp_path / "each"), numbers_of(tmp_path / "third")
    assert list(third) == [3, 6, 8]
    for last, steps in ((3, (1, 2, 3)), (6, (4, 5, 6)), (8, (7, 8))):
        assert third[last].keys() == each[last].keys()
        for name, value in third[last].items():
            seen = [each[step][name] for step in steps if name in each[step]]
            assert value == pytest.approx(
                each[last][name] if name == "lr" else sum(seen) / len(seen)
            ), name
    assert "discriminator/loss" in third[6] and "discriminator/loss" not in each[4]
    losses = [each[step]["autoencoder/loss"] for step in (1, 2, 3)]
    assert third[3]["autoencoder/loss"] != pytest.approx(losses[-1], rel=1e-4)


def test_losses_are_summed_on_their_device() -> None:
    """The meta device holds no numbers: reading one fails."""
    means, loss = Means(), torch.zeros((), device="meta", requires_grad=True)
    for _ in range(3):
        means.add({"loss": loss, "norm": 2.0})
    total = means.sums["loss"]
    assert isinstance(total, Tensor) and total.device.type == "meta" and not total.requires_grad
    assert (means.sums["norm"], means.counts) == (6.0, {"loss": 3, "norm": 3})
    with pytest.raises(RuntimeError, match="meta"):
        means.now()


def test_means_go_on_from_their_state() -> None:
    """Through JSON, bit for bit; a number that is not finite too."""
    values, whole, first = [0.1, 1 / 3, 1e-7, 0.7], Means(), Means()
    for value in values:
        whole.add({"a": value, "b": math.inf})
    for value in values[:2]:
        first.add({"a": value, "b": math.inf})
    second = Means.from_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    for value in values[2:]:
        second.add({"a": value, "b": math.inf})
    assert second == whole and second.now()["a"] == pytest.approx(sum(values) / 4)


def test_held_out_numbers_are_those_of_the_held_out_images(tmp_path: Path) -> None:
    """PSNR by hand, of the averaged network, on images it was not trained on."""
    train_images, held_out = smooth_image_set(8), smooth_image_set(6, seed=9)
    torch.manual_seed(0)
    objective = AutoencoderObjective(AutoencoderKL(KL), train_images, held_out, AutoencoderLoss())
    network = train(objective, LOOP, tmp_path)
    assert isinstance(network, AutoencoderKL)
    image = held_out.batch(range(6))["image"]
    with torch.no_grad():
        error = (
            network.reconstruct(network.posterior(image).mean).clamp(-1, 1) - image
        ).square().mean() / 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out/psnr"] == pytest.approx(-10 * math.log10(error.item()), rel=1e-4)


# ---- it learns -----------------------------------------------------------------------------------


def test_an_autoencoder_learns_one_batch_by_heart(tmp_path: Path) -> None:
    objective = autoencoder(AutoencoderLoss(pixel="l2"), smooth_image_set(4))
    before = one_loss(objective)[0].item()
    train(objective, replace(LOOP, steps=80, lr=1e-2, ema=0.9, log_every=80), tmp_path)
    assert one_loss(objective)[0].item() < before / 5


def test_a_denoiser_learns_one_latent_by_heart(tmp_path: Path) -> None:
    """It was shown one latent: sampling gives that latent, whatever the noise."""
    process = Process(schedule("cosine"), parameterization("x0"))
    # no place differs: the table is all that a network has of positions
    mean = torch.tensor([1.7, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 8, 8)
    objective = denoiser(DenoiserLoss(), process, Latents(mean))
    network = train(
        objective, replace(LOOP, steps=120, lr=1e-2, batch_size=8, ema=0.9, log_every=120), tmp_path
    )
    z = objective.space.standardise(mean)
    draw = SeededNoise((2, 8, 8), [0, 1], torch.device("cpu"))
    result = Denoiser(network, process)
    nothing = Conditioning()
    with torch.no_grad():
        drawn = run_sampler(
            ddim(draw(), timesteps("trailing", 5, process.schedule), process.schedule, draw),
            lambda x, t: result(x, t, nothing),
            5,
        )
    assert drawn is not None
    assert (drawn - z).square().mean() < 0.02 * z.square().mean()
