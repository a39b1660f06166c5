"""The face of the library: every parameter of `generate`, the four acts beside it, saving and
loading, names, and numbers that are not finite.

All on whole models with small random weights (`helpers/models.py`). Two runs of the same arithmetic
are compared bit for bit. The same image in batches of different sizes is compared to rounding,
because convolutions and matrix products choose their algorithm by the batch.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from helpers.models import CLASSES, LATENT, tiny_model
from sfumato.batching import DenoiserCall
from sfumato.checkpoints.formats import folder as folders
from sfumato.decode.preview import Preview
from sfumato.decode.whole import whole
from sfumato.diffuse.parameterization import edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, Step
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR
from sfumato.diffuse.timesteps import SPACINGS
from sfumato.errors import NumericalError, UserError
from sfumato.images import to_pil, to_tensor
from sfumato.io.atomic import read_tensors, write_tensors
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.settings import Guidance
from sfumato.registry import names
from sfumato.sampling import Defaults, Request
from sfumato.tasks.variations import vary

KINDS = {
    "flow-grey-classes": ("flow", 1, CLASSES),
    "eps-colour-classes": ("eps", 3, CLASSES),
    "flow-colour": ("flow", 3, ()),
}
KINDS |= {"eps-grey": ("eps", 1, ()), "v-grey-classes": ("v", 1, CLASSES)}
UNET = Path("unet", folders.WEIGHTS)


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    return {name: tiny_model(*kind) for name, kind in KINDS.items()}


@pytest.fixture(params=KINDS)
def each(request: pytest.FixtureRequest, models: dict[str, LatentDiffusion]) -> LatentDiffusion:
    """One model of each kind."""
    return models[request.param]


@pytest.fixture
def model(models: dict[str, LatentDiffusion]) -> LatentDiffusion:
    """The one that most tests need: flow, grey, three classes."""
    return models["flow-grey-classes"]


def latents(model: LatentDiffusion, *arguments: Any, **options: Any) -> Tensor:
    return model.generate(*arguments, output="latent", **options)


def near(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of other batch sizes; eps near t = 1 multiplies it by sigma /
    alpha, so it is relative.
    """
    return bool((a - b).abs().max() <= 2e-5 * max(1.0, float(b.abs().max())))


@contextmanager
def watched(model: LatentDiffusion) -> Iterator[list[int]]:
    """The batch sizes of the network's calls."""
    calls: list[int] = []
    handle = model.denoiser.network.register_forward_hook(
        lambda module, inputs, result: calls.append(len(result))
    )
    try:
        yield calls
    finally:
        handle.remove()


# ---- what comes out ------------------------------------------------------------------------------


def test_a_repeated_batch_of_conditions_is_joined_again_only_if_it_is_the_same() -> None:
    """A run's joined condition is remembered in inference; another second condition, a third, or
    fewer must not get it.
    """
    denoiser = tiny_model().denoiser
    conditions = [tiny_model().conditioner([name]) for name in CLASSES]
    x = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    alone = [denoiser(x, 0.5, c) for c in conditions]
    with torch.inference_mode():
        for order in ([0, 1], [0, 1], [0, 2], [0, 1, 2], [0], [0, 1], [1, 0], [0, 0]):
            result = evaluate_calls([DenoiserCall(denoiser, x, 0.5, conditions[k]) for k in order])
            assert all(
                torch.equal(p.x0, alone[k].x0) and torch.equal(p.eps, alone[k].eps)
                for p, k in zip(result, order, strict=True)
            )
    result = evaluate_calls(
        [DenoiserCall(denoiser, x.requires_grad_(), 0.5, conditions[k]) for k in (0, 1)]
    )  # what inference remembers has no gradient
    result[1].x0.sum().backward()
    assert x.grad is not None


def test_a_denoiser_follows_its_network_to_another_dtype() -> None:
    """The module of the first weight is remembered, not the weight."""
    denoiser, condition = tiny_model().denoiser, tiny_model().conditioner([CLASSES[0]])
    x = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    before = denoiser(x, 0.5, condition).x0
    denoiser.network.to(torch.bfloat16)
    coarse = denoiser(x, 0.5, condition).x0
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, before)
    denoiser.network.to(torch.float64)
    torch.testing.assert_close(denoiser(x, 0.5, condition).x0, coarse, rtol=0.2, atol=0.2)


def test_outputs_are_one_picture_in_three_forms(each: LatentDiffusion) -> None:
    pictures, tensor, z = (
        each.generate(n=3, seed=5, output=kind) for kind in ("pil", "tensor", "latent")
    )
    channels = each.autoencoder.channels
    assert [(p.size, p.mode) for p in pictures] == [((16, 16), "L" if channels == 1 else "RGB")] * 3
    assert tensor.shape == (3, 3, 16, 16) and tensor.dtype == torch.float32
    assert z.shape == (3, *LATENT) and z.dtype == torch.float32
    assert float(tensor.min()) >= 0 and float(tensor.max()) <= 1 and float(tensor.std()) > 0.02
    assert channels == 3 or all(torch.equal(tensor[:, 0], tensor[:, k]) for k in (1, 2))
    assert torch.equal(tensor[:, :channels] * 2 - 1, ((whole(each.autoencoder, z) + 1) / 2) * 2 - 1)
    for picture, again, pixels in zip(pictures, each.decode(z), tensor, strict=True):
        assert np.array_equal(picture, again)
        assert (
            np.abs(
                np.asarray(picture, float)
                - (pixels[:channels].permute(1, 2, 0).squeeze(-1) * 255).numpy()
            ).max()
            <= 0.501
        )


def test_results_can_be_trained_on(model: LatentDiffusion) -> None:
    """Tensors of torch's inference mode cannot be saved for a gradient; what the model hands out
    can.
    """
    z = model.compress(torch.zeros(1, 1, 16, 16))
    result = model.predict(z, 0.5, "bag")
    results = [
        z,
        result.x0,
        result.eps,
        model.generate(output="tensor"),
        latents(model),
        whole(model.autoencoder, z),
        model.diffuse(z, 0.5),
    ]
    results[3].mul_(2)  # its channels do not share memory either
    weight = torch.ones(1, requires_grad=True)
    sum((weight * r).sum() for r in results).backward()
    assert weight.grad is not None and torch.isfinite(weight.grad)


# ---- prompt, n, seed -----------------------------------------------------------------------------


def test_prompt_matters_and_nothing_means_unconditional(model: LatentDiffusion) -> None:
    boot, bag, free = latents(model, "ankle boot"), latents(model, "bag"), latents(model)
    assert not near(boot, bag) and not near(boot, free) and not near(bag, free)
    assert torch.equal(free, latents(model, "")) and torch.equal(free, latents(model, "  "))
    null = model.conditioner.null(1)
    assert torch.equal(model.predict(free, 0.5).x0, model.predict(free, 0.5, null).x0)


def test_a_list_of_prompts_is_one_image_each(each: LatentDiffusion) -> None:
    prompts = ["bag", None, "ankle boot"] if each.class_names else [None, "", None]
    together = latents(each, prompts, seed=5)
    assert torch.equal(together, latents(each, tuple(prompts), n=3, seed=5))
    for k, prompt in enumerate(prompts):
        assert near(latents(each, prompt, seed=5 + k)[0], together[k])


@pytest.mark.parametrize("prompts", [["bag"] * 2, [], ["bag"] * 4])
def test_n_that_is_not_the_number_of_prompts(model: LatentDiffusion, prompts: list[str]) -> None:
    with pytest.raises(UserError, match=r"n=3 with \d prompts|n=0"):
        model.generate(prompts, n=3 if prompts else 1)


def test_negative_prompts_of_another_number(model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="2 prompts for 3 images"):
        model.generate("bag", n=3, negative_prompt=["bag", "bag"])


@pytest.mark.parametrize("n", [0, -1])
def test_n_must_be_positive(model: LatentDiffusion, n: int) -> None:
    with pytest.raises(UserError, match=f"n={n}: expected a whole number of at least 1"):
        model.generate(n=n)


@pytest.mark.invariance
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
def test_an_image_of_a_batch_is_that_of_its_own_seed(
    model: LatentDiffusion, count: int, sampler: str
) -> None:
    """Its noise is the same to the bit; the arithmetic, which depends on the size of the batch, to
    rounding.
    """
    together = latents(model, "bag", n=count, seed=100, sampler=sampler)
    for k in {0, count // 2, count - 1}:
        alone = latents(model, "bag", seed=100 + k, sampler=sampler)
        assert near(alone[0], together[k])
        assert count > 1 or torch.equal(alone, together)
    assert torch.equal(
        SeededNoise(LATENT, range(100, 100 + count))()[-1:], SeededNoise(LATENT, [99 + count])()
    )
    assert torch.equal(together, latents(model, "bag", n=count, seed=100, sampler=sampler))


def test_every_seed_of_64_bits_draws_an_image_of_its_own(model: LatentDiffusion) -> None:
    assert not near(latents(model, seed=0), latents(model, seed=1))
    seeds = [5 + k * 2**32 for k in range(4)] + [5 * 2**32, 2**63 + 5, 2**64 - 1]
    drawn = SeededNoise(LATENT, seeds)()
    for k in range(len(seeds)):
        for other in drawn[:k]:
            assert not near(drawn[k], other), "other bits of the seed draw another image"
    last = latents(model, n=2, seed=2**64 - 2, steps=1)
    assert near(latents(model, seed=2**64 - 1, steps=1)[0], last[1])


@pytest.mark.parametrize("seed", [2**64 - 1, 2**70, -1, True])
def test_other_seeds_are_refused(model: LatentDiffusion, seed: int) -> None:
    """The last image's seed counts too. Other types: tests/end_to_end/test_bad_input.py."""
    z = torch.zeros(2, *LATENT)
    words = re.escape(f"seed={seed!r}: expected a whole number from 0 to 2^64 - 2 for 2 images")
    acts: list[Callable[[], object]] = [
        lambda: model.plan(Request(n=2, seed=seed)),
        lambda: model.diffuse(z, 0.5, seed=seed),
        lambda: model.compress(torch.zeros(2, 1, 16, 16), seed=seed),
        lambda: vary(Request(n=2), seed=seed),
    ]
    for act in acts:
        with pytest.raises(UserError, match=words):
            act()


# ---- steps, sampler, guidance --------------------------------------------------------------------


def test_steps_are_network_calls(each: LatentDiffusion) -> None:
    for steps in (1, 4):
        with watched(each) as calls:
            latents(each, steps=steps, n=2)
        assert calls == [2] * steps
    assert not near(latents(each, steps=1), latents(each, steps=4))
    with watched(each) as calls:
        latents(each)
    assert len(calls) == each.defaults.steps


@pytest.mark.parametrize("steps", [0, -2])
def test_steps_must_be_positive(model: LatentDiffusion, steps: int) -> None:
    with pytest.raises(UserError, match=f"steps={steps}: expected a whole number of at least 1"):
        model.generate(steps=steps)


def test_samplers(each: LatentDiffusion) -> None:
    ddim, ddpm = (latents(each, sampler=name, seed=3) for name in ("ddim", "ddpm"))
    assert torch.equal(ddim, latents(each, seed=3)), "ddim is the default"
    assert not near(ddim, ddpm)
    assert torch.equal(ddpm, latents(each, sampler="ddpm", seed=3))
    one = [latents(each, sampler=name, steps=1, seed=3) for name in ("ddim", "ddpm")]
    assert near(*one), "with one step both return x0"
    with pytest.raises(UserError, match="unknown sampler 'dimm': did you mean 'ddim'"):
        each.generate(sampler="dimm")


def test_guidance_is_the_line_through_two_predictions(model: LatentDiffusion) -> None:
    """One step ends at the guided x0, which is reference + w (conditional - reference).

    w is at least 1: scales below it are off.
    """
    free, bag, boot = (
        model.predict(SeededNoise(LATENT, [7])(), 1.0, prompt).x0
        for prompt in (None, "bag", "ankle boot")
    )
    for weight in (0.0, 0.5, 1.0, 3.0):
        result = latents(model, "bag", steps=1, guidance=weight, seed=7)
        assert near(result, free + max(weight, 1) * (bag - free))
        if weight <= 1:
            assert torch.equal(result, latents(model, "bag", steps=1, guidance=1, seed=7))
        else:  # there is no moving away at 1 and below, and a negative prompt is refused
            result = latents(
                model, "bag", steps=1, guidance=weight, seed=7, negative_prompt="ankle boot"
            )
            assert near(result, boot + weight * (bag - boot))


@pytest.mark.parametrize(
    ("guidance", "sampler", "idle"),
    [
        ("3 interval:low=0.4,high=0.6", "ddim", True),  # of 1, 2/3 and 1/3
        ("3 interval:low=0.3,high=0.4", "ddim", False),
        ("3 interval:low=0.4,high=0.6", "heun", False),  # it might be called in between
        ("3 adaptive:low=90,high=99", "ddim", True),
        ("1 interval:low=0.4,high=0.6", "ddim", False),
        ("1 dual:second=2 condition condition", "ddim", False),
    ],
)
def test_guidance_that_never_acts_is_logged(
    model: LatentDiffusion,
    guidance: str,
    sampler: str,
    idle: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    latents(model, "bag", steps=3, guidance=guidance, sampler=sampler)
    text = f"guidance {Guidance.parse(guidance)} has no effect: its weight is 1 at all times"
    assert [text in record.message for record in caplog.records] == [True] * idle


def test_guidance_costs_a_second_pass_only_where_it_acts(model: LatentDiffusion) -> None:
    for options, size in (
        ({"guidance": 1.0}, 2),
        ({"guidance": 0.0}, 2),
        ({"guidance": 0.5, "negative_prompt": " "}, 2),
        ({"guidance": 2.0}, 4),
        ({"guidance": 2.0, "negative_prompt": "ankle boot"}, 4),
        ({"guidance": 2.0, "negative_prompt": "bag"}, 2),
    ):
        with watched(model) as calls:
            latents(model, "bag", n=2, steps=1, **options)
        assert calls == [size], options
    off = latents(model, "bag", guidance=1.0)
    assert torch.equal(off, latents(model, "bag", guidance=5.0, negative_prompt="bag"))
    assert torch.equal(latents(model, guidance=1.0), latents(model, guidance=5.0)), (
        "nothing guides an unconditional draw"
    )
    assert not near(off, latents(model, "bag", guidance=5.0))
    assert not near(latents(model, "bag"), latents(model, "bag", negative_prompt="ankle boot"))
    assert torch.equal(latents(model, "bag"), latents(model, "bag", negative_prompt=None))


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -0.5])
def test_guidance_must_be_a_number(model: LatentDiffusion, guidance: float) -> None:
    with pytest.raises(
        UserError, match=f"guidance={guidance}: expected a number of at least 0; 0 to 1 is off"
    ):
        model.generate(guidance=guidance)


# ---- height, width, timesteps, noise -------------------------------------------------------------


def test_sizes(each: LatentDiffusion) -> None:
    assert latents(each, height=24, width=10).shape == (1, 2, 12, 5)
    assert each.generate(height=24, width=10, steps=1)[0].size == (10, 24)
    assert each.generate(width=18, steps=1, output="tensor").shape == (1, 3, 16, 18)
    assert torch.equal(latents(each), latents(each, height=16, width=16))


@pytest.mark.parametrize("size", [{"width": 0}, {"height": 0}, {"width": -16}, {"width": 10**20}])
def test_sizes_that_are_not_possible(model: LatentDiffusion, size: dict[str, int]) -> None:
    with pytest.raises(
        UserError,
        match=r"(height|width)=-?\d+: expected a whole number of pixels from 1 to 1048576",
    ):
        model.generate(**size)


def test_any_size_is_cut_from_the_next_that_the_latent_covers(each: LatentDiffusion) -> None:
    whole = each.generate(height=16, width=18, steps=2, output="tensor")
    assert torch.equal(
        each.generate(height=15, width=17, steps=2, output="tensor"), whole[:, :, :15, :17]
    )
    assert each.generate(height=15, width=17, steps=1)[0].size == (17, 15)
    assert each.generate(height=1, width=1, steps=1)[0].size == (1, 1)
    image = whole[:, : each.autoencoder.channels].mul(2).sub(1)
    filled = torch.cat([image[:, :, :15], image[:, :, 14:15]], 2)
    assert torch.equal(each.compress(image[:, :, :15]), each.compress(filled)), "the edge goes on"


def test_ways_to_decode(model: LatentDiffusion) -> None:
    expected = model.generate("bag", height=31, width=17, steps=2, output="tensor")
    result = model.generate("bag", height=31, width=17, steps=2, output="tensor", decoding="exact")
    assert (result - expected).abs().max() < 1e-5
    assert model.generate("bag", steps=2, output="tensor", decoding="tiled").shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="unknown way to decode 'hole'"):
        model.generate("bag", decoding="hole")


def test_half_precision_that_overflows_is_decoded_again(
    model: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    """As SDXL's autoencoder does in float16: black pictures elsewhere (diffusers 4325), here that
    stage alone in float32.
    """
    wide = tiny_model(seed=1)
    with torch.no_grad():  # activations above 65504, where float16 ends, from weights below it
        weight = wide.autoencoder.decoder.conv_in.weight
        weight.mul_(6e4 / weight.abs().max())
    z = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    expected = wide.decode(z)[0]
    half = replace(wide, autoencoder=wide.autoencoder.half())
    with caplog.at_level("WARNING", logger="sfumato"):
        result = half.decode(z)[0]
    assert "decoding again in float32" in caplog.text
    assert half.autoencoder.dtype == torch.float16, "the model is left as it is"
    assert np.abs(np.asarray(result, dtype=int) - np.asarray(expected, dtype=int)).max() <= 3
    with pytest.raises(NumericalError):  # NaN in the latent is no overflow
        half.decode(z * float("nan"))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_timesteps_replace_steps(each: LatentDiffusion, sampler: str) -> None:
    times = each.times(4)
    assert times == [1.0, 0.75, 0.5, 0.25, 0.0]
    expected = latents(each, steps=4, sampler=sampler)
    for inputs in (times, tuple(times), torch.tensor(times, dtype=torch.float64).tolist()):
        assert torch.equal(expected, latents(each, timesteps=inputs, sampler=sampler, steps=99))
    assert not torch.equal(
        expected, latents(each, timesteps=[1.0, 0.6, 0.5, 0.25, 0.0], sampler=sampler)
    )


@pytest.mark.parametrize(
    "times",
    [
        [],
        [1.0],
        [0.0],
        [1.0, 1.0, 0.0],
        [0.5, 0.7, 0.0],
        [1.5, 0.0],
        [1.0, -0.1],
        [float("nan"), 0.0],
        [1.0, float("nan"), 0.0],
    ],
)
def test_timesteps_that_do_not_fall(model: LatentDiffusion, times: list[float]) -> None:
    with pytest.raises(
        UserError, match="expected at least two numbers in \\[0, 1\\] that fall strictly"
    ):
        model.generate(timesteps=times)


def test_a_run_that_ends_early_returns_the_noisy_latent_there(each: LatentDiffusion) -> None:
    seen: list[Step] = []
    latents(each, timesteps=[1.0, 0.7, 0.4, 0.0], seed=2, on_step=seen.append)
    assert torch.equal(latents(each, timesteps=[1.0, 0.7, 0.4], seed=2), seen[2].x)


def test_a_run_that_starts_late_is_scaled_to_its_time(each: LatentDiffusion) -> None:
    seen: list[Step] = []
    latents(each, timesteps=[0.5, 0.0], seed=2, on_step=seen.append)
    alpha, sigma = each.denoiser.process.schedule.at(0.5)
    assert near(seen[0].x, float(torch.hypot(alpha, sigma)) * SeededNoise(LATENT, [2])()), (
        "the variance of x_t of standardised latents"
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_run_visits_the_models_own_table(model: LatentDiffusion, spacing: str) -> None:
    """A table of 40 times: every spacing visits grid times of that table, and more steps than it
    has are refused.
    """
    process = Process(schedule("linear", steps=40), parameterization("v"))
    short = replace(
        model,
        denoiser=Denoiser(model.denoiser.network, process),
        defaults=replace(model.defaults, spacing=spacing),
    )
    times = torch.tensor(short.times(8), dtype=torch.float64)
    # the others place their times between the grid's
    if spacing in ("trailing", "uniform", "leading", "linspace", "lcm"):
        assert torch.allclose(times * 40, (times * 40).round()) and float(times[0]) >= 36 / 40
    assert process.schedule.timestep(times).min() >= 0
    assert len(short.times(40)) == 41
    with pytest.raises(
        UserError,
        match="steps=41: the model's noise table has 40 times, expected at most as many steps",
    ):
        short.generate(steps=41)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_noise_that_is_the_seeds_own_changes_nothing(each: LatentDiffusion, sampler: str) -> None:
    own = SeededNoise(LATENT, [4, 5])()
    assert torch.equal(
        latents(each, n=2, seed=4, sampler=sampler),
        latents(each, n=2, seed=4, sampler=sampler, noise=own),
    )
    assert torch.equal(own, SeededNoise(LATENT, [4, 5])()), "what the caller gave is left alone"
    assert not near(
        latents(each, n=2, seed=4, sampler=sampler),
        latents(each, n=2, seed=4, sampler=sampler, noise=own.flip(0)),
    )
    assert torch.equal(
        latents(each, n=2, seed=4, sampler=sampler, noise=own),
        latents(each, n=2, seed=4, sampler=sampler, noise=own.double()),
    )


def test_noise_of_another_shape_or_with_nan(model: LatentDiffusion) -> None:
    for noise in (
        torch.zeros(2, *LATENT),
        torch.zeros(1, 2, 8, 9),
        torch.full((1, *LATENT), float("nan")),
    ):
        with pytest.raises(
            UserError, match=r"noise of shape .* expected finite numbers of shape \(1, 2, 8, 8\)"
        ):
            model.generate(noise=noise)


# ---- watching and cancelling ---------------------------------------------------------------------


def test_on_step_sees_the_run(each: LatentDiffusion) -> None:
    seen: list[Step] = []
    z = latents(each, n=2, steps=4, on_step=seen.append)
    assert [(s.index, s.count, s.t) for s in seen] == [
        (0, 4, 1.0),
        (1, 4, 0.75),
        (2, 4, 0.5),
        (3, 4, 0.25),
    ]
    assert all(s.x.shape == s.prediction.x0.shape == (2, *LATENT) for s in seen)
    assert torch.equal(z, seen[-1].prediction.x0), "the last step of DDIM goes to x0"
    schedule = each.denoiser.process.schedule
    for now, then in zip(seen, [*seen[1:], None], strict=True):
        if then is not None:
            alpha, sigma = (float(v) for v in schedule.at(then.t))
            assert near(then.x, alpha * now.prediction.x0 + sigma * now.prediction.eps)


def test_previews_are_pictures(each: LatentDiffusion) -> None:
    pixels = each.generate(n=3, output="tensor")[:, : each.autoencoder.channels] * 2 - 1
    preview = Preview.fit(each.compress(pixels), pixels)
    shown: list[Image.Image] = []

    def on_step(step: Step) -> None:
        shown.extend(to_pil(preview(step.prediction.x0)))
        shown.extend(each.decode(step.prediction.x0))

    again = latents(each, steps=2, on_step=on_step)
    assert [p.size for p in shown] == [(8, 8), (16, 16)] * 2
    assert torch.equal(again, latents(each, steps=2)), "looking changes nothing"


def test_a_run_is_cancelled_by_false_only(model: LatentDiffusion) -> None:
    for output, empty in (("latent", (0, *LATENT)), ("tensor", (0, 3, 16, 16))):
        with watched(model) as calls:
            result = model.generate(
                n=2, steps=5, output=output, on_step=lambda step: step.index < 1
            )
        assert result.shape == empty and len(calls) == 2
    assert model.generate(steps=5, on_step=lambda step: False) == []
    with watched(model) as calls:
        assert len(model.generate(steps=3, on_step=lambda step: None)) == 1
    assert len(calls) == 3


def test_an_error_of_the_watcher_is_its_own(model: LatentDiffusion) -> None:
    def on_step(step: Step) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(on_step=on_step)


# ---- the acts one by one -------------------------------------------------------------------------


def test_compress_takes_pictures_lists_and_tensors(each: LatentDiffusion) -> None:
    pictures = each.generate(n=3, seed=1)
    pixels = to_tensor(pictures)
    z = each.compress(pixels)
    assert z.shape == (3, *LATENT) and z.dtype == torch.float32
    assert torch.equal(z, each.compress(pictures)) and torch.equal(
        z, each.compress(tuple(pictures))
    )
    assert near(each.compress(pictures[1]), z[1:2])
    assert [p.size for p in each.decode(z)] == [(16, 16)] * 3
    posterior = each.autoencoder.posterior(pixels)
    assert near(z, each.autoencoder.space.standardise(posterior.mean))
    drawn = each.compress(pixels, seed=3)
    assert near(
        drawn,
        each.autoencoder.space.standardise(posterior.sample(SeededNoise(LATENT, [3, 4, 5])())),
    )
    assert near(each.compress(pixels[2:], seed=5), drawn[2:])


def test_compress_turns_colour_to_grey_and_back(models: dict[str, LatentDiffusion]) -> None:
    """By luma (ITU-R 601), as Pillow does when it reads training pictures."""
    grey, colour = models["flow-grey-classes"], models["flow-colour"]
    random = torch.Generator().manual_seed(0)
    picture = to_pil(torch.rand(1, 3, 16, 16, generator=random) * 2 - 1)[0]
    exact = to_tensor(picture.convert("L"))
    luma = (to_tensor(picture) * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(
        1, keepdim=True
    )
    assert (luma - exact).abs().max() <= 1.01 / 255
    assert near(grey.compress(picture), grey.compress(luma))
    assert torch.equal(
        colour.compress(picture.convert("L")), colour.compress(exact.expand(-1, 3, -1, -1))
    )


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(1, 2, 16, 16), r"\(1, 2, 16, 16\).*1 channels"),
        (torch.full((1, 1, 16, 16), 255.0), r"pixels from 255 to 255: expected \[-1, 1\]"),
        (torch.full((1, 1, 16, 16), float("nan")), "pixels from nan"),
        (torch.zeros(0, 1, 16, 16), r"\(0, 1, 16, 16\)"),
    ],
)
def test_compress_refuses(model: LatentDiffusion, pixels: Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.compress(pixels)


def test_diffuse_has_two_ends(each: LatentDiffusion) -> None:
    z = SeededNoise(LATENT, [20, 21])()
    eps = SeededNoise(LATENT, [4, 5])()
    assert torch.equal(each.diffuse(z, 0.0, seed=4), z)
    noise = each.diffuse(z, 1.0, seed=4)
    assert (
        torch.equal(noise, eps)
        if getattr(each.denoiser.process.schedule, "kind", "") == "flow"
        else (noise - eps).abs().max() < 0.3
    )
    alpha, sigma = (float(v) for v in each.denoiser.process.schedule.at(0.3))
    assert near(each.diffuse(z, 0.3, seed=4), alpha * z + sigma * eps)
    assert near(each.diffuse(z[1:], 0.3, seed=5), each.diffuse(z, 0.3, seed=4)[1:])
    assert not near(each.diffuse(z, 0.3, seed=4), each.diffuse(z, 0.3))


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_times_outside_the_process(model: LatentDiffusion, t: float) -> None:
    with pytest.raises(UserError, match=f"t={t}: expected a time in "):
        model.diffuse(torch.zeros(1, *LATENT), t)
    with pytest.raises(UserError, match=f"t={t}: expected a time in "):
        model.predict(torch.zeros(1, *LATENT), t)
    with pytest.raises(UserError, match="t=0: expected a time in "):
        model.predict(torch.zeros(1, *LATENT), 0)


def test_predict_is_the_denoiser(each: LatentDiffusion) -> None:
    x = SeededNoise(LATENT, [1, 2])()
    prompts = ["bag", "ankle boot"] if each.class_names else [None, None]
    result = each.predict(x, 0.6, prompts)
    expected = each.denoiser(x, 0.6, each.conditioner(prompts))
    assert torch.equal(result.x0, expected.x0) and torch.equal(result.eps, expected.eps)
    assert torch.equal(each.predict(x, 0.6, each.conditioner(prompts)).x0, expected.x0)
    assert torch.equal(
        each.predict(x, 0.6, prompts[0]).x0, each.predict(x, 0.6, [prompts[0]] * 2).x0
    )
    alpha, sigma = (float(v) for v in each.denoiser.process.schedule.at(0.6))
    assert near(alpha * result.x0 + sigma * result.eps, x)


def test_the_acts_by_hand_are_generate(model: LatentDiffusion) -> None:
    x = SeededNoise(LATENT, [9])()
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        result = model.predict(x, t, "bag")
        x = (1 - s) * result.x0 + s * result.eps
    assert near(x, latents(model, "bag", steps=2, guidance=1.0, seed=9))
    assert (
        np.abs(
            np.asarray(model.decode(x)[0], int)
            - np.asarray(model.generate("bag", steps=2, guidance=1.0, seed=9)[0], int)
        ).max()
        <= 1
    )


def test_latents_of_another_space(model: LatentDiffusion) -> None:
    wrong = torch.zeros(1, 3, 8, 8)
    acts: list[Callable[[], object]] = [
        lambda: model.decode(wrong),
        lambda: model.predict(wrong, 0.5),
        lambda: model.diffuse(wrong, 0.5),
    ]
    for act in acts:
        with pytest.raises(
            UserError, match=r"latent is .* \(1, 3, 8, 8\): expected .* \(B, 2, h, w\)"
        ):
            act()


# ---- one model, its parts and its hash -----------------------------------------------------------


def with_weight(model: LatentDiffusion, part: str) -> LatentDiffusion:
    """The same model with the last number of one part's weights changed by the smallest step."""
    other = model.to("cpu")
    module = other.autoencoder if part == "autoencoder" else other.denoiser.network
    last = list(module.parameters())[-1].data.view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(10.0))
    return other


def test_the_hash_covers_all_that_changes_an_image(
    model: LatentDiffusion, models: dict[str, LatentDiffusion]
) -> None:
    assert len(model.hash) == 64 and model.hash == tiny_model().hash == model.to("cpu").hash
    assert (
        replace(model, name="other").hash
        == replace(model, defaults=Defaults(steps=7)).hash
        == model.hash
    )
    model.generate("bag")
    assert tiny_model().hash == model.hash, "running changes nothing"
    statistics = model.to("cpu")
    statistics.autoencoder.set_statistics((0.1, -0.2), (0.5, 0.71))  # pyright: ignore
    process = replace(
        model,
        denoiser=replace(model.denoiser, process=models["eps-colour-classes"].denoiser.process),
    )
    names = replace(model, conditioner=ClassNames(("bag", "ankle boot", "t-shirt/top")))
    others = [
        with_weight(model, "autoencoder"),
        with_weight(model, "denoiser"),
        statistics,
        process,
        names,
        tiny_model(seed=1),
    ]
    assert len({m.hash for m in (model, *others)}) == 7


def test_a_model_cannot_be_changed_in_place(model: LatentDiffusion) -> None:
    with pytest.raises(FrozenInstanceError):
        model.name = "x"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        model.defaults.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_are_those_of_the_model(model: LatentDiffusion) -> None:
    chosen = {
        "n": 1,
        "steps": 3,
        "sampler": "ddim",
        "guidance": 2.0,
        "height": 16,
        "width": 16,
        "spacing": "trailing",
    }
    assert model.settings() == chosen
    other = replace(
        model, defaults=Defaults(steps=2, sampler="ddpm", guidance=1.0, spacing="linspace")
    )
    assert other.settings() == {
        **chosen,
        "steps": 2,
        "sampler": "ddpm",
        "guidance": 1.0,
        "spacing": "linspace",
    }
    assert torch.equal(
        latents(other, "bag"),
        latents(model, "bag", sampler="ddpm", guidance=1.0, timesteps=other.times(2)),
    )
    tuned = replace(
        model,
        defaults=Defaults(
            steps=2, tuned_timesteps={"ddim": [[1.0, 0.4, 0.0]], "heun": [[1.0, 0.8, 0.5, 0.0]]}
        ),
    )
    assert tuned.times() == [1.0, 0.4, 0.0] and tuned.settings()["spacing"] == "tuned"
    assert (
        tuned.times(3) == model.times(3)
        and tuned.times(3, "heun") == [1.0, 0.8, 0.5, 0.0]
        and tuned.times(spacing="trailing") == model.times(2)
    )
    assert torch.equal(latents(tuned, "bag"), latents(tuned, "bag", timesteps=[1.0, 0.4, 0.0]))
    assert not torch.equal(latents(tuned, "bag"), latents(tuned, "bag", spacing="trailing"))
    with pytest.raises(
        UserError,
        match="'tuned' for ddim in 4 steps: this model has tuned times for ddim in 2 steps, heun "
        "in 3 steps",
    ):
        tuned.times(4, spacing="tuned")
    with pytest.raises(UserError, match="fall strictly"):
        Defaults(tuned_timesteps={"ddim": [[0.4, 1.0]]})
    with pytest.raises(
        UserError, match="unknown timestep spacing 'trailin': did you mean 'trailing'"
    ):
        Defaults(spacing="trailin")


def test_describe_counts(model: LatentDiffusion) -> None:
    facts = model.describe()
    assert facts["parts"]["denoiser"]["parameters"] == sum(
        p.numel() for p in model.denoiser.network.parameters()
    )
    assert facts["latent"] == {"channels": 2, "factor": 2, "mean": [0.1, -0.2], "std": [0.5, 0.7]}
    assert facts["process"] == {"schedule": "flow", "parameterization": "flow"}
    assert facts["class_names"] == list(CLASSES) and facts["hash"] == model.hash


def test_devices(model: LatentDiffusion, tmp_path: Path) -> None:
    other = model.to("cpu")
    next(iter(other.denoiser.network.parameters())).data.fill_(0)
    assert other.hash != tiny_model().hash == replace(model).hash, "a copy"
    for device in ("toaster", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
            model.to(device)
    model.save(tmp_path / "m")
    with pytest.raises(UserError, match="device 'toaster' cannot be used"):
        sfumato.load(tmp_path / "m", device="toaster")


# ---- saving and loading --------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_loaded_model_makes_the_same_images_bit_for_bit(
    each: LatentDiffusion, tmp_path: Path
) -> None:
    each.save(tmp_path / "m")
    loaded = sfumato.load(tmp_path / "m")
    prompt = "bag" if each.class_names else None
    assert torch.equal(
        loaded.generate(prompt, n=3, seed=8, output="tensor"),
        each.generate(prompt, n=3, seed=8, output="tensor"),
    )
    assert loaded.hash == each.hash
    assert (loaded.name, loaded.defaults, loaded.class_names) == (
        each.name,
        each.defaults,
        each.class_names,
    )
    pixels = torch.rand(1, each.autoencoder.channels, 16, 16) * 2 - 1
    assert torch.equal(loaded.compress(pixels), each.compress(pixels))
    loaded.save(tmp_path / "n")
    assert contents(tmp_path / "m") == contents(tmp_path / "n"), (
        "saving what was loaded gives the same files"
    )


def test_a_model_in_one_file_is_the_same_model(each: LatentDiffusion, tmp_path: Path) -> None:
    each.save(tmp_path / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    loaded = sfumato.load(tmp_path / "m.safetensors")
    assert (loaded.hash, loaded.name, loaded.defaults) == (each.hash, each.name, each.defaults)
    assert torch.equal(latents(loaded, n=2, seed=8), latents(each, n=2, seed=8))
    each.save(tmp_path / "m.safetensors", dtype=torch.float16)
    assert sfumato.load(tmp_path / "m.safetensors").hash != each.hash


def test_half_precision_on_disk_is_rounded_weights(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save(tmp_path / "half", dtype=torch.float16)
    model.save(tmp_path / "full")
    assert (tmp_path / "half" / UNET).stat().st_size < 0.7 * (
        tmp_path / "full" / UNET
    ).stat().st_size
    assert all(v.dtype == torch.float16 for v in read_tensors(tmp_path / "half" / UNET).values())
    rounded = model.to("cpu")
    for module in (rounded.autoencoder, rounded.denoiser.network):
        for parameter in module.parameters():
            parameter.data = parameter.half().float()
    loaded = sfumato.load(tmp_path / "half")
    assert loaded.hash == rounded.hash != model.hash
    assert torch.equal(latents(loaded, "bag", n=2), latents(rounded, "bag", n=2))
    assert next(model.denoiser.network.parameters()).dtype == torch.float32, (
        "the model itself is left as it was"
    )


def test_weights_that_float16_cannot_hold_are_refused(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    model.save(tmp_path / "m")
    before = contents(tmp_path / "m")
    large = model.to("cpu")
    large.denoiser.network.conv_in.weight.data.view(-1)[0] = 1e5  # pyright: ignore
    with pytest.raises(
        NumericalError, match=r"conv_in\.weight is NaN or infinite in float16: nothing was written"
    ):
        large.save(tmp_path / "m", dtype=torch.float16)
    assert contents(tmp_path / "m") == before
    with pytest.raises(UserError, match=r"dtype torch\.int8"):
        model.save(tmp_path / "m", dtype=torch.int8)
    large.save(tmp_path / "m", dtype=torch.bfloat16)
    assert sfumato.load(tmp_path / "m").hash != model.hash


def test_saving_over_a_model_replaces_all_of_it(
    model: LatentDiffusion, models: dict[str, LatentDiffusion], tmp_path: Path
) -> None:
    target = tmp_path / "m"
    models["eps-colour-classes"].save(target)
    loaded = sfumato.load(target)
    model.save(target)
    assert sfumato.load(target).hash == model.hash
    assert loaded.hash == models["eps-colour-classes"].hash, (
        "the old weights stay readable for who has them"
    )
    sfumato.load(target).save(target)  # a model onto the folder that it was read from
    assert sfumato.load(target).hash == model.hash
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("failing", ["vae", "unet", "model_index.json"])
def test_a_full_disk_loses_nothing(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The disk fills up in the middle of a file, at each place where files are written."""
    target = tmp_path / "m"
    model.save(target)
    before = contents(target)
    write, write_json = folders.write_file, folders.write_json

    def full(writer: Callable[..., None]) -> Callable[..., None]:
        def wrapped(path: Path, *arguments: Any, **options: Any) -> None:
            if failing in str(path):
                path.with_name(f".{path.name}.part").write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            writer(path, *arguments, **options)

        return wrapped

    monkeypatch.setattr(folders, "write_file", full(write))
    monkeypatch.setattr("sfumato.saving.write_json", full(write_json))
    with pytest.raises(
        UserError, match=r"could not write .*No space left on device; what was there is unchanged"
    ):
        tiny_model(seed=1).save(target)
    assert contents(target) == before
    assert sfumato.load(target).hash == model.hash
    with pytest.raises(UserError, match="No space left on device"):
        model.save(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "and leaves nothing behind"


def test_saving_leaves_other_folders_and_files_alone(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    monkeypatch.chdir(thesis.parent)
    for target in (thesis.parent, thesis, Path(), Path("../documents")):
        with pytest.raises(
            UserError, match="exists and is not a model folder: it is left as it is"
        ):
            model.save(target)
    assert contents(tmp_path) == {"documents/thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    model.save(tmp_path / "link", dtype=torch.float16)
    assert (tmp_path / "link").is_symlink() and sfumato.load(tmp_path / "empty").hash != model.hash
    model.save(tmp_path / "new" / "folders" / "m")
    assert sfumato.load(tmp_path / "new" / "folders" / "m").hash == model.hash


def test_an_unknown_name_lists_the_bundled_models() -> None:
    from sfumato.loading import bundled

    with pytest.raises(UserError) as caught:
        sfumato.load("nope")
    message = str(caught.value)
    assert "model 'nope' was not found" in message and "owner/name" in message
    assert f"({', '.join(bundled()) or 'none'})" in message


# ---- class names ---------------------------------------------------------------------------------

FASHION = ClassNames(
    ("T-shirt/top", "Trouser", "Dress", "Sandal", "Bag", "Ankle boot", "running_shoe")
)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Ankle boot", "Ankle boot"),
        ("  ankle   BOOTS ", "Ankle boot"),
        ("ankle-boot", "Ankle boot"),
        ("t-shirt", "T-shirt/top"),
        ("T shirts", "T-shirt/top"),
        ("top", "T-shirt/top"),
        ("T-Shirt / Top", "T-shirt/top"),
        ("trousers", "Trouser"),
        ("dress", "Dress"),
        ("dresses", "Dress"),
        ("running shoes", "running_shoe"),
    ],
)
def test_names_are_listed(prompt: str, name: str) -> None:
    assert FASHION.names[FASHION.label(prompt)] == name


@pytest.mark.parametrize(
    ("prompt", "near_match"),
    [
        ("ankel boot", "Ankle boot"),
        ("tousers", "Trouser"),
        ("tshirt", "T-shirt/top"),
        ("sandle", "Sandal"),
    ],
)
def test_near_names_are_offered(prompt: str, near_match: str) -> None:
    with pytest.raises(UserError, match=f"unknown class '{prompt}': did you mean .*'{near_match}'"):
        FASHION.label(prompt)


def test_a_name_that_is_like_none_lists_all() -> None:
    with pytest.raises(UserError) as caught:
        FASHION.label("quux")
    assert all(name in str(caught.value) for name in FASHION.names)


def test_whole_names_come_before_parts_and_ambiguity_is_refused() -> None:
    names = ClassNames(("coat/jacket", "jacket", "rain jacket/coat", "Boot", "boot", "bags"))
    assert [
        names.label(p) for p in ("jacket", "Jackets", "rain jacket", "Boot", "boot", "bag")
    ] == [1, 1, 2, 3, 4, 5]
    with pytest.raises(
        UserError, match="class 'coat' is ambiguous: write 'coat/jacket' or 'rain jacket/coat'"
    ):
        names.label("coat")
    with pytest.raises(UserError, match="class 'BOOT' is ambiguous: write 'Boot' or 'boot'"):
        names.label("BOOT")


def test_names_become_rows() -> None:
    rows = FASHION(["Bag", None, "", "top"]).vector
    assert (
        rows is not None
        and rows.argmax(1).tolist() == [4, 7, 7, 0]
        and torch.equal(rows.sum(1), torch.ones(4))
    )
    from_data = FASHION.from_labels(torch.tensor([4, -1, 7, 0])).vector
    assert from_data is not None and torch.equal(from_data, rows)
    assert ClassNames.from_config(FASHION.to_config()) == FASHION
    with pytest.raises(UserError, match="label 8: expected 0 to 6"):
        FASHION.from_labels(torch.tensor([8]))
    for bad in ((), ("bag", "bag"), ("bag", " ")):
        with pytest.raises(UserError, match="class names"):
            ClassNames(bad)


def test_prompts_to_models_that_have_none(models: dict[str, LatentDiffusion]) -> None:
    with pytest.raises(UserError, match="prompt 'bag': this model is unconditional"):
        models["flow-colour"].generate("bag")
    with pytest.raises(UserError, match="prompt 'bag': this model is unconditional"):
        models["flow-colour"].generate(negative_prompt="bag")
    assert Unconditional.from_config(Unconditional().to_config()) == Unconditional()


# ---- numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("part", ["vae", "unet"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_when_read(
    model: LatentDiffusion, tmp_path: Path, part: str, value: float
) -> None:
    model.save(tmp_path / "m")
    file = tmp_path / "m" / part / folders.WEIGHTS
    tensors = {k: v.clone() for k, v in read_tensors(file).items()}
    key = sorted(tensors)[len(tensors) // 2]
    tensors[key].view(-1)[-1] = value
    write_tensors(file, tensors)
    with pytest.raises(UserError, match=f"{file}: {key} has NaN or infinite numbers"):
        sfumato.load(tmp_path / "m")


@contextmanager
def broken_at(network: torch.nn.Module, call: int, value: float) -> Iterator[None]:
    """One number of the network's output in its call number `call` becomes `value`."""
    count = 0

    def hook(module: object, inputs: object, result: Tensor) -> Tensor | None:
        nonlocal count
        count += 1
        if count != call:
            return None
        broken = result.clone()
        broken[-1, 0, 0, 0] = value
        return broken

    handle = network.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("step", "t"), [(1, "1"), (3, "0.5"), (4, "0.25")])
def test_the_network_breaks_at_a_step(
    each: LatentDiffusion, step: int, t: str, value: float
) -> None:
    seen: list[Step] = []
    with (
        broken_at(each.denoiser.network, step, value),
        pytest.raises(
            NumericalError, match=rf"NaN or infinite in step {step} of 4 \(t = {t}\) \(float32\)"
        ),
    ):
        each.generate(n=2, steps=4, on_step=seen.append)
    assert len(seen) == step - 1, "the broken step is not shown"


def test_the_message_names_the_networks_own_dtype(model: LatentDiffusion) -> None:
    low = model.to("cpu")
    low.denoiser.network.to(torch.bfloat16)
    assert latents(low, "bag").isfinite().all()
    with (
        broken_at(low.denoiser.network, 2, float("nan")),
        pytest.raises(NumericalError, match=r"step 2 of 3.*the network ran in bfloat16"),
    ):
        low.generate("bag")


def test_the_decoder_breaks(model: LatentDiffusion) -> None:
    other = model.to("cpu")
    other.autoencoder.decoder.conv_out.bias.data.fill_(float("nan"))  # pyright: ignore
    z = torch.zeros(1, *LATENT)
    acts: list[Callable[[], object]] = [
        lambda: other.decode(z),
        other.generate,
        lambda: other.generate(output="tensor"),
    ]
    for act in acts:
        with pytest.raises(NumericalError, match=r"after decode \(float32\): nothing was written"):
            act()
    assert latents(other).isfinite().all(), "the latent is sound"
    with pytest.raises(NumericalError, match="after decode"):
        model.decode(torch.full((1, *LATENT), float("nan")))
    # tried again in float32, where it is no better
    with pytest.raises(NumericalError, match=r"after decode \(float32\)"):
        other.decode(z)


def test_the_encoder_breaks(model: LatentDiffusion) -> None:
    other = model.to("cpu")
    other.autoencoder.encoder.conv_out.bias.data.fill_(float("inf"))  # pyright: ignore
    with pytest.raises(NumericalError, match=r"compress.*float32"):
        other.compress(torch.zeros(1, 1, 16, 16))


# ---- many requests in shared passes --------------------------------------------------------------

MIXED = [
    Request("bag", seed=3),
    Request(
        "ankle boot",
        n=3,
        steps=5,
        sampler="dpmpp_2m",
        spacing="karras:rho=5",
        guidance=4.0,
        seed=11,
    ),
    Request(None, n=2, steps=2, sampler="heun", seed=1),
    Request(
        ["bag", "t-shirt/top"],
        sampler="dpmpp_sde",
        guidance=1.5,
        seed=7,
        negative_prompt="ankle boot",
    ),
    Request("bag", steps=4, sampler="ddim:eta=0.7", height=32, width=16, seed=2),
    Request("bag", timesteps=[1.0, 0.6, 0.2], seed=5),
]


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_many_requests_get_the_images_of_each_alone(
    model: LatentDiffusion, rows: int | None
) -> None:
    """Different steps, samplers, spacings, guidance, seeds, sizes: bit for bit, in fewer forward
    passes.
    """
    network = model.denoiser.network
    calls: list[int] = []
    hook = network.register_forward_hook(lambda module, inputs, y: calls.append(len(y)))
    try:
        requests = [
            {f.name: getattr(r, f.name) for f in fields(r) if getattr(r, f.name) != f.default}
            for r in MIXED
        ]
        alone = [model.generate(output="latent", **values) for values in requests]
        separate = calls.copy()
        calls.clear()
        together = model.run_many(MIXED, output="latent", batch=rows)
    finally:
        hook.remove()
    for one, result in zip(alone, together, strict=True):
        assert torch.equal(one, result)
    assert sum(calls) == sum(separate)  # no row is evaluated twice
    assert max(calls) <= rows if rows else len(calls) < len(separate) / 2


def test_a_cancelled_request_leaves_the_others_alone(model: LatentDiffusion) -> None:
    seen: list[tuple[int, int, int]] = []

    def watch(k: int, step: Step) -> bool:
        seen.append((k, step.index, step.count))
        return not (k == 1 and step.index == 1)

    result = model.run_many(MIXED[:3], output="latent", on_step=watch)
    assert result[1].shape == (0, *LATENT) and torch.equal(
        result[0], model.run_many(MIXED[:1], output="latent")[0]
    )
    assert [s for s in seen if s[0] == 1] == [(1, 0, 5), (1, 1, 5)]
    # Heun evaluates twice a step, and once for the last
    assert [s[1:] for s in seen if s[0] == 2] == [(i, 3) for i in range(3)]
    assert model.run_many([]) == [] and isinstance(
        model.run_many([{"prompt": "bag"}])[0][0], Image.Image
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"promt": "bag"}, "unknown field of a request 'promt': did you mean .*'prompt'"),
        ({"sampler": "ddim:ata=1"}, "unknown option of sampler ddim 'ata': did you mean 'eta'"),
        ({"sampler": "ddim:eta=much"}, "sampler ddim:eta='much': expected a number"),
        ({"sampler": "ddim:eta"}, "found 'eta'"),
        ({"sampler": "ddim_inversion"}, "goes from an image to noise"),
        ({"spacing": "karras:row=3"}, "unknown option of spacing karras 'row': did you mean 'rho'"),
        ({"spacing": "tuned"}, "this model has tuned times for none"),
    ],
)
def test_impossible_requests_are_refused(model: LatentDiffusion, values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.run_many([{"prompt": "bag"}, values])


def test_inversion_finds_the_noise_that_makes_the_image_again(fashion: LatentDiffusion) -> None:
    z = latents(fashion, "dress", steps=12, guidance=1.0, seed=5)
    errors = []
    for iterations in (1, 5, 15):
        noise = fashion.invert(z, "dress", steps=12, iterations=iterations)
        again = latents(fashion, "dress", noise=noise, steps=12, guidance=1.0)
        errors.append(float((again - z).norm() / z.norm()))
    assert errors[2] < 0.01 and errors[1] < errors[0] / 5, errors


@pytest.mark.parametrize("combine", names("predict.guidance.rules"))
@pytest.mark.parametrize("weight", names("predict.guidance.weights"))
def test_guided_images_do_not_depend_on_their_batch(
    model: LatentDiffusion, combine: str, weight: str
) -> None:
    """An image without a condition is not guided, beside guided ones as alone.

    CFG-Zero*, for example, does not hold it.
    """
    guidance = {
        "scale": 2.0,
        "weight": weight,
        "combine": combine,
        "reference": ["condition"] * (2 if combine == "dual" else 1),
    }
    if combine == "plus_plus" and weight != "constant":
        pytest.skip("refused: 1 is full guidance there")
    together = latents(model, [None, "bag"], seed=3, guidance=guidance)
    assert torch.equal(together[:1], latents(model, None, seed=3, guidance=guidance))
    assert torch.equal(together[1:], latents(model, "bag", seed=4, guidance=guidance))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"guidance": "2 project:momentum=-0.5", "tiles": (8, 4)},
            "its momentum would pass from window to window",
        ),
        ({"cache": ()}, "every=.*: expected a whole number"),
        (
            {"known_region": (torch.zeros(LATENT), torch.zeros(LATENT))},
            r"known_region: expected \(z, mask\)",
        ),
        (
            {"guidance": "2 model", "guide_model": tiny_model(classes=("bag", "hat"))},
            "has 3 classes .* the model 4: expected one",
        ),
        (
            {"guidance": "2 model", "guide_model": tiny_model(classes=())},
            "has no classes .* the model 4: expected one",
        ),
        ({"negative_prompt": "ankle boot", "guidance": 1.0}, "nothing is moved away from it"),
        ({"tiles": (8, 0)}, r"tiles=\(8, 0\): expected \(size, stride\)"),
        ({"sampler": "restart:rho=0.0"}, "rho=0.0"),
        ({"sampler": "lms:order=2.5"}, "lms:order='2.5': expected a whole number"),
        ({"sampler": "ddim:eta=true"}, "ddim:eta='true': expected a number"),
        ({"sampler": "edm:churn_from=nan"}, "edm:churn_from='nan': expected a number"),
        ({"sampler": "ddim:eta=0.5,eta=0.7"}, "gives eta twice"),
    ],
)
def test_settings_that_would_be_silently_wrong_are_refused(
    model: LatentDiffusion, values: dict, words: str
) -> None:
    # a mapping, as from JSON: no type checker stands before it
    with pytest.raises(UserError, match=words):
        model.run_many([{"prompt": "bag", **values}])


def test_tuned_times_match_every_spelling_of_the_sampler(model: LatentDiffusion) -> None:
    tuned = replace(model, defaults=Defaults(tuned_timesteps={"ddim": [[1.0, 0.4, 0.0]]}))
    assert (
        tuned.times(2, "ddim:eta=0")
        == tuned.times(2, "ddim:eta=0.0")
        == [1.0, 0.4, 0.0]
        != tuned.times(2, "ddim:eta=0.5")
    )
    # times are a default: the same request with its own times draws the same picture
    assert tuned.hash == model.hash


@pytest.mark.parametrize(
    "process",
    [
        Process(schedule("vp"), parameterization("v")),
        Process(schedule("ve", sigma_max=30.0), parameterization("eps")),
        Process(schedule("edm"), edm(0.7)),
        Process(
            Shifted(ZeroTerminalSNR(schedule("scaled_linear", steps=30)), 2.0),
            parameterization("x0"),
        ),
        Process(schedule("cosine", steps=20), parameterization("edm")),
    ],
)
def test_processes_without_a_name_in_the_ecosystem_are_saved_all_the_same(
    model: LatentDiffusion, process: Process, tmp_path: Path
) -> None:
    made = replace(model, denoiser=Denoiser(model.denoiser.network, process))
    made.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.denoiser.process == process and again.hash == made.hash
    assert torch.equal(latents(made, "bag", seed=1), latents(again, "bag", seed=1))
