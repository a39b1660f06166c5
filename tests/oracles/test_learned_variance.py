"""Networks that predict a variance (Nichol & Dhariwal 2021, arXiv:2102.09672): its loss, the
samples that are drawn with it, and its way there.
"""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers as _diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PIL
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import sfumato
from helpers.latents import Latents
from helpers.models import SMALL_BLOCKS, random_network
from helpers.tensors import normal
from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, drive
from sfumato.checkpoints.formats.folder import save_part
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, run_sampler
from sfumato.diffuse.samplers import calls
from sfumato.diffuse.samplers.ddpm import ddpm
from sfumato.diffuse.schedule import Schedule, schedule
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR
from sfumato.diffuse.timesteps import timesteps
from sfumato.diffuse.vlb import bound
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.rules.linear import Linear
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.guidance.weights.constant import Constant
from sfumato.predict.networks.base import build as network_of
from sfumato.predict.networks.dit import DiTConfig
from sfumato.predict.networks.modern_dit import ModernDiTConfig
from sfumato.predict.networks.sit import SiTConfig
from sfumato.predict.networks.unet import UNetConfig
from sfumato.predict.wrappers.known_region import known_region
from sfumato.predict.wrappers.multidiffusion import multidiffusion
from sfumato.prediction import Selected
from sfumato.sampling import Defaults
from sfumato.train import DenoiserRecipe
from sfumato.train.conditions.unconditional import Unconditional
from sfumato.train.loop import LoopSettings
from sfumato.train.objective import Draw
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective
from sfumato.train.recipe import DataSettings
from sfumato.types import Conditioning, LatentSpace, Prediction

diffusers: Any = _diffusers  # its names are made at run time
DOUBLE = torch.float64
LEARNED = "ddpm:variance=learned"
FLOW = Process(schedule("flow"), parameterization("flow"))
TABLES = {
    "linear": (schedule("linear"), "eps"),
    "cosine": (schedule("cosine"), "v"),
    "scaled_linear": (schedule("scaled_linear"), "x0"),
    "few": (schedule("scaled_linear", steps=20), "v"),
    "zero terminal SNR": (ZeroTerminalSNR(schedule("scaled_linear")), "v"),
    "shifted": (Shifted(schedule("cosine"), 3.0), "v"),
}
tables = pytest.mark.parametrize("kind", TABLES)


def process_of(kind: str) -> Process:
    chosen, name = TABLES[kind]
    return Process(chosen, parameterization(name))


def grid(chosen: Schedule) -> tuple[Tensor, Tensor]:
    """All times of a table, and the factor of alpha^2 in each step: 1 - beta."""
    assert chosen.grid is not None
    t = chosen.time(torch.arange(chosen.grid, dtype=DOUBLE))
    alpha2 = chosen.at(t)[0].square()
    return t, alpha2 / torch.cat([torch.ones(1, dtype=DOUBLE), alpha2[:-1]])


# ---- the bound -----------------------------------------------------------------------------------


@tables
def test_the_bound_is_the_divergence_of_the_posterior_from_the_step(kind: str) -> None:
    """By the paper's own formulas over the table (eq. 10-11 and 15), and torch's divergence of two
    normals; the first step is a likelihood.
    """
    process = process_of(kind)
    t, kept = grid(process.schedule)
    pick = torch.tensor([0, 1, 2, len(t) // 3, len(t) - 2, len(t) - 1])
    beta, above = 1 - kept, kept.cumprod(0)
    before = torch.cat([torch.ones(1, dtype=DOUBLE), above[:-1]])
    small = beta * (1 - before) / (1 - above)
    small[0] = small[1]
    z, eps, x0, v = (normal(6, 2, 3, 3, seed=k, dtype=DOUBLE) for k in range(4))
    x0 = z + 0.02 * x0
    x = process.add_noise(z, eps, t[pick])

    def column(values: Tensor) -> Tensor:
        return values[pick].reshape(-1, 1, 1, 1)

    def mean(clean: Tensor) -> Tensor:
        of_clean, of_x = (
            before.sqrt() * beta / (1 - above),
            kept.sqrt() * (1 - before) / (1 - above),
        )
        return column(of_clean) * clean + column(of_x) * x

    share = (v + 1) / 2
    model = Normal(
        mean(x0), (share * column(beta).log() + (1 - share) * column(small).log()).exp().sqrt()
    )
    expected = kl_divergence(Normal(mean(z), column(small).sqrt()), model)
    expected[0] = -model.log_prob(z)[0]
    expected = len(t) / math.log(2) * expected.mean((1, 2, 3))
    torch.testing.assert_close(bound(process, z, x0, v, t[pick]), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        bound(process, z.float(), x0.float(), v.float(), t[pick]),
        expected.float(),
        rtol=1e-3,
        atol=1e-3,
    )
    assert expected[1:].min() > 0


def exact(chosen: Schedule, t: float, s: float, spread: float) -> tuple[float, float]:
    """For data of this standard deviation: Var[z | x_t], and where in [-1, 1] the true log variance
    of x_s given x_t lies.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = chosen.point(t), chosen.point(s)
    added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    left = spread**2 * sigma_t**2 / (alpha_t**2 * spread**2 + sigma_t**2)
    # the posterior's, and that of its mean
    true = added * sigma_s**2 / sigma_t**2 + (alpha_s * added / sigma_t**2) ** 2 * left
    return left, 1 - 2 * math.log(added / true) / math.log(sigma_t**2 / sigma_s**2)


@pytest.mark.parametrize("spread", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_bound_is_least_at_the_true_variance(kind: str, spread: float) -> None:
    """Gaussian data and the exact denoiser, whose squared error is Var[z | x_t]: the slope is 0 at
    the reverse step's own variance.
    """
    process = process_of(kind)
    times = grid(process.schedule)[0]
    for number in (1, 30, 500, 900):
        t, s = float(times[number]), float(times[number - 1])
        left, v = exact(process.schedule, t, s, spread)
        assert -1 < v < 1, "between the small and the large one"
        z, at = (
            torch.full((1, 1, 1, 1), math.sqrt(left), dtype=DOUBLE),
            torch.tensor([t], dtype=DOUBLE),
        )
        variance = torch.full_like(z, v, requires_grad=True)
        result = bound(process, z, torch.zeros_like(z), variance, at)
        (slope,) = torch.autograd.grad(result.sum(), variance)
        above, below = (
            bound(process, z, torch.zeros_like(z), torch.full_like(z, v + by), at)
            for by in (0.05, -0.05)
        )
        width = float(above - result), float(below - result)
        assert min(width) > 0 and abs(float(slope)) < 1e-4 * min(width) / 0.05


def test_a_schedule_without_steps_has_no_bound() -> None:
    z = normal(1, 1, 2, 2)
    with pytest.raises(UserError, match="schedule 'flow': its loss is for tables of betas"):
        bound(FLOW, z, z, z, torch.tensor([0.5]))


# ---- training ------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Answers y = x * a and, behind it, any number of maps of b."""

    def __init__(self, maps: int, learned_variance: bool = True):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.tensor(0.7)),
            nn.Parameter(0.3 * normal(maps, 4, 4, seed=9)),
        )
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat([self.a * x, self.b.expand(len(x), -1, -1, -1)], 1)


def objective(
    network: nn.Module, process: Process, loss: DenoiserLoss, channels: int = 2
) -> DenoiserObjective:
    space = LatentSpace(channels, 2, (0.0,) * channels, (1.0,) * channels)
    return DenoiserObjective(
        network, process, Latents(normal(6, channels, 4, 4)), space, Unconditional(), loss
    )


def one_loss(made: DenoiserObjective) -> tuple[Tensor, dict[str, float]]:
    draw = Draw(torch.Generator().manual_seed(0), 6)
    return made.loss("denoiser", made.networks, made.batch(torch.arange(6), draw), 0, draw)


@pytest.mark.parametrize("kind", ["linear", "cosine", "zero terminal SNR"])
def test_the_loss_is_the_simple_one_and_a_share_of_the_bound(kind: str) -> None:
    """The bound moves the variance alone, the simple loss the mean alone (eq. 16); the first is
    reported.
    """
    network, process, grads = Maps(2), process_of(kind), []
    plain, _ = one_loss(objective(Maps(0, False), process, DenoiserLoss()))
    for weight in (0.0, 0.001, 0.5):
        network.zero_grad()
        loss, numbers = one_loss(objective(network, process, DenoiserLoss(variance=weight)))
        loss.backward()
        assert network.a.grad is not None and network.b.grad is not None
        grads.append((float(network.a.grad), network.b.grad.clone()))
        assert float(numbers["denoiser/unweighted"]) == pytest.approx(float(plain), rel=1e-6)
        assert float(loss) == pytest.approx(
            float(plain) + weight * float(numbers.get("denoiser/vlb", 0.0)), rel=1e-6
        )
        assert ("denoiser/vlb" in numbers) == (weight > 0)
    assert grads[0][0] == grads[1][0] == grads[2][0] != 0, "of the mean"
    assert not grads[0][1].any() and grads[1][1].any()
    torch.testing.assert_close(grads[2][1], 500 * grads[1][1], rtol=1e-4, atol=1e-8)


def test_training_finds_the_true_variance() -> None:
    """Gaussian data, a network with the exact mean, and one number a step that begins as the small
    variance: Adam takes it to the truth.
    """
    process, spread = Process(schedule("scaled_linear", steps=10), parameterization("x0")), 0.6
    times = grid(process.schedule)[0].tolist()

    class Exact(nn.Module):
        learned_variance = True

        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(-torch.ones(10))

        def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            alpha, sigma = (
                c.float().reshape(-1, 1, 1, 1)
                for c in process.schedule.at(process.schedule.time(timestep))
            )
            x0 = alpha * spread**2 / (alpha.square() * spread**2 + sigma.square()) * x
            return torch.cat(
                [x0, self.v[timestep.round().long()].reshape(-1, 1, 1, 1).expand_as(x)], 1
            )

    network = Exact()
    space = LatentSpace(1, 2, (0.0,), (1.0,))
    made = DenoiserObjective(
        network,
        process,
        Latents(spread * normal(400, 1, 8, 8)),
        space,
        Unconditional(),
        DenoiserLoss(variance=1.0),
    )
    rule = torch.optim.Adam(network.parameters(), 0.1)
    mean = torch.zeros(10)
    for step in range(120):
        draw = Draw(torch.Generator().manual_seed(step), 400)
        loss, _ = made.loss(
            "denoiser", made.networks, made.batch(torch.arange(400), draw), step, draw
        )
        rule.zero_grad()
        loss.backward()
        rule.step()
        mean += network.v.detach() / 80 if step >= 40 else 0
    true = torch.tensor([exact(process.schedule, t, s, spread)[1] for s, t in pairwise(times)])
    assert (mean[1:] - true).abs().max() < 0.03, (mean, true)


def test_channels_that_are_neither_are_refused() -> None:
    """A network of one channel too many would else be trained by broadcasting where latents have
    one.
    """
    loss, _ = one_loss(
        objective(Maps(1), process_of("cosine"), DenoiserLoss(variance=0.0), channels=1)
    )
    plain, _ = one_loss(objective(Maps(0, False), process_of("cosine"), DenoiserLoss(), channels=1))
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)
    for maps in (1, 3):
        with pytest.raises(
            UserError, match=f"returns {2 + maps} channels for latents of 2: expected 2, or twice"
        ):
            one_loss(objective(Maps(maps), process_of("cosine"), DenoiserLoss()))


def test_flows_train_the_mean_alone_or_not_at_all() -> None:
    for network in (Maps(2), network_of(UNetConfig(**UNET))):
        with pytest.raises(UserError, match="expected variance=0 in the loss"):
            objective(network, FLOW, DenoiserLoss())
    # one without a trait for its output
    with pytest.raises(UserError, match="expected variance=0 in the loss"):
        one_loss(objective(Maps(2, learned_variance=False), FLOW, DenoiserLoss()))
    loss, numbers = one_loss(objective(Maps(2), FLOW, DenoiserLoss(variance=0.0)))
    plain, _ = one_loss(objective(Maps(0, False), FLOW, DenoiserLoss()))
    assert float(loss) == pytest.approx(float(plain), rel=1e-6) and list(numbers) == [
        "denoiser/unweighted"
    ]


def test_metadata_of_other_runs_is_as_before() -> None:
    """Runs of other networks go on from where they were: the weight is none of their settings."""
    process = process_of("cosine")
    assert "variance" not in objective(Maps(0, False), process, DenoiserLoss()).identity["loss"]
    assert objective(Maps(2), process, DenoiserLoss()).identity["loss"]["variance"] == 0.001
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=r"variance=.*: expected a number"):
            DenoiserLoss(variance=wrong)


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "scaled_linear", "flow"])
def test_few_steps_have_the_datas_variance(kind: str) -> None:
    """Gaussian data, exact mean and variance: four steps draw from the marginal of their last time;
    the fixed variances do not.

    16,000 numbers: 5 standard errors of a variance are 5.6 %.
    """
    chosen, spread, times = schedule(kind), 0.5, [0.98, 0.75, 0.5, 0.3, 0.12]
    steps = dict(pairwise(times))

    def denoise(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        x0 = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x
        return Prediction(
            x0, (x - alpha * x0) / sigma, torch.full_like(x, exact(chosen, t, steps[t], spread)[1])
        )

    def variance(kind: str) -> float:
        noise = torch.Generator().manual_seed(1)
        alpha, sigma = chosen.point(times[0])
        x = math.hypot(alpha * spread, sigma) * normal(250, 1, 8, 8, dtype=DOUBLE)
        run = ddpm(
            x,
            times,
            chosen,
            lambda: torch.randn(x.shape, generator=noise, dtype=DOUBLE),
            variance=kind,
        )  # type: ignore[arg-type]
        result = run_sampler(run, denoise, 4)
        assert result is not None
        return float(result.var())

    alpha, sigma = chosen.point(times[-1])
    true = (alpha * spread) ** 2 + sigma**2
    off = {name: abs(variance(name) / true - 1) for name in ("small", "large", "learned")}
    assert off["learned"] < 0.056 < 0.12 < min(off["small"], off["large"]), off


def test_its_ends_are_the_fixed_variances() -> None:
    chosen, x = schedule("cosine"), normal(2, 1, 4, 4)
    times = timesteps("trailing", 5, chosen)

    def end(kind: str, v: float = 0.0) -> Tensor:
        noise = SeededNoise((1, 4, 4), [0, 1])
        run = ddpm(x, times, chosen, noise, variance=kind)  # type: ignore[arg-type]
        result = run_sampler(
            run, lambda x, t: Prediction(0.5 * x.tanh(), x.sin(), torch.full_like(x, v)), 5
        )
        assert result is not None
        return result

    torch.testing.assert_close(end("learned", -1.0), end("small"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end("learned", 1.0), end("large"), rtol=1e-5, atol=1e-6)
    assert (end("learned", 0.0) - end("small")).abs().max() > 0.01
    assert calls(ddpm, times, chosen, variance="learned") == 5  # counted without a network


# ---- networks ------------------------------------------------------------------------------------

CHANNELS = 2
SMALL: dict[str, Any] = {"sample_size": 8, "in_channels": CHANNELS, "out_channels": 2 * CHANNELS}
UNET: dict[str, Any] = SMALL | {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
PATCHES: dict[str, Any] = SMALL | {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}
CONFIGS: dict[str, Any] = {
    "U-Net": UNetConfig(**UNET, num_class_embeds=3),
    "ModernDiT": ModernDiTConfig(**PATCHES, num_class_embeds=3),
    "DiT": DiTConfig(**PATCHES, num_embeds_ada_norm=2),
}
KL = KLConfig(
    in_channels=1, out_channels=1, latent_channels=CHANNELS, sample_size=16, **SMALL_BLOCKS
)


def model_of(config: Any, process: Process) -> LatentDiffusion:
    """Every weight random, so that the variance is that of a picture and a class."""
    network, autoencoder = (
        random_network(lambda: network_of(config)),
        random_network(lambda: AutoencoderKL(KL)),
    )
    return LatentDiffusion(
        autoencoder, Denoiser(network, process), ClassNames(("boot", "bag")), Defaults(steps=3)
    )


every = pytest.mark.parametrize("name", CONFIGS)


@every
def test_a_prediction_has_the_networks_variance(name: str) -> None:
    """It is the same alone, by `predict`, in a batch of several times, and in parts."""
    model = model_of(CONFIGS[name], process_of("cosine"))
    network: Any = model.denoiser.network
    assert network.learned_variance and network.channels == CHANNELS == network.in_channels
    x, cond = normal(2, CHANNELS, 8, 8), model.conditioner(["boot", "bag"])
    result = model.predict(x, 0.4, cond)
    with torch.inference_mode():
        y = network(x, model.denoiser.process.timestep(0.4, x.device).expand(2), cond)
        assert result.variance is not None and torch.equal(result.variance, y[:, CHANNELS:])
        assert result.x0.shape == x.shape and float(result.variance.std()) > 0.01
        queries = [
            DenoiserCall(model.denoiser, x, 0.4, cond),
            DenoiserCall(model.denoiser, x[:1] + 1, 0.7, cond[:1]),
        ]
        for rows in (None, 2):
            for query, prediction in zip(queries, evaluate_calls(queries, rows), strict=True):
                alone = model.denoiser(query.x, query.t, query.conditioning).variance
                assert (
                    prediction.variance is not None
                    and alone is not None
                    and torch.equal(prediction.variance, alone)
                )


@every
@pytest.mark.parametrize(
    "guidance",
    [
        "1",
        "3",
        "3 interval:low=0.2,high=0.6",
        "3 rescale",
        "3 project:momentum=-0.5",
        "3 zero_star",
    ],
)
def test_guided_predictions_have_the_conditions_variance(name: str, guidance: str) -> None:
    model = model_of(CONFIGS[name], process_of("cosine"))
    x, cond, none = (
        normal(2, CHANNELS, 8, 8),
        model.conditioner(["boot", "bag"]),
        model.conditioner([None, None]),
    )
    schedule = model.denoiser.process.schedule
    questions = build(Guidance.parse(guidance), model.denoiser, cond, [none], schedule.point, None)(
        x, 0.4
    )
    with torch.inference_mode():
        result = drive(questions, evaluate_calls)
        expected, other = model.denoiser(x, 0.4, cond), model.denoiser(x, 0.4, none)
    assert (
        result.variance is not None and expected.variance is not None and other.variance is not None
    )
    assert torch.equal(result.variance, expected.variance) and not torch.equal(
        result.variance, other.variance
    )
    assert guidance == "1" or not torch.equal(result.x0, expected.x0)


def test_images_without_a_condition_have_their_own_variance() -> None:
    """Of a guided batch in which one image has nothing to move away from, which is worked out
    apart.
    """
    model = model_of(CONFIGS["DiT"], process_of("cosine"))
    x, cond, none = (
        normal(2, CHANNELS, 8, 8),
        model.conditioner(["boot", None]),
        model.conditioner([None, None]),
    )
    point, weight, combine = model.denoiser.process.schedule.point, Constant(3.0), Linear()
    ask = guide(
        model.denoiser,
        cond,
        [(model.denoiser, none)],
        weight,
        combine,
        point,
        torch.tensor([False, True]),
    )
    with torch.inference_mode():
        result, expected = drive(ask(x, 0.4), evaluate_calls), model.denoiser(x, 0.4, cond)
    assert (
        isinstance(result, Selected)
        and result.variance is not None
        and expected.variance is not None
    )
    assert torch.equal(result.variance, expected.variance) and not torch.equal(
        result.x0[0], expected.x0[0]
    )


@pytest.mark.invariance
@every
def test_an_image_is_the_image_of_its_seed_alone(name: str) -> None:
    model = model_of(CONFIGS[name], process_of("cosine"))
    options: dict[str, Any] = {"sampler": LEARNED, "guidance": 2.0, "steps": 4, "output": "latent"}
    whole = model.generate(["boot", "bag", "boot"], seed=5, **options)
    assert torch.isfinite(whole).all()
    for k, prompt in enumerate(("boot", "bag", "boot")):
        assert torch.equal(model.generate(prompt, seed=5 + k, **options)[0], whole[k])
    options["sampler"] = "ddpm"
    small = model.generate(["boot", "bag", "boot"], seed=5, **options)
    assert (small - whole).abs().max() > 0.01


def test_a_network_without_one_is_refused() -> None:
    plain = replace(CONFIGS["U-Net"], out_channels=CHANNELS)
    # whose channels behind the target were never trained
    sit = SiTConfig(**PATCHES, num_embeds_ada_norm=2)
    for config, process in ((plain, process_of("cosine")), (sit, FLOW)):
        model = model_of(config, process)
        network: Any = model.denoiser.network
        assert (
            not network.learned_variance
            and model.predict(normal(1, CHANNELS, 8, 8), 0.5, model.conditioner(["bag"])).variance
            is None
        )
        assert model.generate("boot", sampler="ddpm", output="latent").shape == (1, CHANNELS, 8, 8)
        with pytest.raises(UserError, match="this network predicts no variance"):
            model.generate("boot", sampler=LEARNED)


def test_wrappers_hand_it_on() -> None:
    """The known region is a point, whose posterior has the smallest variance.

    Windows of a canvas are averaged.
    """
    process, x = process_of("cosine"), normal(1, 1, 4, 8)
    z, mask = normal(1, 1, 4, 8, seed=1), torch.zeros(1, 1, 4, 8)
    mask[..., :3] = 1

    def ask(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        return (yield [DenoiserCall(None, x, t, Conditioning())])[0]

    def evaluated(wrapped: DenoiseFn, variance: bool) -> Prediction:
        return drive(
            wrapped(x, 0.5),
            lambda queries: [
                Prediction(q.x, q.x, 0.1 * q.x if variance else None) for q in queries
            ],
        )

    region = known_region(ask, z, mask, process.schedule.point)
    canvas = multidiffusion(ask, 4, 2)
    assert evaluated(region, False).variance is None and evaluated(canvas, False).variance is None
    torch.testing.assert_close(
        evaluated(region, True).variance, torch.where(mask == 1, -1.0, 0.1 * x)
    )
    torch.testing.assert_close(evaluated(canvas, True).variance, 0.1 * x)


# ---- a model's way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four pictures, and an autoencoder of random weights."""
    folder, draw = tmp_path_factory.mktemp("variance"), np.random.default_rng(0)
    for name in ("bag", "boot"):
        (folder / "pictures" / name).mkdir(parents=True)
        for k in range(4):
            PIL.fromarray(draw.integers(0, 256, (16, 16), dtype=np.uint8)).save(
                folder / "pictures" / name / f"{k}.png"
            )
    torch.manual_seed(0)
    (folder / "vae").mkdir()
    save_part(folder / "vae", AutoencoderKL(KL))
    return folder


@every
def test_a_recipe_trains_a_model_that_samples_with_it(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    """The network's config has twice the channels of the latent.

    The folder opens in sfumato, and its scheduler in diffusers, with the variance learned.
    """
    loop = LoopSettings(
        steps=2, batch_size=4, lr=1e-3, warmup=0, save_every=2, show_every=2, log_every=1
    )
    config = replace(CONFIGS[name], in_channels=4, out_channels=8)
    data = DataSettings(source=str(pictures / "pictures"), size=16, channels=1, held_out=0.25)
    defaults = Defaults(steps=2, sampler=LEARNED)
    recipe = DenoiserRecipe(
        pictures / "vae", data, config, "cosine", "v", DenoiserLoss(), loop, defaults
    )
    folder = recipe.run(tmp_path)
    model = sfumato.load(folder)
    network: Any = model.denoiser.network
    assert (network.config.in_channels, network.config.out_channels) == (
        CHANNELS,
        2 * CHANNELS,
    ) and model.defaults == defaults
    rows = [
        json.loads(line)
        for line in next((tmp_path / "denoiser").glob("*.jsonl")).read_text().splitlines()
    ]
    assert all(
        math.isfinite(row["denoiser/vlb"]) for row in rows if "denoiser/unweighted" in row
    ) and "denoiser/vlb" in str(rows)
    z = model.generate("bag", seed=3, output="latent")
    assert torch.isfinite(z).all() and not torch.equal(
        z, model.generate("bag", seed=3, sampler="ddpm", output="latent")
    )
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    assert (
        scheduler.config["variance_type"] == "learned_range"
        and scheduler.config["prediction_type"] == "v_prediction"
    )
    with pytest.raises(UserError, match="expected variance=0 in the loss"):
        replace(recipe, schedule="flow", parameterization="flow").run(tmp_path / "flow")
