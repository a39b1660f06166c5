"""Interpolation: noise on the arc, conditions on the line.

Series and variations are made of them.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import tiny_model
from sfumato.diffuse.run import SeededNoise
from sfumato.diffuse.slerp import SlerpNoise, slerp
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners import interpolate_conditioning
from sfumato.sampling import Plan
from sfumato.sampling.request import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.interpolate import interpolate, interpolate_images
from sfumato.tasks.refine import handover, refine
from sfumato.tasks.variations import variations, vary
from sfumato.types import Conditioning

MODELS: dict[str, LatentDiffusion] = {kind: tiny_model(kind) for kind in ("v", "flow")}
every = pytest.mark.parametrize("kind", MODELS)
SHAPE = (4, 32, 32)
PICTURES = [
    torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (1, 2)
]


def latents(model: LatentDiffusion, request: Request | Plan) -> Tensor:
    return model.run(request, output="latent")


# ---- noise ---------------------------------------------------------------------------------------


def test_the_arc_is_as_long_and_even() -> None:
    """Noise stays noise: variance 1 and no kurtosis all along, where the straight line has half the
    variance in the middle.
    """
    a, b = (SeededNoise(SHAPE, [seed])() for seed in (3, 4))
    shares = [k / 8 for k in range(9)]
    way = slerp(a.expand(9, -1, -1, -1), b.expand(9, -1, -1, -1), shares)
    assert torch.equal(way[0], a[0]) and torch.equal(way[-1], b[0]), "to the last bit"
    assert ((way.square().mean((1, 2, 3)) - 1).abs() < 0.05).all()
    assert ((way.pow(4).mean((1, 2, 3)) - 3).abs() < 0.4).all()
    assert float(((a + b) / 2).square().mean()) < 0.6, "what the straight line would be"
    steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    assert steps.max() / steps.min() < 1.02, "the same speed everywhere"
    away = (way - a).flatten(1).norm(dim=1)
    assert (away[1:] > away[:-1]).all()


def test_the_arc_between_exact_vectors() -> None:
    a, b = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    a[..., 0], b[..., 1] = 2.0, 2.0
    result = slerp(a, b, [1 / 3]).flatten()
    assert torch.allclose(result, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.equal(slerp(a, a, [0.3]), a) and torch.allclose(slerp(a, 3 * a, [0.5]), 2 * a), (
        "no angle: the straight line"
    )
    assert (
        torch.isfinite(slerp(a, -a, [0.3])).all() and torch.isfinite(slerp(0 * a, b, [0.3])).all()
    )


def test_every_draw_is_blended_and_no_image_depends_on_its_neighbours() -> None:
    def source(first: list[int], second: list[int], shares: list[float]) -> SlerpNoise:
        return SlerpNoise(SeededNoise(SHAPE, first), SeededNoise(SHAPE, second), shares)

    together, alone = source([5, 5, 5], [6, 7, 8], [0.0, 0.4, 1.0]), source([5], [7], [0.4])
    ends = SeededNoise(SHAPE, [5, 8])
    for _ in range(3):
        draw, end = together(), ends()
        assert torch.equal(draw[1], alone()[0]) and torch.equal(draw[[0, 2]], end)


# ---- conditions ----------------------------------------------------------------------------------


def attended(tokens: Tensor) -> Tensor:
    """Attention of some queries over tokens (B, L, D), which are keys and values."""
    queries = torch.randn(1, 5, tokens.shape[2], generator=torch.Generator().manual_seed(9))
    return (queries @ tokens.mT).softmax(-1) @ tokens


def test_conditions_between_two() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (
        Conditioning(
            tokens=torch.randn(1, 6, 4, generator=draw), vector=torch.randn(1, 3, generator=draw)
        )
        for _ in range(2)
    )
    three = [
        Conditioning(tokens=c.tokens.expand(3, -1, -1), vector=c.vector.expand(3, -1))
        for c in (a, b)
    ]  # pyright: ignore
    result = interpolate_conditioning(three[0], three[1], [0.0, 0.25, 1.0])
    for door in ("tokens", "vector"):
        middle, first, last = (getattr(c, door) for c in (result, a, b))
        assert torch.equal(middle[0], first[0]) and torch.equal(middle[2], last[0])
        assert torch.allclose(middle[1], 0.75 * first[0] + 0.25 * last[0], atol=1e-6)
    same = interpolate_conditioning(a, a, [0.3])
    assert torch.equal(same.tokens, a.tokens) and torch.equal(same.vector, a.vector)  # pyright: ignore


def test_prompts_of_different_lengths_are_attended_to_as_they_were_at_both_ends() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (Conditioning(tokens=torch.randn(1, length, 4, generator=draw)) for length in (4, 6))
    start, end = interpolate_conditioning(a, b, [0.0]), interpolate_conditioning(a, b, [1.0])
    assert (
        start.tokens is not None
        and end.tokens is not None
        and a.tokens is not None
        and b.tokens is not None
    )
    assert start.tokens.shape == end.tokens.shape == (1, 12, 4)
    assert torch.allclose(attended(start.tokens), attended(a.tokens), atol=1e-6)
    assert torch.allclose(attended(end.tokens), attended(b.tokens), atol=1e-6)
    with pytest.raises(UserError, match="conditionings with masks"):
        interpolate_conditioning(replace(a, mask=torch.ones(1, 4, dtype=torch.bool)), b, [0.5])


# ---- variations ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_variations_of_a_seed(kind: str, sampler: str) -> None:
    """0 is the seed's own picture, 1 the other seeds', whatever a sampler draws on the way;
    between, more is further.
    """
    model, request = (
        MODELS[kind],
        Request("bag", n=3, steps=4, sampler=sampler, seed=5, guidance=1.0),
    )
    plain, others = latents(model, replace(request, n=1)), latents(model, replace(request, seed=9))
    assert torch.equal(
        latents(model, vary(request, seed=9, strength=0.0)), plain.expand(3, -1, -1, -1)
    )
    assert torch.equal(latents(model, vary(request, seed=9, strength=1.0)), others)
    assert vary(request).noise_mix == ([6, 7, 8], [0.2] * 3)
    away = [
        (latents(model, vary(request, seed=9, strength=s)) - plain).flatten(1).norm(dim=1)
        for s in (0.05, 0.3, 0.6, 1.0)
    ]
    assert all((b > a).all() for a, b in pairwise(away)), away


@every
def test_variations_of_a_picture(kind: str) -> None:
    model, request = MODELS[kind], Request("bag", n=2, steps=6, seed=3, guidance=1.0)
    assert torch.equal(
        latents(model, variations(model, PICTURES[0], request, strength=0.5)),
        latents(model, image_to_image(model, PICTURES[0], request, strength=0.5)),
    )
    z = model.encode(PICTURES[0])
    away = [
        float(
            (
                latents(model, variations(model, PICTURES[0], request, strength=s, way="inversion"))
                - z
            ).norm()
        )
        for s in (0.0, 0.1, 0.4, 1.0)
    ]
    assert away == sorted(away) and away[0] < 0.1 * away[-1], away
    fresh = latents(model, replace(request, sampler="ddim", height=16, width=16))
    assert torch.equal(
        latents(model, variations(model, PICTURES[0], request, strength=1.0, way="inversion")),
        fresh,
    )
    two = variations(
        model,
        torch.cat(PICTURES),
        replace(request, prompt=["bag", "ankle boot"], n=1),
        strength=0.0,
        way="inversion",
    )
    one = variations(
        model,
        PICTURES[1],
        replace(request, prompt="ankle boot", n=1),
        strength=0.0,
        way="inversion",
    )
    assert torch.allclose(latents(model, two)[1:], latents(model, one), atol=1e-5)


def test_variations_that_cannot_be() -> None:
    model = MODELS["flow"]
    for strength in (-0.1, 1.1, math.nan, True):
        with pytest.raises(UserError, match="strength="):
            vary(Request(), strength=strength)  # pyright: ignore
        with pytest.raises(UserError, match="strength="):
            variations(model, PICTURES[0], strength=strength, way="inversion")  # pyright: ignore
    with pytest.raises(UserError, match="lies between two seeds already"):
        vary(vary(Request()))
    with pytest.raises(UserError, match="unknown way to vary"):
        variations(model, PICTURES[0], way="magic")
    with pytest.raises(UserError, match="expected ddim"):
        variations(model, PICTURES[0], Request(sampler="heun"), way="inversion")
    with pytest.raises(UserError, match="noise_mix with 2 seeds for 1 images"):
        model.run(Request(noise_mix=([1, 2], [0.0, 1.0])))
    with pytest.raises(UserError, match=r"noise_mix with shares \[2.0\]"):
        model.run(Request(noise_mix=([1], [2.0])))


# ---- series --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(
    "way", [{"to_prompt": "ankle boot"}, {"to_seed": 9}, {"to_prompt": "ankle boot", "to_seed": 9}]
)
def test_a_series_ends_where_plain_runs_do(kind: str, sampler: str, way: dict[str, Any]) -> None:
    model, request = (
        MODELS[kind],
        Request("bag", n=5, steps=4, sampler=sampler, seed=5, guidance=1.5),
    )
    series = latents(model, interpolate(request, **way))
    first = latents(model, replace(request, n=1))
    last = latents(
        model, replace(request, n=1, prompt=way.get("to_prompt", "bag"), seed=way.get("to_seed", 5))
    )
    assert (series[0] - first[0]).abs().max() < 1e-5 and (series[-1] - last[0]).abs().max() < 1e-5
    away = (series - first).flatten(1).norm(dim=1)
    assert (away[1:] > away[:-1]).all(), away
    alone = latents(
        model, replace(interpolate(request, **way), n=1, **alone_at(interpolate(request, **way), 2))
    )
    assert torch.equal(alone[0], series[2]), "a picture of the series alone"


def alone_at(request: Request, k: int) -> dict[str, Any]:
    assert request.noise_mix is not None
    result: dict[str, Any] = {"noise_mix": ([request.noise_mix[0][k]], [request.noise_mix[1][k]])}
    if request.prompt_mix is not None:
        result["prompt_mix"] = (request.prompt_mix[0], [request.prompt_mix[1][k]])
    return result


@every
@pytest.mark.parametrize("more", [{}, {"to_prompt": "ankle boot"}, {"to_seed": 9}])
def test_a_series_between_pictures(kind: str, more: dict[str, Any]) -> None:
    model, request = (
        MODELS[kind],
        Request("bag", n=5, steps=6, sampler="ddpm", seed=5, guidance=1.0),
    )
    series = latents(
        model, interpolate_images(model, PICTURES[0], PICTURES[1], request, strength=0.5, **more)
    )
    ends = [
        replace(request, n=1),
        replace(request, n=1, prompt=more.get("to_prompt", "bag"), seed=more.get("to_seed", 5)),
    ]
    for result, end, image in zip(series[[0, -1]], ends, PICTURES, strict=True):
        assert (
            result - latents(model, image_to_image(model, image, end, strength=0.5))[0]
        ).abs().max() < 1e-5
    away = (series - series[0]).flatten(1).norm(dim=1)
    assert (away[1:] > away[:-1]).all()


@every
def test_a_series_between_inverted_pictures(kind: str) -> None:
    model, request = MODELS[kind], Request("bag", n=3, steps=10, guidance=1.0)
    plan = interpolate_images(
        model, PICTURES[0], PICTURES[1], request, way="inversion", to_prompt="ankle boot"
    )
    series = latents(model, plan)
    z = torch.cat([model.encode(image) for image in PICTURES])
    assert (series[[0, -1]] - z).norm() < 0.1 * z.norm(), "both ends are the pictures"
    noise = plan.request.noise
    assert noise is not None
    sizes = noise.flatten(1).norm(dim=1)
    assert sizes.min() * 1.001 >= min(float(sizes[0]), float(sizes[-1])), (
        "as strong as the noise of the ends"
    )


def test_series_that_cannot_be() -> None:
    model, request = MODELS["flow"], Request("bag", n=3)
    cases: tuple[tuple[Request, dict[str, Any], str], ...] = (
        (request, {}, "nothing to go to"),
        (replace(request, n=1), {"to_seed": 1}, "at least 2 images"),
        (replace(request, prompt=["bag"] * 3), {"to_seed": 1}, "one text for the first"),
        (interpolate(request, to_seed=2), {"to_seed": 1}, "between two prompts or seeds already"),
        (request, {"to_seed": True}, "to_seed=True: expected a whole number"),
    )
    for start, way, message in cases:
        with pytest.raises(UserError, match=message):
            interpolate(start, **way)
    with pytest.raises(UserError, match="of the same size"):
        interpolate_images(model, PICTURES[0], torch.zeros(1, 1, 16, 20), request)
    with pytest.raises(UserError, match="the noise is that of the images"):
        interpolate_images(model, PICTURES[0], PICTURES[1], request, way="inversion", to_seed=1)
    with pytest.raises(UserError, match="unknown way between images"):
        interpolate_images(model, PICTURES[0], PICTURES[1], request, way="magic")
    with pytest.raises(UserError, match="unknown class 'dog'"):
        model.run(interpolate(request, to_prompt="dog"))
    with pytest.raises(UserError, match="expected one text for all images at each end"):
        model.run(Request(["bag", "bag"], prompt_mix=("ankle boot", [0, 1])))


# ---- one run shared by two models ----------------------------------------------------------------


@every
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_sde"])
def test_a_model_goes_on_where_it_stopped(kind: str, sampler: str) -> None:
    """Handed over to itself a run is the whole run to the last bit, the noise that is drawn on the
    way too.
    """
    model, request = MODELS[kind], Request(["bag", "ankle boot"], steps=10, sampler=sampler, seed=3)
    whole = latents(model, request)
    for at in (0.2, 0.55, 0.8):
        assert torch.equal(latents(model, refine(model, model, request, at=at)), whole)


def test_latents_are_handed_over_at_the_noise_that_they_have() -> None:
    """To a model of another process: a beta table's latent goes on as a flow's, rescaled, at the
    time of the same noise level.
    """
    base, second = MODELS["v"], MODELS["flow"]
    request = Request("bag", steps=10, seed=3)
    plans = handover(base, second, request, at=0.6)
    first, x = plans.first, latents(base, plans.first)
    last = plans.resume(x)
    assert last.request.noisy_latent is not None
    level, there = (
        base.denoiser.process.schedule.point(first.timesteps[-1]),
        second.denoiser.process.schedule.point(last.timesteps[0]),
    )
    assert there[1] / there[0] == pytest.approx(level[1] / level[0]) and last.timesteps[-1] == 0
    assert torch.allclose(last.request.noisy_latent / there[0], x / level[0], atol=1e-5), (
        "z + (sigma/alpha) eps is the same in both"
    )
    assert torch.isfinite(latents(second, last)).all()


def test_hand_overs_that_cannot_be() -> None:
    model = MODELS["v"]
    for at in (0, 1, -0.1, math.nan, True):
        with pytest.raises(UserError, match=r"expected a number in \(0, 1\)"):
            refine(model, model, Request(steps=5), at=at)  # pyright: ignore
    with pytest.raises(
        UserError, match=r"at=0\.99 of a run of 5 steps leaves the second model none"
    ):
        refine(model, model, Request(steps=5), at=0.99)
    with pytest.raises(UserError, match="leaves the first model none"):
        refine(model, model, Request(timesteps=[0.5, 0.3, 0]), at=0.1)
    other = tiny_model("v")
    other.autoencoder.set_statistics((0.1, -0.2), (1.0, 1.4))
    with pytest.raises(UserError, match="expected two models of one latent space"):
        refine(model, other, Request(steps=5))
    with pytest.raises(UserError, match="noisy_latent with init_latent or noise"):
        model.run(
            Request(noisy_latent=torch.zeros(1, 2, 8, 8), init_latent=torch.zeros(1, 2, 8, 8))
        )
    with pytest.raises(UserError, match="noisy_latent of shape"):
        model.run(Request(noisy_latent=torch.zeros(1, 2, 4, 8)))
