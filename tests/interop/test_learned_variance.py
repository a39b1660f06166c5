"""Learned variances beside diffusers: its DDPMScheduler (variance_type "learned_range") steps the
same network with the same noise.
"""

from typing import Any

import diffusers as _diffusers
import pytest
import torch
from torch import Tensor

from helpers.models import random_network
from helpers.schedulers import step_scheduler
from helpers.tensors import noise_stream
from sfumato.batching import drive
from sfumato.checkpoints.schedulers.config import read_scheduler, write_scheduler
from sfumato.diffuse.run import sampler_coroutine
from sfumato.diffuse.samplers import calls
from sfumato.diffuse.timesteps import timesteps
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.networks.dit import DiT, DiTConfig
from sfumato.sampling.request import sampler_of, spacing_of
from sfumato.types import Conditioning

diffusers: Any = _diffusers  # its names are made at run time
SHAPE = (2, 4, 8, 8)
CONFIG = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=5,
)
INPUTS, NONE = (Conditioning(vector=torch.eye(6)[rows]) for rows in ([0, 3], [5, 5]))
LEARNED: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "variance_type": "learned_range",
    "clip_sample": False,
}
LEADING, LINSPACE, TRAILING = (
    {"timestep_spacing": word} for word in ("leading", "linspace", "trailing")
)


@pytest.fixture(scope="module")
def network() -> DiT:
    """Random, and with a variance that goes beyond its range in both directions, as nothing holds
    it there.
    """
    return random_network(lambda: DiT(CONFIG), 1, 0.15)


def diffusers_run(scheduler: Any, network: DiT, start: Tensor, w: float) -> Tensor:
    """DiT's guided loop: the target is guided, the variance behind it is the condition's
    (forward_with_cfg of its code).
    """

    def guided(x: Tensor, timestep: float) -> Tensor:
        t = torch.full((2,), timestep)
        y, none = network(x, t, INPUTS), network(x, t, NONE)
        return torch.cat([none[:, :4] + w * (y[:, :4] - none[:, :4]), y[:, 4:]], 1)

    return step_scheduler(scheduler, guided, start)[-1]


@pytest.mark.parametrize("w", [1.0, 2.5])
@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (LEADING, 10),
        (LEADING | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, 25),
        (
            LINSPACE
            | {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "prediction_type": "sample",
            },
            7,
        ),
    ],
    ids=["linear-eps", "cosine-v", "scaled_linear-x0"],
)
def test_the_same_run(
    config: dict[str, Any], steps: int, w: float, network: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scheduler's config to the end of a run over a part of the table, in float32."""
    recipe = read_scheduler(LEARNED | config, strict=True)
    assert recipe.sampler == "ddpm:variance=learned"
    (sampler, options), (spacing, spaced) = sampler_of(recipe.sampler), spacing_of(recipe.spacing)
    process, noise = recipe.process, noise_stream(*SHAPE, seed=5)
    times = timesteps(spacing, steps, process.schedule, **spaced)
    start = next(noise)
    ask = build(
        Guidance.parse(w), Denoiser(network, process), INPUTS, [NONE], process.schedule.point, None
    )
    run = sampler(start, times, process.schedule, lambda: next(noise), **options)
    with torch.inference_mode():
        actual = drive(
            sampler_coroutine(run, ask, calls(sampler, times, process.schedule, **options)),
            evaluate_calls,
        )

    again = noise_stream(*SHAPE, seed=5)
    scheduler = diffusers.DDPMScheduler.from_config(LEARNED | config)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(again)
    )
    scheduler.set_timesteps(steps)
    expected = diffusers_run(scheduler, network, next(again), w)
    assert actual is not None and float((actual - expected).norm() / expected.norm()) < 1e-4
    fixed, others = (
        diffusers.DDPMScheduler.from_config(LEARNED | config | {"variance_type": "fixed_small"}),
        noise_stream(*SHAPE, seed=5),
    )
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(others)
    )
    fixed.set_timesteps(steps)
    plain = Plain(fixed)
    assert (
        float((diffusers_run(plain, network, next(others), w) - expected).norm() / expected.norm())
        > 2e-3
    ), "the variance shows"


class Plain:
    """A scheduler of a fixed variance, given the target alone."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps

    def step(self, y: Tensor, step: Tensor, x: Tensor) -> Any:
        return self.scheduler.step(y[:, :4], step, x)


@pytest.mark.parametrize("spacing", [LEADING, LINSPACE, TRAILING], ids=str)
def test_the_written_config_equals_diffusers(spacing: dict[str, Any]) -> None:
    recipe = read_scheduler(LEARNED | spacing)
    written = write_scheduler(recipe.process, recipe.sampler, recipe.spacing)
    assert "_sfumato" not in written and read_scheduler(written) == recipe
    assert diffusers.DDPMScheduler.from_config(written).variance_type == "learned_range"


@pytest.mark.parametrize("spacing", ["trailing", "karras", "log_snr"])
def test_other_times_leave_the_variance(spacing: str) -> None:
    process = read_scheduler(LEARNED).process
    written = write_scheduler(process, "ddpm:variance=learned", spacing)
    read = read_scheduler(written)
    assert (read.sampler, read.spacing) == ("ddpm:variance=learned", spacing)
    assert (
        written["_class_name"] == "DDPMScheduler"
        and diffusers.DDPMScheduler.from_config(written).variance_type == "learned_range"
    )
