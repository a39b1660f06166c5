"""Settings of flow matching.

They are the distribution of training times, a shift that follows the image's size, and guidance
that a network has learned.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from helpers.models import tiny_model
from sfumato.checkpoints.schedulers.config import read_scheduler
from sfumato.checkpoints.schedulers.spacing import DynamicShift
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.timesteps import timesteps
from sfumato.diffuse.weighting import MODE_SCALES, draw_times
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.networks.base import Network
from sfumato.sampling.plan import tokens_of
from sfumato.sampling.request import Defaults, Request
from sfumato.train.objectives.denoiser import DenoiserLoss
from sfumato.types import Conditioning

FLOW = Process(schedule("flow"), parameterization("flow"))
COUNT = 20_000


def drawn(name: str, **options: float) -> Tensor:
    return draw_times(name, FLOW, COUNT, torch.Generator().manual_seed(0), **options)


# ---- training times ------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.8)])
def test_logits_are_normal(mean: float, std: float) -> None:
    result = drawn("logit_normal", mean=mean, std=std)
    assert stats.kstest(torch.logit(result).numpy(), "norm", (mean, std)).pvalue > 0.01


@pytest.mark.parametrize("scale", [-1.0, 0.8, 1.29, MODE_SCALES[1]])
def test_mode_is_the_image_of_the_uniform_distribution(scale: float) -> None:
    """The map falls from 1 at u = 0 to 0 at u = 1, so that P(t <= f(u)) = 1 - u."""
    result = drawn("mode", scale=scale)
    for u in (0.1, 0.35, 0.5, 0.8):
        place = 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert float((result <= place).double().mean()) == pytest.approx(1 - u, abs=0.001)
    middle = float(((result > 0.3) & (result < 0.7)).double().mean())
    assert middle > 0.45 if scale > 0 else middle < 0.4
    assert float(result.min()) > 0 and float(result.max()) <= 1


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_times_have_the_shifted_odds(shift: float) -> None:
    """t -> s t / (1 + (s - 1) t) multiplies the odds t / (1 - t) by s, quantile by quantile."""
    plain, moved = drawn("uniform").sort().values, drawn("uniform", shift=shift).sort().values
    inner = slice(100, -100)
    torch.testing.assert_close(
        (moved / (1 - moved))[inner], shift * (plain / (1 - plain))[inner], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"times_scale": 2.0},
        {"times_scale": -1.1},
        {"times_shift": 0.0},
        {"times_std": -1.0},
        {"drop": 2.0},
    ],
)
def test_wrong_distributions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        DenoiserLoss(**wrong)


# ---- a shift that follows the size ---------------------------------------------------------------

FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
FLUX |= {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def test_the_spec_of_a_dynamic_shift_is_complete() -> None:
    recipe = read_scheduler(FLUX, even=True)
    assert recipe.dynamic is not None and recipe.default_spacing == recipe.dynamic.spec == "dynamic"
    other = DynamicShift((100, 0.4), (900, 0.9), False, False, 0.1)
    assert (
        DynamicShift.from_spec(other.spec) == other
        and DynamicShift.from_spec("shifted:shift=2") is None
    )
    for tokens in (256, 1024, 4096):
        name, options = "dynamic", {"tokens": tokens}
        shift = math.exp(0.5 + (tokens - 256) * 0.65 / 3840)
        assert timesteps(name, 7, FLOW.schedule, **options) == timesteps(
            "shifted", 7, FLOW.schedule, shift=shift
        )


def test_larger_pictures_are_shifted_further() -> None:
    model = tiny_model("flow")
    model = replace(
        model, defaults=replace(model.defaults, spacing="dynamic:base_tokens=16,top_tokens=256")
    )
    assert tokens_of(model, 16, 16) == 64 and tokens_of(model, 17, 32) == 9 * 16
    small, large = (
        list(model.plan(Request(steps=4, height=side, width=side)).timesteps) for side in (16, 32)
    )
    assert (
        all(b > a for a, b in zip(small[1:-1], large[1:-1], strict=True))
        and small[0] == large[0] == 1
    )
    dynamic = list(
        model.plan(
            Request(
                steps=4,
                height=16,
                width=16,
                spacing="dynamic:base_tokens=16,top_tokens=256,tokens=256",
            )
        ).timesteps
    )
    assert dynamic == large


def test_a_saved_model_keeps_its_dynamic_shift(tmp_path: Path) -> None:
    from sfumato import load

    model = tiny_model("flow")
    model = replace(model, defaults=replace(model.defaults, spacing="dynamic:top=1.3"))
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.defaults.spacing == "dynamic:top=1.3" and again.times(4) == model.times(4)
    import json

    written = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert written["use_dynamic_shifting"] is True and written["max_shift"] == 1.3


# ---- learned guidance ----------------------------------------------------------------------------


class GuidanceEcho(Network):
    """A network that answers with the last number of its vector, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.heard: list[float] = []
        self.rows = 0

    guidance_embeds = True  # pyright: ignore[reportAssignmentType]
    channels = in_channels = 2  # pyright: ignore[reportAssignmentType]
    sample_size = 8  # pyright: ignore[reportAssignmentType]

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        self.heard += cond.vector[:, -1].tolist()
        self.rows += len(x)
        return x * 0 + cond.vector[:, -1, None, None, None] * 1e-3

    def to_config(self) -> dict[str, Any]:
        return {"_class_name": "GuidanceEcho"}


def echo_model(**defaults: Any) -> tuple[LatentDiffusion, GuidanceEcho]:
    model, network = tiny_model("flow"), GuidanceEcho()
    denoiser = replace(model.denoiser, network=network)
    return replace(model, denoiser=denoiser, defaults=Defaults(steps=2, **defaults)), network


@pytest.mark.parametrize(
    "requested, heard, passes",
    [
        ({}, 3.5, 1),
        ({"guidance": 2.0}, 2.0, 1),
        ({"guidance": 1}, 1.0, 1),
        ({"distilled_guidance": 5}, 5.0, 1),
        ({"guidance": 2.0, "distilled_guidance": 5}, 5.0, 2),
        ({"guidance": "2 interval:low=0.0,high=1.0"}, 3.5, 2),
    ],
)
def test_distilled_guidance_reaches_the_network(
    requested: dict[str, Any], heard: float, passes: int
) -> None:
    model, network = echo_model()
    model.generate("bag", output="latent", **requested)
    assert set(network.heard) == {heard} and network.rows == 2 * passes
    assert model.settings(**requested)["distilled_guidance"] == heard


def test_a_models_own_strength_is_its_default_and_predict_passes_it() -> None:
    model, network = echo_model(distilled_guidance=30.0)
    model.predict(torch.zeros(1, 2, 8, 8), 0.5, "bag")
    assert network.heard == [30.0]


def test_other_models_refuse_a_learned_guidance() -> None:
    with pytest.raises(UserError, match="is not guidance-distilled"):
        tiny_model("flow").generate("bag", distilled_guidance=3.0)
    with pytest.raises(UserError, match="distilled_guidance"):
        echo_model()[0].generate("bag", distilled_guidance=-1.0)
    with pytest.raises(UserError, match="distilled_guidance"):
        Defaults(distilled_guidance=float("nan"))
